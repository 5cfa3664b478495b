"""Token shifts of invented answers, in the form of TokenShift.to_json(); figures are counted from the tokens."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]
TEXTS = " I hope it helps and you paint the fence of baker with oil near river barn stands"
PIECES = (
    [(i, " " + word) for i, word in enumerate(TEXTS.split())]
    + [(90 + i, text) for i, text in enumerate("!,.")]
    + [(99, ".\n")]
)


def class_of(rank: int) -> str:
    return "unshifted" if rank == 1 else "marginal" if rank <= 3 else "shifted"


def token(piece: tuple[int, str], rank: int, base: Sequence[tuple[int, str, float]], aligned: float = -0.05) -> Json:
    """One token; `base` holds (id, text, probability of the base model), most likely first."""
    logprob = math.log(base[rank - 1][2]) if rank <= len(base) else -6.5
    return {
        "id": piece[0],
        "token": piece[1],
        "rank": rank,
        "class": class_of(rank),
        "logprob_base": logprob,
        "logprob_aligned": aligned,
        "kl": max(0.0, aligned - logprob) / 2,
        "candidates": [{"id": i, "token": text, "prob": p} for i, text, p in base],
    }


def answer(index: int, prompt: str, tokens: list[Json], finish_reason: str = "length") -> Json:
    text = "".join(item["token"] for item in tokens)
    return {"index": index, "prompt": prompt, "text": text, "finish_reason": finish_reason, "tokens": tokens}


def shift(answers: list[Json], base: str = "base", aligned: str = "aligned") -> Json:
    """The whole document around answers."""
    flat = [item for one in answers for item in one["tokens"]]
    longest = max((len(one["tokens"]) for one in answers), default=0)
    curve = []
    for t in range(longest):
        here = [one["tokens"][t] for one in answers if len(one["tokens"]) > t]
        curve.append({"position": t, "n": len(here), **_shares(here), "kl": _mean([item["kl"] for item in here])})
    seen = Counter((item["id"], item["token"]) for item in flat)
    shifted = Counter((item["id"], item["token"]) for item in flat if item["class"] == "shifted")
    most = [
        {"id": i, "token": text, "shifted": n, "seen": seen[i, text], "share": n / seen[i, text]}
        for (i, text), n in sorted(shifted.items(), key=lambda item: (-item[1], item[0]))
    ]
    summary = {
        "answers": len(answers),
        "positions": len(flat),
        **_shares(flat),
        "kl_mean": _mean([item["kl"] for item in flat]),
        "aligned_top_in_base_top5": _mean([item["rank"] <= 5 for item in flat]),
        "rank_mean": _mean([item["rank"] for item in flat]),
        "failed": 0,
    }
    return {
        "base": base,
        "aligned": aligned,
        "summary": summary,
        "curve": curve,
        "most_shifted": most,
        "answers": answers,
    }


def invented(count: int, length: int, candidates: int = 10, seed: int = 0) -> Json:
    """`count` answers of `length` tokens; shifts grow fewer with the position."""
    random_ = random.Random(seed)
    answers = []
    for index in range(count):
        tokens = []
        for t in range(length):
            pieces = random_.sample(PIECES, candidates + 1)
            base = [(i, text, 0.5 ** (k + 1)) for k, (i, text) in enumerate(pieces[:candidates])]
            rare = 0.06 + 0.4 * math.exp(-t / 6)
            rank = random_.choices([1, 2, 3, random_.randint(4, 60)], [1 - 2 * rare, rare / 2, rare / 2, rare])[0]
            piece = pieces[rank - 1] if rank <= candidates else pieces[-1]
            tokens.append(token(piece, rank, base, aligned=-random_.random()))
        answers.append(answer(index, f"Question {index}: how do I paint the fence of the baker?", tokens))
    return shift(answers)


def _shares(items: list[Json]) -> dict[str, float]:
    return {name: _mean([item["class"] == name for item in items]) for name in ("unshifted", "marginal", "shifted")}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
