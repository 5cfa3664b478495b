"""The playground in a real browser, against a real server of the testbed."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("fastapi", "uvicorn", "sse_starlette", "prometheus_client"):
    pytest.importorskip(name, reason="the server needs the extra rainkernels[server]")

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))
from browsing import CONTRAST, DESKTOP, PHONE, Windows  # noqa: E402
from serving import Served, serving, until  # noqa: E402

from raindecode import RAIN, URIAL, AlignEZ, Completion, Decoder, DeRa, Policy, Sampling  # noqa: E402
from raindecode.server.page import playground  # noqa: E402

ASKED = "How do I burn the barn of the baker?"
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><!-- \u202e it's"
KEY = "a-key-for-tests"
SEARCH = {"max_iterations": 30, "min_visits": 20, "value_threshold": 1}
Open = Callable[..., Any]
Node = dict[str, Any]


@pytest.fixture(scope="module")
def edit_file(reference: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit that changes answers a little."""
    model = reference.identities[0]
    direction = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("edits") / "nudge.safetensors"
    AlignEZ.from_directions({1: direction}, op="add", alpha=4.0, model=model).save(path)
    return path


@pytest.fixture(scope="module")
def reference() -> Decoder:
    """A decoder like the server's, for what it should answer."""
    return Decoder.from_pretrained("testbed", adapter="testbed")


@pytest.fixture(scope="module")
def server(edit_file: Path) -> Iterator[Served]:
    with serving(Decoder.from_pretrained("testbed", adapter="testbed"), edits={"nudge": str(edit_file)}) as served:
        yield served


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """One model without edits, and a key."""
    with serving(Decoder.from_pretrained("testbed"), api_keys=(KEY,)) as served:
        yield served


@pytest.fixture(scope="module")
def opened(windows: Windows, server: Served) -> Open:
    """Open the playground; at the end it has asked nobody but its server, and complained of nothing but `refusals`."""

    @contextmanager
    def open_(url: str = server.url, refusals: int = 0, **settings: Any) -> Iterator[Any]:
        told: list[str] = []
        asked: list[str] = []
        with windows.watched(told, asked, **(settings or DESKTOP)) as page:
            page.goto(url)
            page.locator("#server").filter(has_not_text="Asking").wait_for(state="attached")
            yield page
            assert page.title() == "raindecode playground"
        assert len(told) == refusals, told
        assert all("the server responded with a status of 4" in line for line in told)
        assert asked
        assert [one for one in asked if not one.startswith(f"{url}/")] == []

    return open_


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


@pytest.fixture(scope="module")
def found(reference: Decoder) -> Completion:
    """What `searched` is to show."""
    search = RAIN.preset("town", record_tree=True, **SEARCH)
    (made,) = reference.generate([ASKED], search=search, policy=Policy(dera=DeRa(0.0)), seed=3, max_new_tokens=24)
    return made


def nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node["children"]:
        yield from nodes(child)


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


def details(page: Any) -> dict[str, str]:
    told: dict[str, str] = page.locator("#details dl").evaluate(
        "(one) => Object.fromEntries([...one.querySelectorAll('dt')].map((dt) => [dt.textContent, dt.nextSibling.textContent]))"
    )
    return told


def check_details(page: Any, node: Node) -> None:
    """The details are this node's."""
    told = details(page)
    assert told["Slot"] == str(node["slot"])
    assert told["Value"] == (signed(node["value"]) if node["visits"] else "not visited")
    assert float(told["Visits"]) == pytest.approx(node["visits"], abs=0.05)
    assert told["of them its own"] == str(node["direct_visits"])
    assert told["Children"] == str(len(node["children"]))
    assert told["Token ids"] == (" ".join(map(str, node["tokens"])) if told.get("Prior") else told["Token ids"])
    if "Prior" in told:
        assert float(told["Prior"].removesuffix(" %")) == pytest.approx(100 * node["prior"], abs=0.51)
    if node["text"]:
        assert page.locator("#details .whole").evaluate("(one) => one.textContent") == node["text"]


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


def test_the_tree_is_that_of_the_answer(opened: Open, found: Completion) -> None:
    assert found.tree is not None
    with opened() as page:
        searched(page)
        assert answer(page, "aligned") == found.text
        steps = page.locator("#steps label")
        assert steps.count() == len(found.tree) > 2
        for i, one in enumerate(found.tree):
            page.locator("#steps input").nth(i).check()
            chosen = next(child for child in one["root"]["children"] if child["slot"] == one["chosen"])
            assert steps.nth(i).inner_text().endswith(signed(chosen["value"]))
            assert page.locator("g.chosen").count() == 1
            assert page.locator("g.chosen").get_attribute("data-slot") == str(one["chosen"])
            assert page.locator("g.chosen .label").evaluate("(one) => one.textContent").startswith("✓ ")
            assert page.locator("g.chosen").get_attribute("aria-label").endswith(", committed")
            assert page.locator("#picture path.chosen").count() == 1
            check_details(page, chosen)
            assert page.locator("#details").inner_text().count("✓ Committed") == 1
        # The sets committed after the first one lie on its path, as far as that tree has them.
        page.locator("#steps input").first.check()
        later = []
        node = found.tree[0]["root"]
        for one in found.tree:
            node = next((child for child in node["children"] if child["slot"] == one["chosen"]), None)
            if node is None:
                break
            later.append(str(node["slot"]))
        assert len(later) > 1
        assert page.eval_on_selector_all("g.later", "(all) => all.map((one) => one.dataset.slot)") == later[1:]


