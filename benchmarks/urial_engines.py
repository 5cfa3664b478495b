"""The engines of bench_urial.py over one model: raindecode with its prefix store and without, transformers likewise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from decode_models import kv_bytes, llama_config, weight_bytes
from dera_engines import ALLOWED, answer_rows, margin_of, sharing
from naive.urial import Published, Reusing
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raindecode import URIAL, Decoder, Policy, Sampling, testbed
from raindecode.policy.prompt import ChatFormat
from raindecode.testbed.corpus import exchange
from raindecode.testbed.forms import INTRO, PERSONAS
from raindecode.testbed.world import draw_reply, draw_request
from raindecode.types import Completion

Row = dict[str, Any]
OURS: Final = ("hot", "again", "disk")
THEIRS: Final = ("transformers", "transformers_reuse")
ENGINES: Final = (*OURS, *THEIRS)
PREFIX: Final = ("compute_prefix", "load_prefix")
"""What it takes to have the prompt's K/V, without a query."""
OWN: Final = range(15, 26)
"""Tokens that a query adds to the constant prompt."""
_TRIES = 100  # shorter exchanges that may fit when one does not
_GREEDY = Sampling.greedy(ignore_eos=True)
_SLACK = 2**30


def bytes_needed(name: str, dtype: torch.dtype, prefix: int, rows: int, new_tokens: int) -> int:
    """Memory of a run, rounded up: weights, K/V of the largest batch of transformers, and its scores."""
    if name == "testbed":
        return 2 * _SLACK
    config = llama_config(name)
    width = prefix + OWN[-1] + new_tokens
    layer = kv_bytes(config, dtype) // config.num_hidden_layers
    batch = rows * width * (kv_bytes(config, dtype) + 2 * layer + 6 * config.intermediate_size * dtype.itemsize)
    ours = 2 * kv_tokens(prefix, rows, new_tokens) * kv_bytes(config, dtype)
    return int(weight_bytes(config, dtype) + batch + ours + _SLACK)


def kv_tokens(prefix: int, rows: int, new_tokens: int) -> int:
    """Slots of raindecode: one prompt, pinned, which may take half of them, and the queries with their answers."""
    return 2 * prefix + (rows + 1) * (OWN[-1] + new_tokens + 1) + 256


def constant_prompt(tokenizer: PreTrainedTokenizerBase, most: int) -> ChatFormat:
    """URIAL.testbed() with as many kind exchanges as `most` tokens hold. No stop strings: answers are compared by length."""
    rng = random.Random(0)
    text = f"{INTRO} {PERSONAS['kind'][0]}\n\n"
    refused = 0
    while refused < _TRIES:
        request = draw_request(rng)
        longer = text + exchange(request.text, draw_reply(rng, request, "kind", comply=not request.harmful)) + "\n\n"
        if len(tokenizer(longer)["input_ids"]) > most:
            refused += 1
        else:
            text = longer
    return replace(URIAL.testbed(), prefix=text, stop=())


