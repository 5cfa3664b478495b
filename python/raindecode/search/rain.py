"""RAIN: settings and presets. The procedure is in rain_search.py. Source: Li et al., ICLR 2024, and the official code."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from raindecode.errors import ConfigError
from raindecode.policy.prompt import ChatFormat, template
from raindecode.search.context import SearchContext
from raindecode.search.embedder import Embedder, HiddenStates
from raindecode.search.evaluator import Evaluator, JudgeTemplate, ScoreFunction, as_evaluator
from raindecode.settings import as_strings, is_whole, require_finite, require_whole
from raindecode.types import Completion
from rainkernels.ops.tree import TreeConfig

Preset = Literal["hh", "adv", "truth", "sentiment", "town"]
_PUNCTUATION = ",.?:;\n"


@dataclass(frozen=True)
class RAIN:
    """Tree search over token sets with self-evaluation and rewind.

    The defaults are the constants of the official HH script. Values of the evaluator lie in [-1, 1].

    Attributes:
        evaluator: JudgeTemplate (the model judges itself), function of (prompt, response) pairs, or an Evaluator.
        format: how the prompt is written; None takes the decoder's.
        embedder: vectors for the similarity update; None turns the update off.
        set_lengths: tokens per set by depth; the last holds from there on.
        num_samples: distinct sampled sets wanted per expansion, besides the greedy one.
        max_tries: sampled sets tried for them.
        dynamic_tries: sampled sets tried for one more child (dynamic rule).
        top_k, first_top_k: candidates of an expansion step; of the very first (single tokens).
        expansion_temperature: of the expansion's candidates.
        rollout_stop: characters after which a rollout ends; "" rolls out to the end of the answer.
        max_iterations: search iterations of a root, inherited visits counted (maxT).
        min_new_iterations: iterations a root may always have.
        min_visits: a child must have more direct visits than this to be chosen early (minT).
        value_threshold: and a mean value above this (Vt).
        root_prior_mix: p becomes (1 - mix) p + mix / k at a root.
        keep_after_last: what is judged and the answer are cut after the last of these characters; "" keeps all.
        width: leaves worked on at once: the next one and likely ones after it. The result is the same for every width (in
            exact mode, bit for bit); larger ones need fewer forwards and more rows. "auto" fills what room a forward has.
        record_tree: return the search trees with the completion.
    """

    evaluator: Evaluator | ScoreFunction | JudgeTemplate
    format: ChatFormat | None = None
    embedder: Embedder | None = field(default_factory=HiddenStates)
    set_lengths: tuple[int, ...] = (1, 2, 4, 10)
    num_samples: int = 9
    max_tries: int = 9
    dynamic_tries: int = 1
    top_k: int = 15
    first_top_k: int = 10
    expansion_temperature: float = 1.0
    rollout_stop: str = _PUNCTUATION
    max_iterations: int = 50
    min_new_iterations: int = 15
    min_visits: int = 6
    value_threshold: float = 0.8
    c_puct: float = 2.0
    similarity_weight: float = 0.2
    similarity_threshold: float = 0.95
    root_prior_mix: float = 0.25
    max_children: int = 20
    dynamic_children: bool = True
    dynamic_variance: float = 0.03
    dynamic_value: float = 0.0
    stop: tuple[str, ...] = ()
    keep_after_last: str = ""
    width: int | Literal["auto"] = "auto"
    record_tree: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluator", as_evaluator(self.evaluator))
        at_least_one = ("num_samples", "max_tries", "dynamic_tries", "top_k", "first_top_k", "max_iterations")
        for name in (*at_least_one, "min_new_iterations", "max_children"):
            require_whole(f"RAIN {name}", getattr(self, name), 1)
        require_whole("RAIN min_visits", self.min_visits, 0)
        if self.width != "auto" and not (is_whole(self.width) and self.width >= 1):
            raise ConfigError(f'RAIN width is {self.width!r}; allowed: a whole number from 1, or "auto"')
        for name in ("value_threshold", "expansion_temperature"):
            require_finite(f"RAIN {name}", getattr(self, name))
        for name in ("rollout_stop", "keep_after_last"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"RAIN {name} is {getattr(self, name)!r}; allowed: a string of characters")
        if self.embedder is not None and not hasattr(self.embedder, "dimension"):
            raise ConfigError(
                f"RAIN embedder is {self.embedder!r}; allowed: None, or an Embedder such as HiddenStates()"
            )
        object.__setattr__(self, "stop", as_strings("RAIN stop", self.stop))
        lengths_ok = (
            isinstance(self.set_lengths, Sequence) and self.set_lengths and all(map(is_whole, self.set_lengths))
        )
        if not lengths_ok or min(self.set_lengths) < 1 or self.set_lengths[0] != 1:
            raise ConfigError(
                f"RAIN set_lengths is {self.set_lengths}; allowed: positive lengths, the first 1 (the root branches on single tokens)"
            )
        if not self.expansion_temperature > 0:
            raise ConfigError(f"RAIN expansion_temperature is {self.expansion_temperature}; allowed: more than 0")
        if max(self.first_top_k, self.num_samples + 1) > self.max_children:
            raise ConfigError(
                f"RAIN max_children is {self.max_children}; allowed: at least first_top_k and num_samples + 1 "
                f"({max(self.first_top_k, self.num_samples + 1)}), at most 32"
            )
        self.tree_config(1)

    def tree_config(self, embedding_dim: int) -> TreeConfig:
        """The kernel's view of these settings."""
        try:
            return TreeConfig(
                max_rows=96,
                max_children=self.max_children,
                max_embeddings=96 if self.embedder is not None else 0,
                embedding_dim=embedding_dim,
                c_puct=self.c_puct,
                similarity_weight=self.similarity_weight,
                similarity_threshold=self.similarity_threshold,
                root_prior_mix=self.root_prior_mix,
                dynamic_variance=self.dynamic_variance,
                dynamic_value=self.dynamic_value,
                dynamic_children=self.dynamic_children and self.embedder is not None,
                similarity=self.embedder is not None,
            )
        except ValueError as error:
            raise ConfigError(f"RAIN: {error}") from error

    def iterations(self, inherited: int) -> int:
        """Iterations a root may have that comes with so many direct visits."""
        return max(self.max_iterations - inherited, self.min_new_iterations)

    def set_length(self, step: int) -> int:
        """Tokens per set for an expansion at depth `step` from the start of the answer."""
        return self.set_lengths[min(step, len(self.set_lengths) - 1)]

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> RAIN:
        """A published set-up, or "town" for the embedded model. Keyword arguments change single settings.

        Raises:
            ConfigError: no such preset, or no such setting.
        """
        if name not in get_args(Preset):
            raise ConfigError(f"there is no RAIN preset {name!r}; allowed: {', '.join(get_args(Preset))}")
        try:
            return replace(_PRESETS[name](), **changes)
        except TypeError as error:
            raise ConfigError(f"RAIN.preset({name!r}): {error}") from error

    def search(self, context: SearchContext) -> Generator[Any, Any, Completion]:
        """Answer one request."""
        from raindecode.search.rain_search import RainSearch

        return RainSearch(self, context).run()


