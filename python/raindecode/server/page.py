"""The playground: one HTML document, joined from the files of playground/. It calls this server's API and nothing else."""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import Final, NamedTuple

_SCRIPTS: Final = ("dom.js", "ask.js", "layout.js", "tree.js", "form.js", "app.js")


class Page(NamedTuple):
    """A document and the Content-Security-Policy it is served with.

    Attributes:
        html: the document.
        policy: allows its own style and script by their hashes, and requests to the server it came from.
    """

    html: str
    policy: str


@cache
def playground() -> Page:
    """The page served at "/". Read once."""
    style = _text("style.css")
    script = "\n".join(_text(name) for name in _SCRIPTS)
    html = _text("page.html").replace("{{style}}", style).replace("{{script}}", script)
    policy = "; ".join([
        "default-src 'none'", f"style-src {_hash(style)}", f"script-src {_hash(script)}", "connect-src 'self'", "img-src data:",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    ])  # fmt: skip
    return Page(html, policy)


def _text(name: str) -> str:
    return resources.files("raindecode.server").joinpath("playground", name).read_text(encoding="utf-8").rstrip("\n")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