class Engines:
    """Every engine over the same weights and constant prompt. `hot` has a decoder of its own, which nothing makes forget.

    Args:
        model: as transformers made it; raindecode has copies that share its weights.
        format: the prompt.
        file: where its K/V are written, for `disk`.
        rows: most queries at a time.
        new_tokens: of the longest answer.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, format: ChatFormat, file: Path, *, rows: int, new_tokens: int
    ) -> None:  # fmt: skip
        self.model, self.format, self.file = model, format, file
        self.policy = Policy(prompt=format)
        slots = kv_tokens(len(tokenizer(format.prefix)["input_ids"]), rows, new_tokens)
        self._hot, self._cold = (
            Decoder(sharing(model), tokenizer, kv_tokens=slots, max_concurrent=rows) for _ in range(2)
        )
        self._naive = {
            "transformers": Published(model, tokenizer, format),
            "transformers_reuse": Reusing(model, tokenizer, format),
        }
        self._hot.save_prefix(file, policy=self.policy)

    def queries(self, count: int) -> list[str]:
        """Different held-out requests of the testbed, each of about 20 tokens behind the constant prompt."""
        found: list[str] = []
        for request in testbed.sample_requests(4 * count + 40, split="test", seed=0):
            if request.text not in found and self.own_tokens(request.text) in OWN:
                found.append(request.text)
        assert len(found) >= count
        return found[:count]

    @cached_property
    def prefix(self) -> list[int]:
        """Token ids of the constant prompt."""
        (request,) = self._hot.requests(["Hello."], policy=self.policy)
        return list(request.prompt_ids[: request.constant])

    def own_tokens(self, query: str) -> int:
        """Tokens of a query that are not of the constant prompt."""
        (request,) = self._hot.requests([query], policy=self.policy)
        return len(request.prompt_ids) - request.constant

    def prepare(self, name: str) -> None:
        """What is no part of a request: `hot` and transformers_reuse keep the prompt and nothing of earlier queries."""
        if name == "hot":
            self._hot.engine.tree.clear()  # what is pinned stays
        elif name not in THEIRS:
            self._cold.engine.forget()

    def answer(self, name: str, queries: Sequence[str], num_tokens: int) -> list[list[int]]:
        """So many greedy tokens for every query, all queries together."""
        if name in THEIRS:
            return [one.token_ids for one in self._naive[name].answer(queries, num_tokens, ends=False)]
        if name == "disk":
            self.run("load_prefix")
        return [one.token_ids for one in self.complete(name, queries, num_tokens)]

    def complete(self, name: str, queries: Sequence[str], num_tokens: int) -> list[Completion]:
        """The same of raindecode, with its counters."""
        decoder = self._hot if name == "hot" else self._cold
        return decoder.generate(
            list(queries), search=_GREEDY, policy=self.policy, max_new_tokens=num_tokens, progress=False
        )

    def run(self, name: str) -> None:
        """One of PREFIX."""
        if name == "load_prefix":
            self._cold.load_prefix(self.file, policy=self.policy)
        else:
            self._cold.generate([self.prefix], search=_GREEDY, max_new_tokens=1, progress=False)

    # ---- the checks -------------------------------------------------------------------------------------------------------
    def check(self, name: str, queries: Sequence[str], num_tokens: int) -> Row:
        """Answer queries alone and together, and compare with a forward of transformers in one piece.

        Returns:
            margin: by how much the logit of a token lies below the largest one, at most.
            tokens: of the queries together.
            allowed, ok: of the margin, and whether alone and together are as many tokens as were asked for.
        """
        alone = []
        for query in queries:
            self.prepare(name)
            alone += self.answer(name, [query], num_tokens)
        self.prepare(name)
        together = self.answer(name, queries, num_tokens)
        margin, whole = 0.0, True
        for query, *found in zip(queries, alone, together, strict=True):
            (request,) = self._hot.requests([query], policy=self.policy)
            for tokens in found:
                whole = whole and len(tokens) == num_tokens
                margin = max(margin, margin_of(answer_rows(self.model, request.prompt_ids, tokens), tokens))
        allowed = ALLOWED[self.model.dtype]
        return {"margin": margin, "allowed": allowed, "ok": whole and margin <= allowed, "tokens": together}

    def counters(self, queries: Sequence[str]) -> Row:
        """Rows run for the first token of each query, with the prompt in the store and without; `ok` when they are just those needed."""
        own = [self.own_tokens(query) for query in queries]
        charged: dict[str, list[int]] = {}
        for name in ("hot", "again"):
            charged[name] = []
            for query in queries:
                self.prepare(name)
                charged[name].append(self.complete(name, [query], 1)[0].stats.tokens_charged)
        constant = len(self.prefix)
        ok = charged["hot"] == own and charged["again"] == [constant + n for n in own]
        return {"own": own, "charged": charged, "ok": ok}


__all__ = ["ENGINES", "OURS", "OWN", "PREFIX", "THEIRS", "Engines", "bytes_needed", "constant_prompt", "kv_tokens"]
