"""The engines of bench_alignez.py over one model: raindecode's and transformers' own step, and the check that they agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from decode_models import kv_bytes, llama_config, weight_bytes
from dera_engines import ALLOWED, margin_of, sharing
from naive.alignez import Edit, HookedEdits
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from raindecode import Decoder, Policy, Sampling
from raindecode.engine.branch import Ledger
from raindecode.engine.task import Task
from raindecode.errors import RainDecodeError
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.search.context import SearchContext
from raindecode.search.edited import search_edited

Row = dict[str, Any]
OURS = ("none", "edits", "edits_256")
THEIRS = ("stock", "hooks", "hooks_256")
BASES = {"edits": "none", "edits_256": "none", "hooks": "stock", "hooks_256": "stock"}
"""What each edited engine is compared with to tell what the edit adds."""
GREEDY = Sampling.greedy(ignore_eos=True, logprobs=True)
OPS = ("project", "boost")
_EFFECT = (
    10  # an edit has to move log-probabilities by this many times what is allowed, or the check would prove nothing
)
_SLACK = 2**30


def bytes_needed(name: str, dtype: torch.dtype, rows: int, context: int, steps: int) -> int:
    """Memory of a run, rounded up: the weights once, and the keys and values of all engines."""
    if name == "testbed":
        return _SLACK
    config = llama_config(name)
    ours = len(OURS) * kv_tokens(rows, context, steps)
    theirs = len(THEIRS) * rows * (context + steps) + rows * (context + steps) // config.num_hidden_layers
    return int(
        2 * weight_bytes(config, dtype) + (ours + theirs) * kv_bytes(config, dtype) + _SLACK
    )  # joining a layer's weights takes them twice for a moment


def kv_tokens(rows: int, context: int, steps: int) -> int:
    """Slots that one decode takes, and what a check before it left."""
    return context + 2 * rows * (steps + 2) + 64


def draw_edits(num_layers: int, hidden_size: int, rows: int, directions: int) -> tuple[Tensor, list[Tensor]]:
    """Random directions, half of them taken away and half boosted: [L, k, d] for all rows, and of each row for itself."""
    noise = torch.Generator().manual_seed(2)
    shape = (num_layers, directions, hidden_size)
    return torch.randn(shape, generator=noise), [torch.randn(shape, generator=noise) for _ in range(rows)]


def operations(directions: int) -> list[str]:
    return [OPS[j % len(OPS)] for j in range(directions)]


class Ours:
    """One decode of all prompts by raindecode; a step is one of the engine, which advances every request by a token."""

    def __init__(self, decoder: Decoder, prompts: Sequence[list[int]], policies: Sequence[Policy], steps: int) -> None:
        self.engine = decoder.engine
        requests = decoder.requests(list(prompts), search=GREEDY, policy=list(policies), max_new_tokens=steps + 1)
        self.tasks = []
        for index, request in enumerate(requests):
            ledger = Ledger()
            context = SearchContext(decoder.engine, decoder.codec, ledger, request)
            self.tasks.append(Task(search_edited(context, GREEDY), ledger, tag=index))
            self.engine.submit(self.tasks[-1])
        self.step()  # the prompts, and the first token of every request

    def step(self) -> None:
        before = self.engine.model_steps
        self.engine.step()
        assert self.engine.model_steps > before

    def end(self) -> list[list[int]]:
        """The tokens of every request; nothing is left in the cache.

        Raises:
            RainDecodeError: a request failed, or is not done after these steps: the requests were not in step.
        """
        for task in self.tasks:
            if task.error is not None:
                raise task.error
            if not task.done:
                raise RainDecodeError(f"request {task.tag} is not done after the steps that all requests take together")
        self.engine.tree.clear()
        return [task.result.token_ids for task in self.tasks]


class Theirs:
    """The same by transformers: a cache that holds the common part of the prompts once per row, all rows in one forward."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]], edits: HookedEdits | None) -> None:
        self.model: Any = model
        self.edits = edits
        self.cache = DynamicCache(config=model.config)
        common = prompts[0][:-1]
        with torch.inference_mode():
            self.model(torch.tensor([common], device=model.device), past_key_values=self.cache, logits_to_keep=1)
            self.cache.batch_repeat_interleave(len(prompts))
        self.last = torch.tensor([[prompt[-1]] for prompt in prompts], device=model.device)
        self.tokens: list[list[int]] = []
        if edits is not None:
            edits.attach()
        self.step()

    @torch.inference_mode()
    def step(self) -> None:
        logits = self.model(self.last, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.last = logits.argmax(-1, keepdim=True)
        self.tokens.append(self.last[:, 0].tolist())  # every token reaches the host

    def end(self) -> list[list[int]]:
        """The tokens of every row; the model is as it was."""
        if self.edits is not None:
            self.edits.remove()
        self.cache = DynamicCache()
        return [list(row) for row in zip(*self.tokens, strict=True)]


class Engines:
    """Every engine over the same weights, prompts and edits.

    Args:
        model: as transformers made it. Each engine has a copy that shares its weights.
        prompts: token ids, alike but for the last of each.
        directions: of every layer, k.
        steps: of the longest decode.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], *, directions: int,
        tap: Any, steps: int,
    ) -> None:  # fmt: skip
        self.model, self.prompts, self.tap = model, list(prompts), tap
        self.vocabulary = len(tokenizer)
        rows, config = len(prompts), model.config
        self.ops = operations(directions)
        self.shared, self.own = draw_edits(config.num_hidden_layers, config.hidden_size, rows, directions)
        tokens = kv_tokens(rows, len(prompts[0]), steps)
        self.decoders = {
            name: Decoder(sharing(model), tokenizer, kv_tokens=tokens, max_concurrent=rows) for name in OURS
        }
        one = Policy(edits=self.edit(self.shared))
        self.policies = {
            "none": [Policy()] * rows,
            "edits": [one] * rows,
            "edits_256": [Policy(edits=self.edit(each)) for each in self.own],
        }
        self.models = {name: sharing(model) for name in THEIRS}
        batched = torch.stack(self.own, dim=1)  # [L, rows, k, d]
        self.hooked = {
            "stock": None,
            "hooks": self.hooks(self.models["hooks"], self.shared),
            "hooks_256": self.hooks(self.models["hooks_256"], batched),
        }

    def edit(self, directions: Tensor) -> AlignEZ:
        """The edit of raindecode, from the last row of the prompt on."""
        return AlignEZ.from_directions(dict(enumerate(directions)), op=self.ops, tap=self.tap)

    def hooks(self, model: PreTrainedModel, directions: Tensor) -> HookedEdits:
        """The same edit as hooks, of all rows of a forward."""
        return HookedEdits(model, {i: Edit(u, self.ops) for i, u in enumerate(directions)}, self.tap, prompt="all")

    def begin(self, name: str, steps: int) -> Ours | Theirs:
        """A decode of so many steps after the first token, which is there already."""
        if name in OURS:
            return Ours(self.decoders[name], self.prompts, self.policies[name], steps)
        return Theirs(self.models[name], self.prompts, self.hooked[name])

    def directions_of(self, name: str, row: int) -> Tensor | None:
        """What an engine does to a row: [L, k, d]."""
        return None if name in ("none", "stock") else self.shared if name in ("edits", "hooks") else self.own[row]

    # ---- the check --------------------------------------------------------------------------------------------------------
    def check(self, name: str, rows: Sequence[int], steps: int) -> Row:
        """Decode all prompts and compare some of them with a forward of transformers in one piece, hooks on the model.

        Returns:
            margin: by how much the logit of a token lies below the largest one, at most.
            logprob_error: largest difference of the log-probabilities raindecode reports; None for transformers.
            effect: by how much the edit moves log-probabilities of these tokens, at most; None for engines without edits.
            alone_error: largest difference between an edit of its own in the batch and the same request alone; None elsewhere.
            allowed, ok: for all.
        """
        logprobs: list[list[float]] | None = None
        if name in OURS:
            done = self.generate(name, range(len(self.prompts)), steps)
            tokens, logprobs = [one[0] for one in done], [one[1] for one in done]
        else:
            decode = self.begin(name, steps)
            for _ in range(steps - 1):
                decode.step()
            tokens = decode.end()
        found: Row = {"margin": 0.0, "logprob_error": None, "effect": None, "alone_error": None}
        for row in rows:
            edit, chosen = self.directions_of(name, row), torch.tensor(tokens[row])[:, None]
            logits = self.reference(row, edit, tokens[row])
            expected = logits.log_softmax(-1).gather(-1, chosen)[:, 0]
            found["margin"] = max(found["margin"], margin_of(logits, tokens[row]))
            if logprobs is not None:
                _widen(found, "logprob_error", (torch.tensor(logprobs[row]) - expected).abs())
            if edit is not None:
                bare = self.reference(row, None, tokens[row]).log_softmax(-1).gather(-1, chosen)[:, 0]
                _widen(found, "effect", (bare - expected).abs())
            if name == "edits_256" and logprobs is not None:
                _widen(found, "alone_error", self._alone_error(name, row, steps, tokens[row], logprobs[row]))
        allowed = ALLOWED[self.model.dtype]
        errors = (found["margin"], found["logprob_error"] or 0.0, found["alone_error"] or 0.0)
        ok = all(error <= allowed for error in errors)
        if found["effect"] is not None:
            ok = ok and found["effect"] >= _EFFECT * allowed
        return found | {"rows": list(rows), "allowed": allowed, "ok": ok}

    def generate(self, name: str, rows: Sequence[int], steps: int) -> list[tuple[list[int], list[float]]]:
        """Tokens and their log-probabilities by the public face; the cache is empty afterwards."""
        decoder = self.decoders[name]
        done = decoder.generate(
            [self.prompts[row] for row in rows], search=GREEDY, policy=[self.policies[name][row] for row in rows],
            max_new_tokens=steps, progress=False,
        )  # fmt: skip
        decoder.engine.tree.clear()
        return [(one.token_ids, [each.logprob for each in one.logprobs]) for one in done]

    def _alone_error(self, name: str, row: int, steps: int, tokens: Sequence[int], logprobs: Sequence[float]) -> Tensor:
        """[n], up to the first token that differs: behind that, two answers are two texts."""
        ((others, values),) = self.generate(name, [row], steps)
        same = next((i for i, pair in enumerate(zip(tokens, others, strict=True)) if pair[0] != pair[1]), steps - 1)
        return (torch.tensor(logprobs[: same + 1]) - torch.tensor(values[: same + 1])).abs()

    @torch.inference_mode()
    def reference(self, row: int, directions: Tensor | None, tokens: Sequence[int]) -> Tensor:
        """Logits [len(tokens), vocabulary] float32 on the cpu that tokens of a row are chosen from, by plain transformers."""
        *common, last = self.prompts[row]
        run: Any = self.model
        device, cache = self.model.device, DynamicCache(config=self.model.config)
        run(torch.tensor([common], device=device), past_key_values=cache, logits_to_keep=1)
        ids = torch.tensor([[last, *tokens[:-1]]], device=device)
        if directions is None:
            rows = run(ids, past_key_values=cache).logits[0]
        else:
            with self.hooks(self.model, directions):
                rows = run(ids, past_key_values=cache).logits[0]
        logits: Tensor = rows[:, : self.vocabulary].float().cpu()
        return logits


def _widen(found: Row, name: str, differences: Tensor) -> None:
    found[name] = max(found[name] or 0.0, float(differences.max()))


__all__ = ["BASES", "OURS", "THEIRS", "Engines", "Ours", "Theirs", "bytes_needed", "draw_edits", "kv_tokens"]