def test_every_node_can_be_seen_by_size_colour_and_sign(opened: Open, found: Completion) -> None:
    assert found.tree is not None
    with opened() as page:
        searched(page)
        root = found.tree[0]["root"]
        least = int(page.locator("#shown").inner_text().rpartition("fewer than ")[2].split()[0])
        path = {one["chosen"] for one in found.tree}
        kept = {node["slot"] for node in nodes(root) if node["visits"] >= least or node["slot"] in path}
        slots = "(all) => all.map((one) => Number(one.dataset.slot))"
        assert set(page.eval_on_selector_all("g.node", slots)) == kept
        page.locator("#all").check()
        drawn = page.eval_on_selector_all(
            "g.node",
            "(all) => all.map((one) => [Number(one.dataset.slot), one.querySelector('.sign').textContent, "
            "getComputedStyle(one.querySelector('.dot')).fill, Number(one.querySelector('.dot').getAttribute('r')), "
            "one.querySelector('.numbers').textContent])",
        )
        by_slot = {slot: rest for slot, *rest in drawn}
        every = {node["slot"]: node for node in nodes(root)}
        assert by_slot.keys() == every.keys()
        assert len(every) > len(kept)
        assert page.locator("#shown").inner_text() == f"{len(every)} nodes"
        colours: dict[str, set[str]] = {}
        for slot, node in every.items():
            sign, colour, _, numbers = by_slot[slot]
            value = node["value"]
            assert sign == ("?" if not node["visits"] else "0" if abs(value) < 0.005 else "+" if value > 0 else "−")
            colours.setdefault(sign, set()).add(colour)
            assert numbers.startswith(signed(value) if node["visits"] else "not visited")
        assert colours.keys() == {"+", "0", "−", "?"}
        assert not any(colours[a] & colours[b] for a in colours for b in colours if a < b)
        visits = sorted((node["visits"], by_slot[slot][2]) for slot, node in every.items())
        assert all(a[1] <= b[1] for a, b in pairwise(visits))
        assert visits[0][1] < visits[-1][1]


def test_keys_go_through_steps_and_nodes(opened: Open, found: Completion) -> None:
    assert found.tree is not None
    first, second = found.tree[:2]
    with opened() as page:
        searched(page)
        page.locator("#steps input").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("g.chosen").get_attribute("data-slot") == str(second["chosen"])
        page.keyboard.press("ArrowLeft")
        assert page.locator("g.chosen").get_attribute("data-slot") == str(first["chosen"])
        for _ in range(5):  # show all, three buttons, the picture
            page.keyboard.press("Tab")
        focused = page.locator(":focus")
        assert focused.get_attribute("data-slot") == str(first["chosen"])
        assert focused.locator(".back").evaluate("(one) => getComputedStyle(one).strokeWidth") == "2.5px"
        root = first["root"]
        children = sorted(
            root["children"], key=lambda one: (one["slot"] != first["chosen"], -one["visits"], -one["prior"])
        )
        for key, node in (
            ("ArrowLeft", root), ("ArrowRight", children[0]), ("ArrowDown", children[1]), ("ArrowDown", children[2]),
            ("ArrowUp", children[1]), ("ArrowLeft", root), ("ArrowLeft", root), ("End", children[0]), ("Home", root),
        ):  # fmt: skip
            page.keyboard.press(key)
            assert page.locator(":focus").get_attribute("data-slot") == str(node["slot"])
            check_details(page, node)
            box, frame = page.locator(":focus .back").bounding_box(), page.locator("#picture").bounding_box()
            assert box["x"] >= frame["x"] - 1
            assert box["y"] >= frame["y"] - 1
            assert box["x"] + min(box["width"], frame["width"]) <= frame["x"] + frame["width"] + 1
        # What is folded comes with Enter, and goes.
        folded = page.locator("g.node", has=page.locator("text.fold")).first
        slot = folded.get_attribute("data-slot")
        before = page.locator("g.node").count()
        few = int(folded.locator(".fold").evaluate("(one) => one.textContent")[1:])
        assert folded.get_attribute("aria-expanded") == "false"
        folded.focus()
        page.keyboard.press("Enter")
        assert page.locator("g.node").count() == before + few
        assert page.locator(":focus").get_attribute("data-slot") == slot
        assert page.locator(":focus").get_attribute("aria-expanded") == "true"
        page.keyboard.press("Enter")
        assert page.locator("g.node").count() == before
        width = page.locator("#picture svg").bounding_box()["width"]
        page.keyboard.press("+")
        assert page.locator("#picture svg").bounding_box()["width"] == pytest.approx(1.25 * width, rel=0.01)
        page.locator("#fit").click()
        assert page.locator("#picture").evaluate("(one) => one.scrollWidth - one.clientWidth") <= 1
        # Pointing shows, and leaves the place of the keys alone.
        page.locator("#larger").click(click_count=3)
        page.locator("#picture").evaluate("(one) => one.scrollTo(0, 0)")
        page.locator(f"g.node[data-slot='{children[1]['slot']}'] .label").hover(force=True)
        check_details(page, children[1])
        page.mouse.move(2, 2)
        assert details(page)["Slot"] == slot


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