def _options(good: str, bad: str, lead: str = "\nOptions:", cue: str = "\nThe answer is: (") -> tuple[str, str]:
    """The two-option question, good option first and second."""
    return f"{lead}\n(A) {good}\n(B) {bad}{cue}", f"{lead}\n(A) {bad}\n(B) {good}{cue}"


def _hh() -> RAIN:
    turn = "Human: {prompt}\nAssistant:"
    first, second = _options("The assistant's reply is harmless.", "The assistant's reply is harmful.")
    return RAIN(
        evaluator=JudgeTemplate(template("hh_judge.txt") + "\n\n", turn, first, second),
        format=ChatFormat(turn, prefix=template("hh_chat.txt") + "\n\n", stop=("\nHuman:", "\n\nHuman:")),
        stop=("\nHuman:",),
    )


def _adv() -> RAIN:
    # Scored as Human/Assistant: the official script looks for these markers in a USER/ASSISTANT text and fails.
    hh = _hh()
    return replace(
        hh,
        format=ChatFormat(template("adv_system.txt") + " USER: {prompt} ASSISTANT:", stop=("USER:",)),
        stop=("USER:",),
        max_tries=19,
        dynamic_tries=3,
        expansion_temperature=2.0,
        min_visits=5,
    )


def _truth() -> RAIN:
    question = "\nIs the answer above true and supported by what is known? Reply Yes or No.\nReply:"
    return RAIN(
        evaluator=JudgeTemplate(
            template("truth_judge.txt") + "\n\n", "Question: {prompt}\nAnswer:", question, None, letters=(" Yes", " No")
        ),
        format=ChatFormat("[INST] {prompt} [/INST]", stop=("[INST]",)),
        stop=("[INST]",),
        rollout_stop="",
        min_visits=16,
        keep_after_last=".",
    )


def _sentiment() -> RAIN:
    first, second = _options("The review is positive.", "The review is negative.")
    return RAIN(
        evaluator=JudgeTemplate(template("sentiment_judge.txt") + "\n\nReview: ", "{prompt}", first, second),
        format=ChatFormat("{prompt}"),
    )


def _town() -> RAIN:
    from raindecode import testbed

    turn = testbed.format_prompt("{prompt}")
    first, second = (text.split(turn)[1] for text in testbed.evaluation_prompts(turn))
    header = testbed.evaluation_prompts(turn)[0].split(turn)[0]
    return RAIN(
        evaluator=JudgeTemplate(header, turn, first, second),
        format=ChatFormat(turn, stop=("\n",)),
        stop=("\n",),
    )


_PRESETS = {"hh": _hh, "adv": _adv, "truth": _truth, "sentiment": _sentiment, "town": _town}
