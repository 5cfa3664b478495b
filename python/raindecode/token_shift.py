"""Token-distribution shift: which tokens of an answer would the base model not have written, and what instead?

Source: Lin et al., The Unlocking Spell on Base LLMs, ICLR 2024 (arXiv 2312.01552), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from raindecode.shift_figure import save_curve
from raindecode.text import Codec

CLASSES: Final = ("unshifted", "marginal", "shifted")
"""Base rank 1; 2 or 3; more than 3."""

_MARGINAL = 3  # the largest rank of that class
_MOST_SHIFTED = 50  # tokens listed
_DIGITS = 6  # of numbers in to_json

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ShiftedAnswer:
    """One answer with what base and aligned model say about each of its T tokens; natural logarithms.

    Attributes:
        index: of its prompt.
        prompt: as given.
        text: the answer, without stop string and end-of-text token.
        finish_reason: "eos", "stop" or "length"; "given" where the answer was.
        token_ids: [T] int32, all that were generated: those of a stop string and the end-of-text token are among them.
        ranks: [T] int32 base rank η from 1: 1 + how many tokens the base model finds likelier; of equals the lower id comes first.
        logprob_base, logprob_aligned: [T] float32.
        kl: [T] float32 KL(aligned || base) of the next-token distributions.
        aligned_top_ranks: [T] int32 base rank of the aligned model's most likely token.
        candidate_ids: [T, top] int32, the base model's most likely tokens, most likely first.
        candidate_probs: [T, top] float32, their probabilities.
    """

    index: int
    prompt: str
    text: str
    finish_reason: str
    token_ids: Ints
    ranks: Ints
    logprob_base: Floats
    logprob_aligned: Floats
    kl: Floats
    aligned_top_ranks: Ints
    candidate_ids: Ints
    candidate_probs: Floats

    @property
    def classes(self) -> npt.NDArray[np.int8]:
        """[T] index into CLASSES of each token."""
        return classes_of(self.ranks)


def classes_of(ranks: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """Index into CLASSES of base ranks."""
    return (ranks > 1).astype(np.int8) + (ranks > _MARGINAL)


@dataclass(frozen=True, eq=False)
class TokenShift:
    """What alignment changed, token by token: the answers of one model as another one sees them.

    Attributes:
        base, aligned: what was compared, in words.
        answers: those that did not fail, by index.
        codec: the tokenizer's.
        errors: why prompts failed.
        model_steps: batched forwards of the whole analysis, those that wrote the answers included.
        seconds: wall time.
    """

    base: str
    aligned: str
    answers: Sequence[ShiftedAnswer]
    codec: Codec = field(repr=False)
    errors: tuple[BaseException, ...] = ()
    model_steps: int = 0
    seconds: float = 0.0

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Shares from 0 to 1 over all positions; None where there is no position.

        answers, positions, failed: how many. unshifted, marginal, shifted: shares, which add up to 1. kl_mean: nats per token.
        rank_mean: mean η. aligned_top_in_base_top5: how often the aligned model's most likely token is of the base's first five.
        """
        classes, kl = classes_of(self._all("ranks")), self._all("kl")
        counts = np.bincount(classes, minlength=len(CLASSES))
        return {
            "answers": len(self.answers),
            "positions": len(classes),
            **{name: _share(counts[i], len(classes)) for i, name in enumerate(CLASSES)},
            "kl_mean": _mean(kl),
            "aligned_top_in_base_top5": _mean(self._all("aligned_top_ranks") <= 5),
            "rank_mean": _mean(self._all("ranks")),
            "failed": len(self.errors),
        }

    @cached_property
    def curve(self) -> list[dict[str, Any]]:
        """By position from 0: how many answers have it, the share of each class among them, and their mean KL in nats."""
        if not self.answers:
            return []
        at = np.concatenate([np.arange(len(answer.ranks)) for answer in self.answers])
        classes, n = classes_of(self._all("ranks")), np.bincount(at)
        kl = np.bincount(at, weights=self._all("kl").astype(np.float64)) / n
        shares = [np.bincount(at[classes == i], minlength=len(n)) / n for i in range(len(CLASSES))]
        return [
            {"position": t, "n": int(n[t]), **{c: float(shares[i][t]) for i, c in enumerate(CLASSES)}, "kl": _finite(kl[t])}
            for t in range(len(n))
        ]  # fmt: skip

    @cached_property
    def most_shifted(self) -> list[dict[str, Any]]:
        """The tokens that are shifted most often, at most 50: how often each was shifted and seen. By count, then id."""
        ids, shifted = self._all("token_ids"), self._all("ranks") > _MARGINAL
        seen = np.bincount(ids)
        counts = np.bincount(ids[shifted], minlength=len(seen))
        order = np.argsort(-counts, kind="stable")[: min(_MOST_SHIFTED, np.count_nonzero(counts))]
        pieces = Pieces(self.codec)
        return [
            {
                "id": int(i), "token": pieces.named(int(i)), "shifted": int(counts[i]), "seen": int(seen[i]),
                "share": float(counts[i] / seen[i]),
            }
            for i in order
        ]  # fmt: skip

    def to_json(self, *, answers: bool = True) -> dict[str, Any]:
        """Plain data for json.dumps, the answers' tokens included unless that is turned off; numbers to 6 digits behind the point.

        A number that is not finite (the base model rules a token out) is None. Token texts joined give an answer's text and what was
        cut off it; a piece of a character is U+FFFD, and a special token "" there, but its name among candidates.
        """
        data: dict[str, Any] = {
            "base": self.base,
            "aligned": self.aligned,
            "summary": self.summary,
            "curve": self.curve,
            "most_shifted": self.most_shifted,
        }
        if answers:
            pieces = Pieces(self.codec)
            data["answers"] = [_answer_json(answer, pieces) for answer in self.answers]
        return data

    def plot(self, path: str | Path) -> None:
        """Draw shares and KL against the position into a .png, .svg or .pdf file.

        Raises:
            ConfigError: another suffix, or matplotlib is not installed.
            OSError: the file cannot be written.
        """
        save_curve(path, self.curve, CLASSES, f"{self.aligned} against {self.base}")

    def write_html(self, path: str | Path) -> None:
        """Write one page that needs nothing beside it: answers coloured by class, the base model's candidates, the summary.

        Raises:
            OSError: the file cannot be written.
        """
        from raindecode.shift_page import write_page

        write_page(path, self.to_json())

    def _all(self, name: str) -> npt.NDArray[Any]:
        """One quantity of every answer, one behind the other."""
        if not self.answers:
            return np.zeros(0, dtype=np.int32)
        return np.concatenate([getattr(answer, name) for answer in self.answers])