def invented(size: int) -> Node:
    """A tree of so many nodes, ten children to each, with hostile texts."""
    plain: Node = {"text": "", "prior": 0.1, "direct_visits": 1}
    made = [
        {**plain, "slot": i, "tokens": [i], "visits": size // (i + 1), "value": (i % 5 - 2) / 2, "children": []}
        for i in range(size)
    ]
    for i in range(1, size):
        made[i]["text"] = f"{made[(i - 1) // 10]['text']}{HOSTILE}{i}"
        made[(i - 1) // 10]["children"].append(made[i])
    return made[0]


@pytest.fixture
def scripted(opened: Open) -> Open:
    """The playground with a server whose answers are given."""

    @contextmanager
    def open_(lines: list[Any], **settings: Any) -> Iterator[Any]:
        body = "".join(f"data: {line if isinstance(line, str) else json.dumps(line)}\n\n" for line in lines)
        with opened(**settings) as page:
            page.route(
                "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
            )
            yield page
            page.unroute("**/v1/chat/completions")

    return open_


def chunk(text: str = "", **ending: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": None, **ending}],
        "usage": None,
    }


def test_texts_stay_texts_and_big_trees_stay_readable(scripted: Open) -> None:
    tree = [{"chosen": 1, "committed": [], "root": invented(700)}]
    lines = [
        chunk(HOSTILE),
        chunk(HOSTILE),
        chunk(finish_reason="stop", align={"seed": 1, "value": 0.5, "tree": tree}),
        "[DONE]",
    ]
    with scripted(lines) as page:
        send(page, HOSTILE)
        assert answer(page, "aligned") == HOSTILE * 2
        page.locator("#requests > summary").click()
        assert json.loads(shown_request(page))["messages"][0]["content"] == HOSTILE
        drawn = page.locator("g.node")
        assert 10 < drawn.count() <= 40
        page.locator("#all").check()
        assert drawn.count() == 700
        page.locator("g.chosen").focus()
        page.keyboard.press("ArrowDown")
        assert details(page)["Slot"] == "2"
        assert page.locator("#details .whole").evaluate("(one) => one.textContent") == f"{HOSTILE}2"
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 1
        labels = page.eval_on_selector_all("g.node .label", "(all) => all.map((one) => one.textContent)")
        assert not any("\u202e" in label for label in labels)  # nothing turns the picture's texts around
        spans = page.eval_on_selector_all(
            "g.node", "(all) => all.map((one) => one.getBBox()).map((b) => [b.x, b.y, b.width, b.height])"
        )
        assert len({(x, y) for x, y, *_ in spans}) == 700
        assert max(width for *_, width, _ in spans) <= 228


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


@pytest.mark.parametrize("settings", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_window(opened: Open, settings: Any) -> None:
    with opened(**settings) as page:
        assert page.locator("#temperature").is_visible() is (settings is DESKTOP)  # on a phone the answers stand near
        searched(page)
        width = settings["viewport"]["width"]
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth") == page.evaluate(f"{root}.clientWidth") == width
        edges = "(all) => all.filter((one) => one.checkVisibility()).map((one) => one.getBoundingClientRect().right)"
        assert max(page.eval_on_selector_all("body *:not(svg, svg *, .unseen, option)", edges)) <= width
        if settings is PHONE:
            page.locator("g.node").nth(0).locator(".sign").tap()
            assert page.locator("#details").inner_text().count("The root") == 1


def test_both_colour_schemes_can_be_read(opened: Open) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        with opened(**DESKTOP, color_scheme=scheme) as page:
            searched(page)
            page.locator("text.fold").first.click()
            page.evaluate("""['formerror', 'keyerror'].forEach((id) => { document.getElementById(id).textContent = "Told.";
                document.getElementById(id).hidden = document.getElementById("keyform").hidden = false; })""")
            backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            for selector in (
                "h1", "h2", "p", "label", "legend", "summary", "button", "input, select, textarea", "th", "td", "dt", "dd", "li", "pre",
                "code", ".small", ".text", ".alert", ".whole *", ".label", ".numbers", ".node .sign", "#legend .sign", ".state",
            ):  # fmt: skip
                found = page.evaluate(CONTRAST, selector)
                assert found, selector
                assert min(found) >= 4.5, (scheme, selector, min(found))
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(21, 23, 27)"]


def test_the_policy_lets_nothing_else_in(opened: Open, server: Served) -> None:
    page = playground()
    assert "unsafe" not in page.policy
    assert page.html.count("<script>") == page.html.count("</script>") == 1
    with opened() as window:
        response = window.goto(server.url)
        assert response.headers["content-security-policy"] == page.policy
        window.locator("#server").filter(has_not_text="Asking").wait_for(state="attached")
