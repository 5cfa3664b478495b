"""The playground's picture of RAIN's search, and how the page looks."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from browsing import CONTRAST, DESKTOP, PHONE
from playing import (
    ASKED,
    HOSTILE,
    SEARCH,
    Node,
    answer,
    chunk,
    nodes,
    searched,
    send,
    shown_request,
    signed,
)

from raindecode import RAIN, Completion, Decoder, DeRa, Policy

Open = Callable[..., Any]
Served = Any  # serving.Served; its module needs the server's packages


@pytest.fixture(scope="module")
def found(reference: Decoder) -> Completion:
    """What `searched` is to show."""
    search = RAIN.preset("town", record_tree=True, **SEARCH)
    (made,) = reference.generate([ASKED], search=search, policy=Policy(dera=DeRa(0.0)), seed=3, max_new_tokens=24)
    return made


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


def invented(size: int) -> Node:
    """A tree of so many nodes, ten children to each, with hostile texts."""
    plain: Node = {"text": "", "prior": 0.1, "direct_visits": 1}
    made = [
        {**plain, "slot": i, "tokens": [i], "visits": size // (i + 1), "value": (i % 5 - 2) / 2.5, "children": []}
        for i in range(size)
    ]
    for i in range(1, size):
        made[i]["text"] = f"{made[(i - 1) // 10]['text']}{HOSTILE}{i}"
        made[(i - 1) // 10]["children"].append(made[i])
    return made[0]


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
        looks = page.eval_on_selector_all(
            "g.node",
            "(all) => all.map((one) => [one.dataset.slot, one.querySelector('.sign').textContent, one.classList[1]])",
        )
        signs = {0: ("−", "bad2"), 1: ("−", "bad1"), 2: ("0", "even"), 3: ("+", "good1"), 4: ("+", "good2")}
        for slot, *look in looks:
            visited = 700 // (int(slot) + 1) > 0
            assert tuple(look) == (signs[int(slot) % 5] if visited else ("?", "unvisited"))
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
