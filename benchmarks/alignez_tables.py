"""Tables of AlignEZ, from records of bench_alignez.py. Used by update_readme.py."""

from __future__ import annotations

from typing import Any

from readme_tables import NONE, missing, table

Row = dict[str, Any]
_EXPECTED = ("testbed", "110m")  # rows that stand there before they are measured
_ADDED = {"edits": "none", "edits_256": "none", "hooks": "stock", "hooks_256": "stock"}
_PRESETS = ("svd", "ccs", "svd-knn", "svd-diff", "mean-diff", "logistic")


def edit_steps(records: list[Row]) -> str:
    """The table of what edits add to a decoding step."""
    header = [
        "model", "raindecode, no edit", "one edit adds", "an edit per request adds", "transformers, no edit",
        "one edit by hooks adds", "an edit per request by hooks adds",
    ]  # fmt: skip
    rows = []
    for record in records:
        where = f"{record['shape']}, {record['rows']} requests, {record['device']}, {record['dtype']}, {record['threads']} threads"
        adds = [_added(record, name) for name in _ADDED]
        bases = [f"{record['step_ms'][name]:.2f} ms" for name in ("none", "stock")]
        rows.append([where, bases[0], *adds[:2], bases[1], *adds[2:]])
    note = (
        "**Edits of hidden states in a decoding step**: two directions in every layer, all requests in one batch\n"
        "(`raindecode bench alignez`, [docs/benchmarks.md](docs/benchmarks.md#what-edits-of-hidden-states-cost)).\n"
        "Medians, engines in turns step by step. What is added is the median difference between steps of one decode that has\n"
        "its edits on and off in turns, with its 95 % interval; then what its parts take alone:\n\n"
    )
    return note + table(header, [*rows, *missing(records, _EXPECTED, len(header))])


def _added(record: Row, name: str) -> str:
    once = record["toggled"]
    low, high = once["added_interval_ms"][name]
    share, parts = once["added_share"][name], record["added_ms_by_parts"]["added_ms"][name]
    return f"{once['added_ms'][name]:.2f} ms ({share:.1%}; {low:.2f} to {high:.2f}), parts {parts:.2f} ms"


def fit_times(records: list[Row]) -> str:
    """The table of what a fit takes beside the forwards it needs."""
    fitted = [record for record in records if "fit_ratio" in record]
    header = ["model", *(f"`{name}`" for name in _PRESETS)]
    rows = []
    for record in fitted:
        where = f"{record['shape']}, {record['pairs']} pairs, {record['device']}, {record['threads']} threads"
        cells = [
            f"{record['fit_ratio'][name]['median']:.2f}x ({record['fit_s'][name]:.1f} s)"
            if name in record["fit_ratio"]
            else NONE
            for name in _PRESETS
        ]
        rows.append([where, *cells])
    note = "**A fit over the forwards it needs**, by preset, in brackets the whole fit (the same command):\n\n"
    return note + table(header, [*rows, *missing(fitted, _EXPECTED, len(header))])


__all__ = ["edit_steps", "fit_times"]
