"""The project's GPU goals, each with what was measured and whether it was met; None where nothing was measured.

Plain calls are no measure of a kernel or a step that should have been captured: such a goal has a note instead.
"""

from __future__ import annotations

from typing import Any

_OURS, _STEP = "ours", "engine, CUDA graph"
_ALONE = "add + RMSNorm alone, same lane"
_LAYERS_7B = 32
_STEP_ROWS, _STEP_PREFIX = 40, 4096


def goals(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Goals from the findings of the parts "kernels", "decode_step", "dera_step", "alignez_step" and "urial"."""
    rows = _rows(parts, "kernels")
    found = []
    for branches in (40, 160):
        row = _find(rows, "attention", f"{branches} x 32 over 4096, 32/8 heads, D 128, bfloat16")
        found.append(
            _at_least(f"attention, {branches} branches over 4k: share of the floor", 0.6, _share(row), _note(row))
        )
        for label in ("two-part flash", "FlashInfer cascade"):
            slower = None if row is None else row.get("ratio", {}).get(label, {}).get("median")
            name = f"attention, {branches} branches over 4k: time of {label} over ours"
            found.append(_at_least(name, 1.0, slower, _note(row, label)))
    mix = _find(rows, "mix_sample", "mix 2 models, top-k 50, top-p 0.95, 64 x 128,256")
    found.append(_at_least("mix_sample, 64 x 128,256, top-k 50: share of the floor", 0.7, _share(mix), _note(mix)))
    step, why = _step_us(_rows(parts, "decode_step"))
    for own, where in ((False, "one slot"), (True, "own slots")):
        for fused, limit in ((True, 0.01), (False, 0.04)):
            added, reason = _edit_us(rows, fused=fused, own=own)
            share = None if added is None or step is None else added * _LAYERS_7B / step
            name = f"edits, {'fused' if fused else 'in place'}, {where}: share added to a 7B decode step of 40 rows"
            found.append(_at_most(name, limit, share, reason or why))
    pair = _ratio(parts, "7b", "lora_pair / single")
    found.append(
        _at_most("DeRa, 7B LoRA pair, batch 1, context 2,048: time over that of one model's step", 1.15, pair, None)
    )
    added = _added(parts, "7b", "edits")
    found.append(_at_most("AlignEZ, 7B step of 64 rows, two edits in every layer: share added", 0.01, added, None))
    first = _ratio(parts, "7b", "again / hot", part="urial")
    found.append(
        _at_least(
            "URIAL, 7B, 1,000 constant tokens: time to first token anew over that with the prefix cached",
            10.0,
            first,
            None,
        )
    )
    return found


def _added(parts: dict[str, Any], shape: str, engine: str) -> float | None:
    """Share of a step that bench_alignez.py found added on a GPU, where what was decoded was right."""
    record = parts.get("alignez_step", {}).get("result") or {}
    if record.get("shape") != shape or record.get("device_type") != "cuda" or not record.get("same"):
        return None
    share = record.get("added_share", {}).get(engine)
    return None if share is None else float(share)


def _ratio(parts: dict[str, Any], shape: str, pair: str, *, part: str = "dera_step") -> float | None:
    """Of two engines of bench_dera.py or bench_urial.py on a GPU, whose tokens were right."""
    record = parts.get(part, {}).get("result") or {}
    if record.get("shape") != shape or not record.get("same"):
        return None
    median = record.get("ratios", {}).get(pair, {}).get("median")
    return None if median is None else float(median)


def _rows(parts: dict[str, Any], name: str) -> list[dict[str, Any]]:
    result = parts.get(name, {}).get("result") or {}
    return [row for row in result.get("rows", []) if row.get("status") == "ok"]


def _find(rows: list[dict[str, Any]], op: str, case: str) -> dict[str, Any] | None:
    return next((row for row in rows if row["op"] == op and row["case"] == case), None)


def _share(row: dict[str, Any] | None) -> float | None:
    """Of the fixed H200 floor where there is one, else of the one measured in the same run."""
    if row is None or _note(row):
        return None
    share: float | None = row.get("share_of_h200_floor", row.get("share_of_floor"))
    return share


def _note(row: dict[str, Any] | None, *others: str) -> str | None:
    """Which of ours and `others` could not be captured, and why; None where all were."""
    times = {} if row is None else row["times"]
    for label in (_OURS, *others):
        if times.get(label, {}).get("timer") == "events":
            return f"{label} not captured: {times[label].get('capture_error', 'no reason was kept')}"
    return None


def _edit_us(rows: list[dict[str, Any]], *, fused: bool, own: bool) -> tuple[float | None, str | None]:
    """Microseconds one layer's edit adds, over add + RMSNorm alone when fused, all of it in place; or why not known."""
    for row in rows:
        notes = row.get("notes", {})
        if row["op"] != "edits" or notes.get("rows") != _STEP_ROWS:
            continue
        if notes.get("fused") is fused and notes.get("own_slots") is own:
            without = () if not fused else (_ALONE,)
            if reason := _note(row, *without):
                return None, reason
            taken = float(row["times"][_OURS]["median_us"])
            alone = row["times"].get(_ALONE, {}).get("median_us")
            if not fused:
                return taken, None
            return (None if alone is None else max(0.0, taken - float(alone))), None
    return None, None


def _step_us(rows: list[dict[str, Any]]) -> tuple[float | None, str | None]:
    """Microseconds of the captured step, or why there is none: a share of a plain, longer step would look too good."""
    for row in rows:
        if (row["model"], row["branches"], row["prefix"]) == ("7b", _STEP_ROWS, _STEP_PREFIX):
            if _STEP in row["times"]:
                return float(row["times"][_STEP]["median_us"]), None
            return None, f"the step was not captured: {row.get('failed', {}).get(_STEP, 'no reason was kept')}"
    return None, None


def _at_least(name: str, goal: float, measured: float | None, note: str | None) -> dict[str, Any]:
    met = None if measured is None else measured >= goal
    return _goal(name, f"at least {goal:g}", measured, met, note)


def _at_most(name: str, goal: float, measured: float | None, note: str | None) -> dict[str, Any]:
    met = None if measured is None else measured <= goal
    return _goal(name, f"at most {goal:g}", measured, met, note)


def _goal(name: str, goal: str, measured: float | None, met: bool | None, note: str | None) -> dict[str, Any]:
    found = {"name": name, "goal": goal, "measured": measured, "met": met}
    return found if note is None or measured is not None else found | {"note": note}
