"""A language model that is a hash: the logits after a token path depend on the path and a seed, and on nothing else.

`fake_decoder` puts it behind a real Decoder, where it replaces the forward and records every row that is run. The path of a
row is rebuilt from the attention plan and from what the recorder itself saw written to each slot, so the record owes nothing
to the engine's own accounts.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from raindecode.decoder import Decoder
from raindecode.engine.batch import TokenBatch
from raindecode.engine.engine import Engine
from raindecode.engine.kv_tree import KVTree
from raindecode.search.embedder import HiddenStates, TextEmbedder
from raindecode.search.evaluator import JudgeTemplate
from raindecode.search.rain import RAIN

Path = tuple[int, ...]
EOS, BOS, UNKNOWN = 0, 1, 2
_PIECES = ["</s>", "<s>", "_", *"abcdefghHABQU().,?:;!\n ", "ab", "gh", " c", ". ", "de,"]
HIDDEN = 16


class PieceTokenizer:
    """Longest-match pieces of characters; several spellings of one text exist, as with real tokenizers."""

    eos_token_id = EOS

    def __init__(self, pieces: Sequence[str] = _PIECES) -> None:
        self.pieces = list(pieces)
        self._ids = {piece: i for i, piece in enumerate(self.pieces) if i > BOS}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids, at = [BOS] if add_special_tokens else [], 0
        while at < len(text):
            for size in range(self._longest, 0, -1):
                piece = text[at : at + size]
                if piece in self._ids:
                    break
            ids.append(self._ids.get(piece, UNKNOWN))
            at += len(piece)
        return {"input_ids": ids}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, **_: Any) -> str:
        return "".join(self.pieces[i] for i in ids if i > BOS or not skip_special_tokens)


class HashLM:
    """Logits and hidden states named by a token path.

    Args:
        eos: logit bias of the end-of-text token.
        sharpness: standard deviation of the logits.
    """

    def __init__(
        self, seed: int = 0, *, eos: float = -1.0, sharpness: float = 2.0, vocabulary: int = len(_PIECES)
    ) -> None:
        self.seed, self.eos, self.sharpness, self.vocabulary = seed, eos, sharpness, vocabulary
        self._known: dict[Path, np.ndarray[Any, np.dtype[np.float32]]] = {}

    def logits(self, path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[vocabulary] float32 after `path`."""
        if path not in self._known:
            row = self._normal(b"logits", path, self.vocabulary) * self.sharpness
            row[EOS] += self.eos
            row[BOS] = -30.0
            self._known[path] = row.astype(np.float32)
        return self._known[path]

    def hidden(self, path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[HIDDEN] float32 at the last token of `path`: one direction in common, the rest by chance."""
        state = 0.5 * self._normal(b"hidden", path, HIDDEN)
        state[0] += 1.5 if len(path) % 3 else 0.5
        return state.astype(np.float32)

    def _normal(self, what: bytes, path: Path, size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        return hashed_normal(what + repr((self.seed, path)).encode(), size)


@dataclass
class Recorder:
    """Every row a ModelRunner ran, as the token path that ends with it."""

    lm: HashLM
    rows: list[Path] = field(default_factory=list)
    forwards: int = 0
    _at: dict[int, Path] = field(default_factory=dict)  # the path whose last token was written to a slot

    def paths(self, batch: TokenBatch) -> list[Path]:
        """Token path of each row of a batch, from the attention plan; checks that shared slots still hold that path."""
        plan = batch.plan
        slots, bounds = plan.slots.tolist(), plan.segment_slots_indptr.tolist()
        parents, own = plan.segment_parent.tolist(), batch.slot_mapping.tolist()
        tokens, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
        found: list[Path] = []
        for row, segment in enumerate(plan.row_segment.tolist()):
            below: list[list[int]] = []
            while segment >= 0:
                below.append(slots[bounds[segment] : bounds[segment + 1]])
                segment = parents[segment]
            visible = [slot for run in reversed(below) for slot in run][: positions[row] + 1]
            assert visible[-1] == own[row]
            path = (*self._at[visible[-2]], tokens[row]) if len(visible) > 1 else (tokens[row],)
            assert len(path) == positions[row] + 1
            for length, slot in enumerate(visible[:-1], 1):
                assert self._at[slot] == path[:length], "a slot was reused under a path that is still attended to"
            self._at[own[row]] = path
            found.append(path)
        return found


def fake_decoder(
    lm: HashLM | None = None, *, tokenizer: Any = None, kv_tokens: int = 1 << 14, context: int = 4096, **options: Any
) -> tuple[Decoder, Recorder]:
    """A Decoder over a HashLM, its engine fresh, and the record of what it runs."""
    lm = lm or HashLM()
    config = LlamaConfig(
        vocab_size=lm.vocabulary, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=context, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.train(False)
    decoder = Decoder(model, tokenizer or PieceTokenizer(), kv_tokens=kv_tokens, exact=False, **options)  # type: ignore[arg-type]
    runner = decoder.engine.runner
    recorder = Recorder(lm)

    def forward(batch: TokenBatch, wanted: Sequence[int]) -> Tensor:
        paths = recorder.paths(batch)
        recorder.rows += paths
        recorder.forwards += 1
        if runner.hidden is None:
            runner.hidden = torch.zeros(kv_tokens + 1, HIDDEN)
        for slot, path in zip(batch.slot_mapping.tolist(), paths, strict=True):
            runner.hidden[slot] = torch.from_numpy(lm.hidden(path))
        return torch.from_numpy(np.stack([lm.logits(paths[i]) for i in wanted or [0]]))

    runner.forward = forward  # type: ignore[method-assign]
    decoder.engine = Engine(runner, KVTree(kv_tokens + 1), max_tasks=decoder.engine.max_tasks)
    return decoder, recorder


def hashed_vectors(texts: list[str], spread: float, size: int = 8) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[n, size] float32: a common direction plus `spread` times noise named by the text."""
    return np.stack([np.eye(size)[0] + spread * hashed_normal(text.encode(), size) for text in texts]).astype(
        np.float32
    )


def hashed_normal(name: bytes, size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[size] numbers of mean 0 and variance 1 named by bytes: sums of four 16-bit words, the same wherever they are made."""
    words = np.frombuffer(hashlib.shake_128(name).digest(8 * size), dtype="<u2").reshape(size, 4)
    centred: np.ndarray[Any, np.dtype[np.float64]] = words.sum(1) / 65536.0 - 2.0
    return centred * math.sqrt(3.0)


def random_llama() -> LlamaForCausalLM:
    """A small Llama with peaked logits and the vocabulary of PieceTokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_PIECES), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=BOS, eos_token_id=EOS, initializer_range=0.4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.train(False)
    return model


def random_rain(seed: int) -> tuple[RAIN, HashLM, dict[str, Any]]:
    """RAIN settings, a language model and request options named by a seed; every part of the procedure comes up."""
    draw = random.Random(seed)
    judge = draw.choice(["both orders", "one order", "mixed", "bad", "bad", "good"])
    evaluator: Any = TEMPLATE if judge == "both orders" else replace(TEMPLATE, good_second=None)
    if judge in SCORES:
        evaluator = partial(hashed_scores, judge, seed)
    vectors = TextEmbedder(partial(hashed_vectors, spread=draw.choice([0.02, 0.06, 0.1, 0.2])), 8)
    samples = draw.choice([1, 2, 3, 9])
    rain = RAIN(
        evaluator=evaluator,
        embedder=draw.choice([HiddenStates(), HiddenStates(center=False), None, vectors, vectors, vectors]),
        set_lengths=draw.choice([(1, 2, 4, 10), (1, 2, 3), (1, 3)]),
        num_samples=samples,
        max_tries=draw.choice([samples, 2 * samples + 1]),
        dynamic_tries=draw.choice([1, 3]),
        top_k=draw.choice([3, 15, 20]),
        first_top_k=draw.choice([2, 3, 10]),
        expansion_temperature=draw.choice([1.0, 1.0, 2.0, 0.5]),
        rollout_stop=draw.choice([",.?:;\n", ",.?:;\n", ""]),
        max_iterations=draw.choice([8, 20, 50]),
        min_new_iterations=draw.choice([1, 5, 15]),
        min_visits=draw.choice([2, 6]),
        max_children=draw.choice([10, 20]),
        stop=draw.choice([(), ("\n",), ("ab",), ("cd", "\n")]),
        keep_after_last=draw.choice(["", "", "."]),
        record_tree=True,
    )
    options = {"max_new_tokens": draw.choice([7, 16, 25]), "stop_token_ids": draw.choice([(), (5,)]), "seed": seed}
    lm = HashLM(seed, eos=draw.choice([-2.0, 0.0, 1.5]), sharpness=draw.choice([1.0, 2.0, 4.0]))
    return rain, lm, options


TEMPLATE = JudgeTemplate("Q.\n\n", "H:{prompt}\nA:", "\n(A) g\n(B) b\n(", "\n(A) b\n(B) g\n(")
SCORES = {"mixed": (-1.0, -0.5, 0.0, 0.5, 1.0), "bad": (-1.0, -1.0, -1.0, -0.5), "good": (1.0, 1.0, 0.9, 0.0)}


def hashed_scores(kind: str, seed: int, pairs: list[tuple[str, str]]) -> list[float]:
    """An evaluator: a score per text, named by the text."""
    rows = [hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=4).digest() for _, text in pairs]
    return [SCORES[kind][int.from_bytes(row, "little") % len(SCORES[kind])] for row in rows]
