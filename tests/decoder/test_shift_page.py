"""The page of a token shift as a document: what stands in it, and that no text of a model gets out of its place."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from shift_example import Json, answer, invented, shift, token

from raindecode.errors import ConfigError
from raindecode.shift_page import render_page, write_page

_CLASSES = ("unshifted", "marginal", "shifted")
NASTY = [
    "</script><script>alert(1)</script>",
    "<!--",
    "<!-- <script>",
    "-->",
    "<img src=x onerror=alert(1)>",
    "\"'`&amp;&quot;\\",
    "\u2028\u2029\x00\x1b\t\r\n",
    "{{data}}{{csp}}{{base}}",
    "\ud800 alone, \udfff too",
    "\u202eright to left",
    "🌧️\ufffd",
    "",
]


class Elements(HTMLParser):
    """What an HTML parser sees: elements with their attributes, and the text in each script, style and title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, dict[str, str | None], str]] = []
        self.inside: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside = self.found[-1]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ("", {})

    def handle_data(self, data: str) -> None:
        self.texts.append((*self.inside, data))

    def text(self, tag: str, **attributes: str) -> str:
        return "".join(data for name, has, data in self.texts if name == tag and attributes.items() <= has.items())


def unpacked(page: str) -> Json:
    """The data that stands in the page, back in the form it was given in."""
    data = json.loads(Elements(page).text("script", id="data"))
    pieces = data.pop("pieces")

    def item(at: int) -> Json:
        return dict(zip(("id", "token"), pieces[at], strict=True))

    for one in data["answers"]:
        tokens = []
        for at, rank, kind, base, aligned, kl, flat in one["tokens"]:
            candidates = [{**item(c), "prob": p} for c, p in zip(flat[::2], flat[1::2], strict=True)]
            numbers = {
                "rank": rank,
                "class": _CLASSES[kind],
                "logprob_base": base,
                "logprob_aligned": aligned,
                "kl": kl,
            }
            tokens.append({**item(at), **numbers, "candidates": candidates})
        one["tokens"] = tokens
    return data


