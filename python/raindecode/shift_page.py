"""The page of a token shift: one HTML file that fetches nothing.

The template is templates/shift.html, style and script inside. The data stands in it as JSON in a short form: a table of the
(id, text) pairs that occur, and rows of numbers that point into it. Ten candidates for each of 64,000 tokens are some 9 MB so,
and a fifth of what they are as objects.
"""

from __future__ import annotations

import html
import json
import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from raindecode.errors import ConfigError
from raindecode.policy.prompt import template

_CLASSES: Final = {"unshifted": 0, "marginal": 1, "shifted": 2}
_TEXTS: Final = ("base", "aligned")
_LISTS: Final = ("curve", "most_shifted", "answers")
_SLOT: Final = re.compile(r"\{\{(\w+)\}\}")


def write_page(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write the page of a token shift, UTF-8, newlines as "\\n".

    Args:
        data: see render_page.

    Raises:
        ConfigError: see render_page; the file is not touched then.
        OSError: the file cannot be written.
    """
    page = render_page(data).encode()
    Path(path).write_bytes(page)


def render_page(data: Mapping[str, Any]) -> str:
    """The page of a token shift as one HTML document.

    Numbers are kept to six significant digits. Texts may hold anything, lone surrogates too: they stand escaped in the document
    and are shown as text only.

    Args:
        data: what `TokenShift.to_json()` returns.

    Raises:
        ConfigError: something of that is missing, or of another type.
    """
    _check(data)
    page = template("shift.html")
    base, aligned = (_escaped(data[key]) for key in _TEXTS)
    slots = {
        "csp": "; ".join(
            [
                "default-src 'none'",
                f"script-src {_hash_of('script', page)}",
                f"style-src {_hash_of('style', page)}",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        "base": base,
        "aligned": aligned,
        "shares": ", ".join(f"{_percent(data['summary'].get(name))} {name}" for name in _CLASSES),
        "data": _embedded(_packed(data)),
    }
    # One pass: what a slot is filled with is never looked at again.
    return _SLOT.sub(lambda slot: slots[slot[1]], page)


def _check(data: Mapping[str, Any]) -> None:
    kinds = dict.fromkeys(_TEXTS, str) | {"summary": Mapping} | dict.fromkeys(_LISTS, Sequence)
    for key, kind in kinds.items():
        if not isinstance(data, Mapping) or not isinstance(data.get(key), kind):
            given = type(data[key]).__name__ if isinstance(data, Mapping) and key in data else "nothing"
            raise ConfigError(
                f"the page's data has {given} as {key!r}, which is to be {kind.__name__}; "
                f"give it what TokenShift.to_json() returns: {', '.join(kinds)}"
            )


def _packed(data: Mapping[str, Any]) -> dict[str, Any]:
    pieces: dict[tuple[int, str], int] = {}

    def piece(item: Mapping[str, Any]) -> int:
        return pieces.setdefault((item["id"], item["token"]), len(pieces))

    def row(token: Mapping[str, Any]) -> list[Any]:
        candidates = [value for item in token["candidates"] for value in (piece(item), _short(item["prob"]))]
        numbers = [_short(token[key]) for key in ("logprob_base", "logprob_aligned", "kl")]
        return [piece(token), token["rank"], _CLASSES[token["class"]], *numbers, candidates]

    answers = []
    for i, answer in enumerate(data["answers"]):
        try:
            kept = {key: answer[key] for key in ("index", "prompt", "text", "finish_reason")}
            answers.append({**kept, "tokens": [row(token) for token in answer["tokens"]]})
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"answers[{i}] of the page's data does not have the form of TokenShift.to_json(): "
                f"{type(error).__name__} {error}; give it what that returns"
            ) from error
    return {
        **{key: data[key] for key in _TEXTS},
        "summary": _shortened(data["summary"]),
        **{key: [_shortened(item) for item in data[key]] for key in ("curve", "most_shifted")},
        "answers": answers,
        "pieces": list(pieces),
    }


def _shortened(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _short(value) if isinstance(value, float) else value for key, value in item.items()}


def _short(value: float | None) -> float | str | None:
    """Six significant digits; what JSON has no number for becomes a word, and no number stays none."""
    if value is None:
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _embedded(data: Any) -> str:
    """JSON that may stand in a script element: no character beyond ASCII, and none that could open or close a tag."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _escaped(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())


def _percent(share: Any) -> str:
    return f"{100 * share:.1f} %" if isinstance(share, (int, float)) else "unknown"


def _hash_of(tag: str, page: str) -> str:
    """The source expression that lets a Content-Security-Policy run the page's own <tag>, and no other."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    assert found is not None
    return f"'sha256-{b64encode(sha256(found[1].encode()).digest()).decode()}'"
