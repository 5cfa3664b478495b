"""The project's GPU goals, each with what was measured and whether it was met; None where nothing was measured."""

from __future__ import annotations

from typing import Any

_OURS = "ours"
_LAYERS_7B = 32
_STEP_ROWS, _STEP_PREFIX = 40, 4096


def goals(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Goals from the findings of the parts "kernels" and "decode_step"."""
    rows = _rows(parts, "kernels")
    found = []
    for branches in (40, 160):
        row = _find(rows, "attention", f"{branches} x 32 over 4096, 32/8 heads, D 128, bfloat16")
        found.append(_at_least(f"attention, {branches} branches over 4k: share of the floor", 0.6, _share(row)))
        for label in ("two-part flash", "FlashInfer cascade"):
            slower = None if row is None else row.get("ratio", {}).get(label, {}).get("median")
            found.append(_at_least(f"attention, {branches} branches over 4k: time of {label} over ours", 1.0, slower))
    mix = _find(rows, "mix_sample", "mix 2 models, top-k 50, top-p 0.95, 64 x 128,256")
    found.append(_at_least("mix_sample, 64 x 128,256, top-k 50: share of the floor", 0.7, _share(mix)))
    step = _step_us(_rows(parts, "decode_step"))
    for own, where in ((False, "one slot"), (True, "own slots")):
        for fused, limit in ((True, 0.01), (False, 0.04)):
            added = _edit_us(rows, fused=fused, own=own)
            share = None if added is None or step is None else added * _LAYERS_7B / step
            name = f"edits, {'fused' if fused else 'in place'}, {where}: share added to a 7B decode step of 40 rows"
            found.append(_at_most(name, limit, share))
    return found


def _rows(parts: dict[str, Any], name: str) -> list[dict[str, Any]]:
    result = parts.get(name, {}).get("result") or {}
    return [row for row in result.get("rows", []) if row.get("status") == "ok"]


def _find(rows: list[dict[str, Any]], op: str, case: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["op"] == op and row["case"] == case), None)


def _share(row: dict[str, Any] | None) -> float | None:
    """Of the fixed H200 floor where there is one, else of the one measured in the same run."""
    return None if row is None else row.get("share_of_h200_floor", row.get("share_of_floor"))


def _edit_us(rows: list[dict[str, Any]], *, fused: bool, own: bool) -> float | None:
    """Microseconds one layer's edit adds: over add + RMSNorm alone when fused, all of it in place."""
    for row in rows:
        notes = row.get("notes", {})
        if row["op"] != "edits" or notes.get("rows") != _STEP_ROWS:
            continue
        if notes.get("fused") is fused and notes.get("own_slots") is own:
            taken = float(row["times"][_OURS]["median_us"])
            alone = row["times"].get("add + RMSNorm alone, same lane", {}).get("median_us")
            if not fused:
                return taken
            return None if alone is None else max(0.0, taken - float(alone))
    return None


def _step_us(rows: list[dict[str, Any]]) -> float | None:
    for row in rows:
        if (row["model"], row["branches"], row["prefix"]) == ("7b", _STEP_ROWS, _STEP_PREFIX):
            times = row["times"]
            return float((times.get("engine, CUDA graph") or times["engine"])["median_us"])
    return None


def _at_least(name: str, goal: float, measured: float | None) -> dict[str, Any]:
    met = None if measured is None else measured >= goal
    return {"name": name, "goal": f"at least {goal:g}", "measured": measured, "met": met}


def _at_most(name: str, goal: float, measured: float | None) -> dict[str, Any]:
    met = None if measured is None else measured <= goal
    return {"name": name, "goal": f"at most {goal:g}", "measured": measured, "met": met}
