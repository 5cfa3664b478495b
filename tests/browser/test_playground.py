"""The playground asks a real server of the testbed: settings, streams, mistakes, keys."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsing import DESKTOP, Windows
from playing import (
    ASKED,
    KEY,
    answer,
    chunk,
    done,
    fill,
    send,
    shown_request,
)

from raindecode import URIAL, AlignEZ, Decoder, DeRa, Policy, Sampling
from raindecode.server.page import playground

Open = Callable[..., Any]
Served = Any  # serving.Served; its module needs the server's packages


def test_both_answers_stream_and_are_what_python_says(opened: Open, reference: Decoder) -> None:
    with opened() as page:
        fill(page, seed=7, max_tokens=24, temperature=0.9)
        page.locator(".lambda-number").fill("0.5")
        page.evaluate(
            """() => { window.seen = { vanilla: [], aligned: [] };
            for (const side in window.seen) new MutationObserver(() => window.seen[side].push(
              document.querySelector(`#${side} .text`).textContent)).observe(
              document.querySelector(`#${side} .text`), { characterData: true, subtree: true }); }"""
        )
        send(page)
        seen = page.evaluate("window.seen")
        shown = page.eval_on_selector_all(
            "#numbers tbody tr",
            "(all) => all.map((row) => [...row.cells].map((cell) => cell.firstChild.textContent))",
        )
        table = {row[0]: row[1:] for row in shown}
        for column, (side, weight) in enumerate((("vanilla", 0.0), ("aligned", 0.5))):
            (made,) = reference.generate(
                [ASKED], search=Sampling(temperature=0.9), policy=Policy(dera=DeRa(weight)), seed=7, max_new_tokens=24
            )
            assert answer(page, side) == made.text
            states = [text for text in seen[side] if text]
            assert len(set(states)) > 1
            assert all(made.text.startswith(text) for text in states)
            assert page.locator(f"#{side} .text").get_attribute("aria-busy") is None
            assert page.locator(f"#{side} .spoken").inner_text().endswith(made.text.strip())
            assert table["Answer's tokens"][column] == str(len(made.token_ids))
            assert table["Tokens processed"][column] == str(made.stats.tokens_processed)
            assert float(table["Whole answer after"][column].removesuffix(" s")) > 0
        assert page.locator("#search").is_hidden()


def test_what_is_set_is_what_is_sent_and_shown(opened: Open, reference: Decoder, edit_file: Path) -> None:
    prompt = "What's \"that\"?\nA $HOME \\ of the baker's"
    with opened() as page:
        sent: list[dict[str, Any]] = []
        page.on("request", lambda one: one.post_data and sent.append(json.loads(one.post_data)))
        fill(page, seed=11, max_tokens=9, temperature=0.5)
        slider = page.locator(".slider input[type=range]")
        slider.focus()
        for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
        page.locator(".edit-box").check()
        page.locator(".edit-strength").fill("0.5")
        page.locator("#urial").select_option("default")
        assert (
            page.locator("#methods").inner_text() == "Sampling · λ = 0.15 · edit nudge × 0.5 · constant prompt default."
        )
        assert page.locator("#request-state").inner_text().startswith("Not sent yet")
        send(page, prompt)
        align = {
            "search": "sampling",
            "dera": 0.15,
            "edits": [{"name": "nudge", "strength": 0.5, "on": "reference"}],
            "urial": "default",
        }
        common = {
            "model": "testbed", "messages": [{"role": "user", "content": prompt}], "max_tokens": 9, "temperature": 0.5, "seed": 11,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        vanilla = {**common, "align": {"search": "sampling", "dera": 0, "edits": [], "urial": False}}
        aligned = {**common, "align": align}
        assert sorted(sent, key=str) == sorted([vanilla, aligned], key=str)
        policy = Policy(dera=DeRa(0.15), edits=[AlignEZ.load(edit_file, strength=0.5)], prompt=URIAL.testbed())
        (made,) = reference.generate(
            [prompt], search=Sampling(temperature=0.5), policy=policy, seed=11, max_new_tokens=9
        )
        assert answer(page, "aligned") == made.text

        for side, body in (("aligned", aligned), ("vanilla", vanilla)):
            page.locator("#request-side").select_option(side)
            page.locator("#request-form").select_option("json")
            assert json.loads(shown_request(page)) == body
            assert page.locator("#request-state").inner_text().startswith("This was sent at ")
            page.locator("#request-form").select_option("curl")
            words = shlex.split(shown_request(page))
            assert words[:2] == ["curl", "-N"]
            assert words[2].endswith("/v1/chat/completions")
            assert json.loads(words[words.index("-d") + 1]) == body
        page.locator("#copy").click()
        page.locator("#copied:not(:empty)").wait_for()
        page.locator("#temperature").fill("0.6")
        assert page.locator("#request-state").inner_text().startswith("Not sent yet")


def test_rain_is_asked_for_with_its_settings(opened: Open) -> None:
    with opened() as page:
        assert page.locator("#rain").is_hidden()
        page.locator("input[value=rain]").check()
        fill(page, max_iterations=5, min_visits=1, value_threshold=-0.5, c_puct=1.5, max_children=12, top_k=7)
        page.locator("#preset").select_option("town")
        page.locator("#prompt").fill(ASKED)
        body = json.loads(shown_request(page))
        rain = {
            "max_iterations": 5,
            "min_visits": 1,
            "value_threshold": -0.5,
            "c_puct": 1.5,
            "max_children": 12,
            "top_k": 7,
        }
        assert body["align"]["search"] == "rain"
        assert body["align"]["rain"] == {"tree": True, "preset": "town", **rain}
        assert "temperature" not in body


def test_the_form_starts_as_the_server_aligns(opened: Open, server: Served) -> None:
    default = {
        "rain": {"preset": "hh", "max_iterations": 9, "tree": False}, "dera": {"lambda": [0.25, 0.5], "allow_negative": False},
        "edits": [{"name": "calm", "strength": 2.5, "on": "both", "judge": False}], "urial": True,
    }  # fmt: skip
    offer = {
        "model": "mine", "num_models": 3, "context_length": 4096, "edits": ["kind", "calm"], "prompts": ["default", "short"],
        "preset": "hh", "default": default, "exact": False, "dtype": "bfloat16", "max_concurrent": 8,
    }  # fmt: skip
    with opened() as page:
        page.route("**/v1/align", lambda route: route.fulfill(json=offer))
        page.goto(server.url)
        page.locator("#server", has_text="mine: 3 models, bfloat16, context of 4,096 tokens").wait_for()
        page.locator("#requests > summary").click()
        align = {
            "search": "rain", "rain": {"preset": "hh", "max_iterations": 9, "tree": True}, "dera": {"lambda": [0.25, 0.5]},
            "edits": [{"name": "calm", "strength": 2.5, "on": "both"}], "urial": "default",
        }  # fmt: skip
        assert json.loads(shown_request(page))["align"] == align
        page.locator("#request-side").select_option("vanilla")
        vanilla = {"search": "sampling", "dera": {"lambda": [0, 0]}, "edits": [], "urial": False}
        assert json.loads(shown_request(page))["align"] == vanilla
        page.unroute("**/v1/align")


def test_a_server_that_is_away_is_asked_again(windows: Windows, server: Served) -> None:
    told: list[str] = []
    with windows.watched(told, [], **DESKTOP) as page:
        page.route("**/v1/**", lambda route: route.abort())
        page.goto(server.url)
        page.locator("#formerror", has_text="cannot be reached").wait_for()
        page.unroute("**/v1/**")
        send(page)
        page.locator("#vanilla .state", has_text="after").wait_for()
        assert page.locator("#formerror").is_hidden()
        assert answer(page, "vanilla")
    assert [line for line in told if "net::ERR_FAILED" not in line] == []


def test_keys_alone_ask(opened: Open) -> None:
    with opened() as page:
        names = page.eval_on_selector_all(
            "input, select, textarea, button, [role=treeitem], pre",
            "(all) => all.map((one) => one.getAttribute('aria-label') || [...(one.labels ?? [])].map((l) => l.textContent.trim()).join()"
            " || one.textContent.trim())",
        )
        assert all(names)
        page.keyboard.press("Tab")
        assert page.locator(":focus").get_attribute("id") == "prompt"
        page.keyboard.type(ASKED)
        seen = []
        for _ in range(14):
            page.keyboard.press("Tab")
            seen.append(
                page.evaluate(
                    "((one) => [one.id || one.tagName, getComputedStyle(one).outlineStyle])(document.activeElement)"
                )
            )
        ids = [one for one, _ in seen]
        assert ids[:6] == ["send", "SUMMARY", "temperature", "max_tokens", "seed", "reseed"]
        assert ids[-2:] == ["urial", "SUMMARY"]
        assert {style for _, style in seen} == {"solid"}
        page.locator("#prompt").focus()
        page.keyboard.press("Control+Enter")
        done(page)
        assert answer(page, "vanilla")
        assert answer(page, "aligned")


def test_stop_gives_the_request_up(opened: Open, server: Served) -> None:
    from serving import until

    with opened() as page:
        page.locator("input[value=rain]").check()
        fill(page, max_iterations=10_000, min_new_iterations=10_000, min_visits=10_000, max_tokens=200)
        page.locator("#prompt").fill(ASKED)
        page.locator("#send").click()
        page.locator("#vanilla .state", has_text="after").wait_for()
        until(lambda: server.service.num_open == 1)
        assert page.locator("#send").get_attribute("aria-disabled") == "true"
        page.locator("#stop").focus()
        page.keyboard.press("Enter")
        done(page)
        assert page.locator("#aligned .state").inner_text().startswith("stopped after ")
        assert page.locator("#aligned .alert").is_hidden()
        assert page.locator("#vanilla .text").inner_text()
        assert page.locator(":focus").get_attribute("id") == "send"
        server.settle()
        fill(page, max_iterations=1, min_new_iterations=1)
        page.locator("input[value=sampling]").check()
        send(page)
        assert answer(page, "aligned")


def test_mistakes_are_told_as_text(opened: Open) -> None:
    with opened(refusals=2) as page:
        page.locator("#send").click()
        assert page.locator("#formerror").inner_text() == "Write a prompt first."
        fill(page, temperature=-1)
        send(page)
        for side in ("vanilla", "aligned"):
            alert = page.locator(f"#{side} .alert")
            assert alert.get_attribute("role") == "alert"
            assert alert.inner_text() == "temperature: Input should be greater than or equal to 0"
            assert page.locator(f"#{side} .state").inner_text().startswith("failed after ")
        assert page.locator("#numbers").is_hidden()
        fill(page, temperature=1, seed=1.5)
        page.locator("#send").click()
        assert "Seed: give a whole number" in page.locator("#formerror").inner_text()
        assert page.locator(":focus").get_attribute("id") == "seed"
        fill(page, seed=1, max_tokens=5)
        send(page)
        assert page.locator("#formerror").is_hidden()
        assert page.locator("#vanilla .alert").is_hidden()
        assert answer(page, "vanilla")


def test_a_key_is_asked_for_and_not_kept(opened: Open, locked: Served) -> None:
    with opened(locked.url, refusals=2) as page:
        assert page.locator("#keyform").is_visible()
        assert page.locator("#key").get_attribute("type") == "password"
        assert page.locator(":focus").get_attribute("id") == "key"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.locator("#keyerror").wait_for()
        assert page.locator("#keyerror").inner_text() == "The server does not take this key."
        assert page.locator("#prompt").input_value() == ""
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        page.locator("#keyform").wait_for(state="hidden")
        fill(page, max_tokens=5)
        send(page)
        assert answer(page, "vanilla")
        assert page.locator("#dera").is_hidden()
        assert page.locator("#edits").is_hidden()
        page.locator("#request-side").select_option("vanilla")
        assert "dera" not in json.loads(shown_request(page))["align"]
        page.locator("#request-form").select_option("curl")
        assert '"Authorization: Bearer $RAINDECODE_API_KEY"' in shown_request(page)
        assert KEY not in page.content()
        kept = page.evaluate(
            "JSON.stringify([localStorage, sessionStorage, document.cookie, document.getElementById('key').value])"
        )
        assert json.loads(kept) == [{}, {}, "", ""]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([chunk("so far"), {"error": {"message": "the model failed", "type": "server_error", "param": None, "code": None}}, "[DONE]"],
         "the model failed"),
        ([chunk("so far")], "The answer broke off"),
    ],
    ids=["error", "cut"],
)  # fmt: skip
def test_a_stream_that_fails_says_so(scripted: Open, lines: list[Any], told: str) -> None:
    with scripted(lines) as page:
        send(page)
        assert told in page.locator("#aligned .alert").inner_text()
        assert answer(page, "aligned") == "so far"


def test_the_policy_lets_nothing_else_in(opened: Open, server: Served) -> None:
    page = playground()
    assert "unsafe" not in page.policy
    assert page.html.count("<script>") == page.html.count("</script>") == 1
    with opened() as window:
        response = window.goto(server.url)
        assert response.headers["content-security-policy"] == page.policy
        window.locator("#server").filter(has_not_text="Asking").wait_for(state="attached")