class Pieces:
    """Text that single tokens add to a text, by id."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._anchor = codec.encode("a")[-1:]  # an ordinary token, behind which none is at the start of a text
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """As answers show it: "" for a special token, U+FFFD for a piece of a character."""
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = self._codec.continuation(self._anchor, [token])
        return found

    def named(self, token: int) -> str:
        """As tables show it: a token without text has its name."""
        return self.text(token) or str(self._codec.tokenizer.convert_ids_to_tokens(token))


def _answer_json(answer: ShiftedAnswer, pieces: Pieces) -> dict[str, Any]:
    columns = zip(
        answer.token_ids.tolist(), answer.ranks.tolist(), answer.classes.tolist(),
        *(_rounded(values) for values in (answer.logprob_base, answer.logprob_aligned, answer.kl)),
        answer.candidate_ids.tolist(), _rounded(answer.candidate_probs), strict=True,
    )  # fmt: skip
    return {
        "index": answer.index,
        "prompt": answer.prompt,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": [
            {
                "id": token, "token": pieces.text(token), "rank": rank, "class": CLASSES[kind], "logprob_base": base,
                "logprob_aligned": aligned, "kl": kl,
                "candidates": [
                    {"id": i, "token": pieces.named(i), "prob": p} for i, p in zip(ids, probs, strict=True)
                ],
            }
            for token, rank, kind, base, aligned, kl, ids, probs in columns
        ],
    }  # fmt: skip


def _rounded(values: Floats) -> list[Any]:
    """As nested lists, None where a number is not finite."""
    rounded = np.round(values.astype(np.float64), _DIGITS)
    if np.isfinite(rounded).all():
        return list(rounded.tolist())
    return [_finite(value) if isinstance(value, float) else value for value in rounded.tolist()]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _share(count: int, of: int) -> float | None:
    return float(count / of) if of else None


def _mean(values: npt.NDArray[Any]) -> float | None:
    return _finite(float(np.mean(values, dtype=np.float64))) if len(values) else None


def summary_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A summary as rows of a table for people."""

    def percent(share: float | None) -> str:
        return "–" if share is None else f"{100 * share:.1f} %"

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    return [
        ("answers", f"{data['answers']:,}" + (f", {data['failed']:,} failed" if data["failed"] else "")),
        ("tokens", f"{data['positions']:,}"),
        ("unshifted (base rank 1)", percent(data["unshifted"])),
        ("marginal (2 or 3)", percent(data["marginal"])),
        ("shifted (more than 3)", percent(data["shifted"])),
        ("KL(aligned || base), nats per token", number(data["kl_mean"], 3)),
        ("mean base rank", number(data["rank_mean"], 2)),
        ("aligned top token in the base's top 5", percent(data["aligned_top_in_base_top5"])),
    ]
