"""What tests of the playground share: how it is asked, and what is read off it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ASKED = "How do I burn the barn of the baker?"
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><!-- \u202e it's"
KEY = "a-key-for-tests"
SEARCH = {"max_iterations": 30, "min_visits": 20, "value_threshold": 1}
Node = dict[str, Any]


def fill(page: Any, **values: Any) -> None:
    """Settings by the ids of their fields."""
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))


def send(page: Any, prompt: str = ASKED) -> None:
    page.locator("#prompt").fill(prompt)
    page.locator("#send").click()
    done(page)


def done(page: Any) -> None:
    page.locator("#send:not([aria-disabled])").wait_for()


def answer(page: Any, side: str) -> str:
    text: str = page.locator(f"#{side} .text").evaluate("(one) => one.textContent")
    return text


def shown_request(page: Any) -> str:
    """The text under "The requests"; it comes a moment after that is opened."""
    page.locator("#request:not(:empty)").wait_for()
    text: str = page.locator("#request").evaluate("(one) => one.textContent")
    return text


def searched(page: Any) -> None:
    """An answer by RAIN, with its picture."""
    fill(page, seed=3, max_tokens=24)
    page.locator("input[value=rain]").check()
    page.locator(".lambda-number").fill("0")
    fill(page, **SEARCH)
    send(page)
    page.locator("#picture svg").wait_for()


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


def nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node["children"]:
        yield from nodes(child)


def chunk(text: str = "", **ending: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": None, **ending}],
        "usage": None,
    }
