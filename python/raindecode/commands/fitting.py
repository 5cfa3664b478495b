"""What the options of ``raindecode fit-edit`` mean: questions, how pairs are made of them, settings of the fit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from raindecode import testbed
from raindecode.commands.common import one_of, say
from raindecode.commands.prompts import collect_prompts
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError, PromptError
from raindecode.hidden_edits import ModelIdentity
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.elicitation import Elicitation
from raindecode.policy.alignez.fit import FitSettings, from_mapping
from raindecode.policy.alignez.pairs import PairSet
from raindecode.policy.alignez.positions import Positions
from raindecode.policy.alignez.presets import preset as named_preset
from raindecode.search.sampling import Sampling
from raindecode.settings import require_whole

QUESTIONS: Final = 100
_MOST_QUESTIONS: Final = 20_000
_ELICITATIONS: Final = {"published": Elicitation.published, "testbed": Elicitation.testbed}
_LAYERS: Final = {"half": 0.5, "all": None}
_OF_ONE_KIND: Final = {"rank": "svd-diff", "neighbours": "svd-knn"}
_SUFFIXES: Final = (".safetensors", ".gguf")


def questions_of(words: Sequence[str], file: str | None, task: str | None, count: int | None, seed: int) -> list[str]:
    """Questions that pairs are made of: the user's own, or training requests of the town.

    Raises:
        ConfigError: options that exclude each other. PromptError: there is no question, or one that is no text.
    """
    if task is None:
        if count is not None:
            raise ConfigError("--questions counts the requests of --task town: give that too, or drop it")
        if not words and file is None:
            raise PromptError(
                "there is nothing to fit on: give questions (in quotes, or with --file), --task town, or pairs of answers with "
                "--pairs"
            )
        return collect_prompts(words, file)
    one_of("--task", task, ("town",))
    if words or file is not None:
        raise ConfigError("--task town brings its own questions: drop yours, or drop --task")
    count = QUESTIONS if count is None else count
    if not 1 <= count <= _MOST_QUESTIONS:
        raise ConfigError(f"--questions is {count}; allowed: 1 to {_MOST_QUESTIONS}")
    return [request.text for request in testbed.sample_requests(count, split="train", seed=seed)]


@dataclass(frozen=True)
class Making:
    """How the model makes pairs of questions."""

    questions: Sequence[str]
    elicitation: Elicitation
    options: dict[str, Any]

    def make(self, decoder: Decoder) -> PairSet:
        """Make them, showing how far it is on a terminal.

        Raises: as generate_pairs.
        """
        answers, out = self.options["answers"], self.options["out"]
        say(f"making pairs of {len(self.questions)} questions, {answers} of each")
        try:
            return AlignEZ.generate_pairs(decoder, self.questions, elicitation=self.elicitation, **self.options)
        except KeyboardInterrupt:
            if out is not None:
                say(f"{out!r} holds the pairs that were made; the same command goes on from there")
            raise


def making(
    questions: Sequence[str], model: str, *, elicitation: str | None, answers: int | None, max_new_tokens: int | None,
    temperature: float | None, similarity: float | None, seed: int, out: str | None,
) -> Making:  # fmt: skip
    """What the options about making pairs say; None where they were not given.

    Raises:
        ConfigError: a value is not allowed.
    """
    form = elicitation or ("testbed" if model == "testbed" else "published")
    one_of("--elicitation", form, tuple(_ELICITATIONS))
    search = None if temperature is None else Sampling(temperature=temperature)
    options: dict[str, Any] = {
        "answers": 1 if answers is None else answers,
        "max_new_tokens": 128 if max_new_tokens is None else max_new_tokens,
        "seed": seed, "search": search, "out": out,
        **({} if similarity is None else {"similarity": similarity}),
    }  # fmt: skip
    for name in ("answers", "max_new_tokens", "seed"):
        require_whole(f"--{name.replace('_', '-')}", options[name], 1 if name != "seed" else 0)
    if similarity is not None and not -1 < similarity <= 1:
        raise ConfigError(f"--similarity is {similarity}; allowed: a cosine above -1, up to 1")
    if temperature == 0 and options["answers"] > 1:
        raise ConfigError(
            f"--temperature 0 makes all {options['answers']} answers of a question alike: drop --answers, or give a temperature"
        )
    return Making(questions, _ELICITATIONS[form](), options)


def fit_settings(preset: str, *, layers: str | None, positions: str | None, **others: Any) -> FitSettings:
    """A preset with what was given in its place; None where an option was not given.

    Raises:
        ConfigError: there is no such preset, or a value is not allowed with it.
    """
    named = named_preset(preset)
    given = {name: value for name, value in others.items() if value is not None}
    for name, kind in _OF_ONE_KIND.items():
        if name in given and named.kind != kind:
            raise ConfigError(f"--{name} is about --preset {kind}, and the preset is {preset}: drop one of them")
    if layers is not None:
        given["layers"] = layers_of(layers)
    if positions is not None:
        given["positions"] = Positions.parse(positions)
    return from_mapping(named, given)


def layers_of(text: str) -> int | float | tuple[int, ...] | None:
    """The text of --layers: all, half, a share (0.75), how many (3), or which, comma between (one alone with a comma behind it).

    Raises:
        ConfigError: it is something else.
    """
    if text in _LAYERS:
        return _LAYERS[text]
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    if all(part.isdecimal() and part.isascii() for part in parts):
        return tuple(map(int, parts)) if "," in text else int(text)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(
            f"--layers is {text!r}; allowed: all, half or another share (0.75), how many (3), or which, counted from 0 (4,7; one alone: 4,)"
        )
    return share


def check_output(output: str | None, report_only: bool, settings: FitSettings) -> None:
    """Refuse an output file that the edit cannot be written to, before anything has run.

    Raises:
        ConfigError: it is missing, of another kind, or a control vector cannot say what the edit will do.
    """
    if report_only and output is not None:
        raise ConfigError("--report-only fits nothing, so there is nothing to write to --output: drop one of them")
    if report_only:
        return
    if output is None:
        raise ConfigError("name the file to write with --output, or look at the pairs only with --report-only")
    suffix = Path(output).suffix
    if suffix not in _SUFFIXES:
        raise ConfigError(f"--output is {output!r}; allowed: a file that ends in {' or '.join(_SUFFIXES)}")
    adds = settings.kind in ("mean-diff", "logistic")
    if suffix == ".gguf" and not (adds and settings.tap == "block_out" and settings.positions.everywhere):
        raise ConfigError(
            f"--output is {output!r}, and a GGUF control vector holds additions at block_out in every row only: use --preset mean-diff "
            "or logistic with --tap block_out --positions all, or name a .safetensors file"
        )
    if suffix == ".gguf" and (not isinstance(settings.layers, tuple) or 0 in settings.layers):
        raise ConfigError(
            f"--output is {output!r}, and layer 0 has no place in a GGUF control vector: name the layers with --layers, from 1 on, such as "
            "4,7, or name a .safetensors file"
        )


class Timed:
    """A decoder, as far as fitting goes, that keeps the time its forwards take.

    Attributes:
        seconds: of all forwards so far.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.seconds = 0.0

    @property
    def identities(self) -> Sequence[ModelIdentity]:
        """Of the decoder."""
        return self._decoder.identities

    def activations(self, passages: Sequence[tuple[str, str]], **options: Any) -> Tensor:
        """As Decoder.activations."""
        started = time.perf_counter()
        try:
            return self._decoder.activations(passages, **options)
        finally:
            self.seconds += time.perf_counter() - started