def same(left: Any, right: Any) -> bool:
    """Equal, floats to six digits."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-5)
    return type(left) is type(right) and left == right


@pytest.fixture
def nasty() -> Json:
    """Every nasty text as prompt, token, candidate and reason."""
    base = [(i, text, 0.5 ** (i + 1)) for i, text in enumerate(NASTY)]
    tokens = [token((i, text), i + 1, base) for i, text in enumerate(NASTY)]
    return shift([answer(i, text, tokens, finish_reason=text) for i, text in enumerate(NASTY)])


def test_the_data_is_in_the_page() -> None:
    given = invented(7, 9, candidates=4)
    assert same(unpacked(render_page(given)), given)


def test_the_data_given_is_left_alone() -> None:
    given = invented(2, 3)
    before = copy.deepcopy(given)
    render_page(given)
    assert given == before


def test_texts_of_models_come_through_unchanged(nasty: Json) -> None:
    assert same(unpacked(render_page(nasty)), nasty)


def test_texts_of_models_add_no_element(nasty: Json) -> None:
    plain, page = (Elements(render_page(data)) for data in (invented(1, 1), nasty))
    without_policy = [[item for item in parsed.found if item[0] != "meta"] for parsed in (plain, page)]
    assert without_policy[0] == without_policy[1]
    assert [tag for tag, _ in page.found].count("script") == 2


@pytest.mark.parametrize("text", NASTY)
def test_labels_are_escaped(text: str) -> None:
    data = shift([], base=text, aligned=text)
    page = render_page(data)
    assert [tag for tag, _ in Elements(page).found] == [tag for tag, _ in Elements(render_page(shift([]))).found]
    assert same(unpacked(page), data)
    title = Elements(page).text("title")
    # An HTML parser reads "\r" as a newline; a lone surrogate has no UTF-8.
    shown = text.encode("utf-8", "replace").decode()
    assert title.replace("\r\n", "\n") == f"Token shift: {shown} against {shown}".replace("\r\n", "\n")


def test_nothing_is_fetched(nasty: Json) -> None:
    for data in (nasty, invented(3, 4)):
        page = render_page(data)
        assert "http:" not in page
        assert "https:" not in page
        assert "//" not in re.sub(r"(?m)(^|  )//.*$", "", page)  # comments apart
        for tag, attributes in Elements(page).found:
            assert tag not in {"iframe", "object", "embed", "base", "img", "form"}
            assert "src" not in attributes
            assert attributes.get("href", "data:,") == "data:,"


def test_only_the_page_s_own_script_and_style_may_run(nasty: Json) -> None:
    page = Elements(render_page(nasty))
    policy = next(has["content"] for tag, has in page.found if has.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    script = page.text("script").removeprefix(page.text("script", id="data"))
    for rule, text in (("script-src", script), ("style-src", page.text("style"))):
        assert rules.pop(rule) == f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


def test_the_page_tells_its_language_and_outline() -> None:
    found = Elements(render_page(shift([]))).found
    assert ("html", {"lang": "en"}) in found
    assert [tag for tag, _ in found if tag in {"h1", "h2"}] == ["h1", *["h2"] * 4]
    names = {has.get("name"): has.get("content") for tag, has in found if tag == "meta"}
    assert names["color-scheme"] == "light dark"
    assert names["viewport"] == "width=device-width, initial-scale=1"
    labelled = [has["aria-labelledby"] for tag, has in found if tag == "section"]
    assert labelled == [has["id"] for tag, has in found if tag == "h2"]


def test_texts_are_never_read_as_markup() -> None:
    script = Elements(render_page(shift([]))).text("script")
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert name not in script


def test_numbers_that_json_has_not() -> None:
    given = invented(1, 2)
    given["summary"]["kl_mean"] = math.inf
    given["answers"][0]["tokens"][0]["logprob_base"] = -math.inf
    given["answers"][0]["tokens"][1]["kl"] = math.nan
    found = unpacked(render_page(given))
    assert found["summary"]["kl_mean"] == "inf"
    assert found["answers"][0]["tokens"][0]["logprob_base"] == "-inf"
    assert found["answers"][0]["tokens"][1]["kl"] == "nan"


def test_numbers_that_are_missing() -> None:
    """TokenShift.to_json() has None where a number is not finite."""
    given = invented(1, 2)
    given["summary"]["kl_mean"] = given["curve"][0]["kl"] = None
    for key in ("logprob_base", "kl"):
        given["answers"][0]["tokens"][0][key] = None
    given["answers"][0]["tokens"][0]["candidates"][0]["prob"] = None
    assert same(unpacked(render_page(given)), given)


def test_without_scripts_the_shares_are_told() -> None:
    given = shift([answer(0, "q", [token((0, "a"), rank, [(0, "a", 0.5)]) for rank in (1, 1, 1, 1, 1, 2, 9, 9)])])
    assert "62.5 % unshifted, 12.5 % marginal, 25.0 % shifted" in render_page(given)


@pytest.mark.parametrize("key", ["base", "aligned", "summary", "curve", "most_shifted", "answers"])
def test_missing_parts_are_named(key: str) -> None:
    data = invented(1, 1)
    del data[key]
    with pytest.raises(ConfigError, match=f"nothing as '{key}'.*to_json"):
        render_page(data)
    with pytest.raises(ConfigError, match=f"int as '{key}'.*to_json"):
        render_page({**data, key: 3})


@pytest.mark.parametrize("change", [{"class": "odd"}, {"candidates": None}, {"candidates": [{"id": 1}]}])
def test_a_broken_token_is_told_with_its_answer(change: Json) -> None:
    data = invented(3, 2)
    data["answers"][2]["tokens"][1].update(change)
    with pytest.raises(ConfigError, match=r"answers\[2\].*to_json"):
        render_page(data)


def test_a_page_that_cannot_be_made_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(ConfigError):
        write_page(path, {})
    assert path.read_text() == "before"


def test_the_file_is_the_page(tmp_path: Path, nasty: Json) -> None:
    path = tmp_path / "page.html"
    write_page(path, nasty)
    assert path.read_bytes() == render_page(nasty).encode()
    with pytest.raises(OSError, match="missing"):
        write_page(tmp_path / "missing" / "page.html", nasty)
