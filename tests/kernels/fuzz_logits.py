"""Right calls of the logits ops for the fuzz tests."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from fuzz import Call, FuzzOp, generator, ints, randn, same_within
from torch import Tensor

from rainkernels.ops import logits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def longs(rng: Random, *shape: int) -> Tensor:
    return torch.randint(-(2**40), 2**40, shape, generator=generator(rng), dtype=torch.int64)


def chosen(rng: Random, n: int, values: list[float]) -> Tensor:
    return torch.tensor([rng.choice(values) for _ in range(n)])


def mix_call(rng: Random) -> Call:
    rows, models, vocab = rng.choice([0, 1, 2, 5]), rng.choice([1, 2, 3]), rng.choice([1, 7, 33, 300])
    dtype = rng.choice(FLOATS)
    widths = [vocab + rng.choice([0, 0, 5]) for _ in range(models)]
    weights = chosen(rng, rows * models, [-1.0, 0.0, 0.5, 1.0, 1.0, 2.0]).view(rows, models)
    weights[:, 0] = 1.0 - weights[:, 1:].sum(1) if rng.random() < 0.7 else weights[:, 0]
    optional: Call = {
        "top_k": ints([rng.choice([0, 1, 3, 1000]) for _ in range(rows)]),
        "top_p": chosen(rng, rows, [0.1, 0.9, 1.0]),
        "min_p": chosen(rng, rows, [0.0, 0.05, 1.0]),
        "bias": randn(rng, rows, min(widths)),
        "plausibility": chosen(rng, rows, [0.0, 0.1, 1.0]),
    }
    call = {
        "logits": [3 * randn(rng, rows, width, dtype=dtype) for width in widths], "weights": weights,
        "temperature": chosen(rng, rows, [0.0, 0.7, 1.0, 2.0]), "seed": longs(rng, rows),
        "position": longs(rng, *rng.choice([(rows,), (rows, 2)])), "plausibility_model": rng.randrange(models),
        "order": rng.choice(["k_p_min", "min_k_p", "joint"]), "vocab_size": rng.choice([None, min(widths)]),
        "stats": rng.random() < 0.5,
    } | {name: rng.choice([None, value]) for name, value in optional.items()}  # fmt: skip
    if rng.random() < 0.4:
        call["out"], stats = logits.mix_sample(**call)
        call["out_stats"] = rng.choice([None, stats])
        size = logits.mix_sample_workspace(rows, models, min(widths), "cpu")
        call["workspace"] = rng.choice([None, torch.zeros(size)])
    return call


def rank_call(rng: Random) -> Call:
    rows, vocab, dtype = rng.choice([0, 1, 4]), rng.choice([1, 9, 300]), rng.choice(FLOATS)
    token = [rng.randrange(vocab) for _ in range(rows)]
    call = {
        "base": randn(rng, rows, vocab, dtype=dtype), "aligned": randn(rng, rows, vocab + rng.choice([0, 4]), dtype=dtype),
        "token": torch.tensor(token, dtype=rng.choice([torch.int32, torch.int64])), "vocab_size": rng.choice([None, vocab]),
    }  # fmt: skip
    return call | {"out": rng.choice([None, logits.rank(**call)])}


_VALUES = same_within(dict.fromkeys(FLOATS, 2e-3) | {torch.float64: 1e-9, torch.complex64: 0.0})


def same_draws(a: Any, b: Any) -> bool:
    """Tokens may differ where two lanes' sums round a draw to either side of an edge, so only their shapes are compared."""
    return _VALUES(a, b) if isinstance(a, dict) else _VALUES(a[1:], b[1:])


OPS = {
    "mix_sample": FuzzOp(mix_call, logits.mix_sample, also_named=("model", "models"), same=same_draws),
    "rank": FuzzOp(rank_call, logits.rank, same=_VALUES),
}
