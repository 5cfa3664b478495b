"""The page of a token shift in a real browser: headless Chromium, driven by playwright."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "decoder"))
from browsing import CONTRAST, DESKTOP, PHONE, Windows
from shift_example import Json, answer, invented, shift, token

from raindecode.shift_page import write_page

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><!-- \u2028 \ud800"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def data() -> Json:
    """Twelve answers, the second hostile, the third with newlines, the last without tokens."""
    data = invented(12, 24)
    base = [(7, HOSTILE, 0.5), (8, " plain", 0.25), (9, "", 3e-7)]
    data["answers"][1] = answer(1, HOSTILE, [token((7, HOSTILE), 1, base), token((8, " plain"), 2, base)])
    data["answers"][2]["tokens"][4] = token((50, ".\n\n"), 9, [(0, " I", 0.9), (50, ".\n\n", 1e-6)])
    data["answers"][2]["tokens"][5] = token((51, "x" * 400), 1, [(51, "x" * 400, 0.9)])
    data["answers"][11] = answer(11, "Say nothing.", [], finish_reason="eos")
    return shift(data["answers"], base="a base " * 12, aligned=HOSTILE)


@pytest.fixture(scope="module")
def path(data: Json, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "shift.html"
    write_page(path, data)
    return path


@pytest.fixture(scope="module")
def opened(windows: Windows, path: Path) -> Open:
    """Open a page; at the end it has asked for nothing and complained of nothing."""

    @contextmanager
    def open_(file: Path = path, **settings: Any) -> Iterator[Any]:
        told: list[str] = []
        asked: list[str] = []
        with windows.watched(told, asked, **settings) as page:
            page.goto(file.as_uri())
            yield page
            assert page.title().startswith("Token shift: ")
        assert told == []
        assert file.as_uri() in asked
        assert [url for url in asked if url != file.as_uri() and not url.startswith("data:")] == []

    return open_


def article(page: Any, index: int) -> Any:
    """The article of an answer, on the screen and drawn."""
    found = page.locator(".answer").nth(index)
    found.scroll_into_view_if_needed()
    found.locator(".tokens").wait_for(state="attached")
    return found


def rows(page: Any) -> list[list[str]]:
    """What the tooltip shows as candidates: text and probability."""
    assert page.locator("#tip").is_visible()
    return page.eval_on_selector_all(
        "#tip tbody tr", "(all) => all.map((one) => [...one.cells].map((cell) => cell.textContent))"
    )


def shown(text: str) -> str:
    return text.replace("\n", "↵").replace(" ", "␣") or "∅"


def percent(share: float, digits: int = 1) -> str:
    """As JavaScript rounds: what lies in the middle goes up."""
    return f"{Decimal(100 * share).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)}\u00a0%"


def expected(item: Json) -> list[list[str]]:
    """The candidates of a token as the tooltip is to show them; for ordinary texts and probabilities."""
    return [
        [shown(c["token"]) + (" (answered)" if c["id"] == item["id"] else ""), percent(c["prob"], digits)]
        for c in item["candidates"]
        for digits in (1 + (c["prob"] < 0.0995),)
    ]


def check_tip(page: Any, item: Json) -> None:
    """The tooltip is that of this token, whole and inside the window."""
    assert rows(page) == expected(item)
    text = page.locator("#tip").inner_text()
    assert f"{shown(item['token'])} {item['class']}, rank {item['rank']}" in text
    for key in ("logprob_base", "logprob_aligned"):
        assert f"{item[key]:.3f}".replace("-", "−") in text
    assert f"KL {item['kl']:.3f} nats" in text
    box, size = page.locator("#tip").bounding_box(), page.viewport_size
    assert box["x"] >= 0
    assert box["y"] >= 0
    assert box["x"] + box["width"] <= size["width"]
    assert box["y"] + box["height"] <= size["height"]


def test_the_summary_tells_the_data(opened: Open, data: Json) -> None:
    with opened(**DESKTOP) as page:
        told = page.eval_on_selector_all(
            "dd", "(all) => Object.fromEntries(all.map((one) => [one.dataset.of, one.textContent]))"
        )
        of = data["summary"]
        assert told == {
            **{name: percent(of[name]) for name in ("unshifted", "marginal", "shifted", "aligned_top_in_base_top5")},
            "answers": "12",
            "positions": str(of["positions"]),
            "kl_mean": f"{of['kl_mean']:.3f}",
            "rank_mean": f"{of['rank_mean']:.1f}",
        }
        widths = page.eval_on_selector_all("#bar > *", "(all) => all.map((one) => one.getBoundingClientRect().width)")
        for width, name in zip(widths, ("unshifted", "marginal", "shifted"), strict=True):
            assert abs(width / sum(widths) - of[name]) < 0.01
        most = page.eval_on_selector_all(
            "#most tbody tr", "(all) => all.map((one) => [...one.cells].map((c) => c.textContent))"
        )
        assert most == [
            [shown(t["token"]), str(t["shifted"]), str(t["seen"]), percent(t["share"])]
            for t in data["most_shifted"][:25]
        ]


def test_the_curve_is_drawn_to_scale(opened: Open, data: Json) -> None:
    with opened(**DESKTOP) as page:
        for place, key in (("#shares", "shifted"), ("#shares", "marginal"), ("#kl", "kl")):
            drawn = page.eval_on_selector_all(
                f"{place} .dot.{key}", "(all) => all.map((one) => [+one.getAttribute('cx'), +one.getAttribute('cy')])"
            )
            values = [point[key] for point in data["curve"]]
            assert len(drawn) == len(values) == 24
            high, low = max(range(24), key=values.__getitem__), min(range(24), key=values.__getitem__)
            scale = (drawn[low][1] - drawn[high][1]) / (values[high] - values[low])
            assert scale > 0
            for i, (x, y) in enumerate(drawn):
                assert abs(y - drawn[low][1] + scale * (values[i] - values[low])) < 0.01
                assert abs(x - drawn[0][0] - i * (drawn[23][0] - drawn[0][0]) / 23) < 0.01
        page.locator("#values summary").click()
        assert page.locator("#values tbody tr").count() == 24


def test_hover_shows_the_candidates_of_that_token(opened: Open, data: Json) -> None:
    with opened(**DESKTOP) as page:
        here = article(page, 0)
        assert page.locator("#tip").is_hidden()
        for i in (0, 7, 23):
            here.locator(".t").nth(i).hover()
            check_tip(page, data["answers"][0]["tokens"][i])
        page.mouse.move(5, 5)
        page.locator("#tip").wait_for(state="hidden")


def test_tokens_look_like_their_class(opened: Open, data: Json) -> None:
    with opened(**DESKTOP) as page:
        found = (
            article(page, 0)
            .locator(".t")
            .evaluate_all(
                "(all) => all.map((one) => getComputedStyle(one))"
                ".map((s) => [s.backgroundColor, s.textDecorationLine, s.textDecorationStyle])"
            )
        )
        seen: dict[str, set[tuple[str, ...]]] = {}
        for look, item in zip(found, data["answers"][0]["tokens"], strict=True):
            seen.setdefault(item["class"], set()).add(tuple(look))
        lines = {name: [look[1:] for look in looks] for name, looks in seen.items()}
        assert lines == {
            "unshifted": [("none", "solid")],
            "marginal": [("underline", "dotted")],
            "shifted": [("underline", "solid")],
        }
        assert len({look[0] for looks in seen.values() for look in looks}) == 3


def test_keys_show_and_move(opened: Open, data: Json) -> None:
    with opened(**DESKTOP) as page:
        article(page, 0)
        tokens = data["answers"][0]["tokens"]
        page.locator("#search").focus()
        page.keyboard.press("Tab")
        check_tip(page, tokens[0])
        focused = page.locator(":focus")
        assert focused.evaluate("(one) => getComputedStyle(one).outlineStyle") == "solid"
        assert focused.get_attribute("aria-describedby") == "tip"
        for key, at in (
            ("ArrowRight", 1),
            ("ArrowRight", 2),
            ("ArrowLeft", 1),
            ("End", 23),
            ("ArrowRight", 23),
            ("Home", 0),
        ):
            page.keyboard.press(key)
            check_tip(page, tokens[at])
        marked = [i for i, item in enumerate(tokens) if item["class"] != "unshifted" and i > 0]
        for key, at in (("n", marked[0]), ("n", marked[1]), ("p", marked[0])):
            page.keyboard.press(key)
            check_tip(page, tokens[at])
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()
        page.keyboard.press("Tab")  # one stop per answer
        assert page.locator(":focus").evaluate(
            "(one) => one.closest('.answer') === document.querySelectorAll('.answer')[1]"
        )


def test_a_tap_shows_and_another_hides(opened: Open, data: Json) -> None:
    with opened(**PHONE) as page:
        here = article(page, 5)
        for i in (0, 11, 23):
            here.locator(".t").nth(i).tap()
            check_tip(page, data["answers"][5]["tokens"][i])
        here.locator("h3").evaluate("(one) => one.click()")
        assert page.locator("#tip").is_hidden()


@pytest.mark.parametrize("settings", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_window(opened: Open, data: Json, settings: Json) -> None:
    with opened(**settings) as page:
        page.locator("#values summary").click()
        for i in range(12):
            article(page, i)
        root = "document.documentElement"
        assert (
            page.evaluate(f"{root}.scrollWidth")
            == page.evaluate(f"{root}.clientWidth")
            == settings["viewport"]["width"]
        )
        edges = "(all) => all.map((one) => one.getBoundingClientRect().right)"
        assert max(page.eval_on_selector_all(".answer *, dl *, h1, svg", edges)) <= settings["viewport"]["width"]


def test_newlines_are_seen_and_break_the_line(opened: Open, data: Json) -> None:
    with opened(**DESKTOP) as page:
        tokens = article(page, 2).locator(".t")
        assert tokens.nth(4).inner_text().startswith(".↵\n↵")
        lines = [tokens.nth(i).evaluate("(one) => one.getClientRects()[0].top") for i in (4, 5)]
        assert lines[1] - lines[0] > 2 * 16
        tokens.nth(4).hover()
        assert rows(page) == [["␣I", "90.0\u00a0%"], [".↵↵ (answered)", "1.0e−6"]]


def test_texts_stay_texts(opened: Open) -> None:
    with opened(**DESKTOP) as page:
        here = article(page, 1)
        assert page.locator("img").count() == 0
        text = "</script><img src=x onerror=\"document.title='broken'\"><!-- ↵\n "
        assert here.locator(".prompt").evaluate("(one) => one.textContent").startswith(text)
        assert here.locator(".t").first.evaluate("(one) => one.textContent").startswith(text)
        here.locator(".t").first.hover()
        assert [line[1] for line in rows(page)] == ["50.0\u00a0%", "25.0\u00a0%", "3.0e−7"]
        assert page.locator("#tip img").count() == 0
        assert article(page, 11).locator(".tokens").inner_text() == "No tokens."


def test_filter_and_search(opened: Open, data: Json) -> None:
    with opened(**DESKTOP) as page:
        visible = page.locator(".answer:visible")
        assert page.locator("#count").inner_text() == "12 of 12 answers"
        page.locator("#which").select_option("shifted")
        having = [one for one in data["answers"] if any(item["class"] == "shifted" for item in one["tokens"])]
        assert 0 < len(having) < 12
        assert visible.count() == len(having)
        page.locator("#which").select_option("all")
        page.locator("#search").fill("SAY NOTHING")
        assert visible.locator("h3").all_inner_texts() == ["Answer 11"]
        assert page.locator("#count").inner_text() == "1 of 12 answers"


def test_both_colour_schemes_can_be_read(opened: Open) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        with opened(**DESKTOP, color_scheme=scheme) as page:
            article(page, 0).locator(".t").first.hover()
            backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            for selector in (
                "h1",
                "p",
                "dt",
                "dd",
                "th",
                "td",
                "svg text",
                ".prompt",
                ".small",
                ".t.m",
                ".t.s",
                ".t",
                "#tip *",
                "select, input",
            ):
                found = page.evaluate(CONTRAST, selector)
                assert found, selector
                assert min(found) >= 4.5, (scheme, selector)
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(21, 23, 27)"]


def test_a_thousand_answers(opened: Open, tmp_path: Path) -> None:
    data = invented(1000, 64, candidates=3)
    path = tmp_path / "many.html"
    write_page(path, data)
    with opened(path, **DESKTOP) as page:
        assert page.locator(".answer").count() == 1000
        item = data["answers"][0]["tokens"][63]
        article(page, 0).locator(".t").nth(63).hover()
        check_tip(page, item)
        drawn = "document.querySelectorAll('.tokens').length"
        assert 1 <= page.evaluate(drawn) < 100  # as they come near
        last = article(page, 999)
        last.locator(".t").nth(5).hover()
        check_tip(page, data["answers"][999]["tokens"][5])
        assert 2 <= page.evaluate(drawn) < 200  # not those in between
