"""Tables of URIAL, from records of bench_urial.py and urial_combinations.py. Used by update_readme.py."""

from __future__ import annotations

from typing import Any

from readme_tables import NONE, missing, table

Row = dict[str, Any]
_EXPECTED = ("testbed", "25m", "110m")  # rows that stand there before they are measured
_FIRST = {
    "hot": "prompt cached", "again": "prompt computed", "disk": "prompt read from a file", "transformers": "transformers",
    "transformers_reuse": "transformers, prompt kept",
}  # fmt: skip
_TOGETHER = {name: label for name, label in _FIRST.items() if name != "disk"}


def first_tokens(records: list[Row]) -> str:
    """The table of times to the first token."""
    header = ["model", *_FIRST.values(), "prompt alone: computed / loaded"]
    rows = []
    for record in records:
        cells = [f"{record['ttft_ms']['hot']:.1f} ms"]
        for name in list(_FIRST)[1:]:
            cells.append(f"{record['ttft_ms'][name]:.1f} ms ({record['ratios'][f'{name} / hot']['median']:.1f}x)")
        computed, loaded = (record["prefix_ms"][name] for name in ("compute_prefix", "load_prefix"))
        ratio = record["ratios"]["compute_prefix / load_prefix"]["median"]
        rows.append([_where(record), *cells, f"{computed:.1f} ms / {loaded:.1f} ms ({ratio:.1f}x)"])
    note = (
        "**URIAL: time to first token**, a constant prompt and a query of about 20 tokens of its own, which is all that runs once the\n"
        "prompt is cached (`raindecode bench urial`, [docs/benchmarks.md](docs/benchmarks.md#what-a-constant-prompt-costs)). Medians,\n"
        "engines in turns; in brackets the times over that of the prompt cached, medians round by round:\n\n"
    )
    return note + table(header, [*rows, *missing(records, _EXPECTED, len(header))])


def together(records: list[Row]) -> str:
    """The table of throughput."""
    header = ["model", "requests together", *_TOGETHER.values()]
    rows = []
    for record in records:
        for count, found in record["throughput"].items():
            cells = [f"{found['tokens_per_s'][name]:,.0f}" for name in _TOGETHER]
            rows.append([_where(record), count, *cells])
    tokens = ", ".join(sorted({str(record["new_tokens"]) for record in records})) or "32"
    note = f"**URIAL: new tokens per second**, {tokens} of every request, prompts included (the same command):\n\n"
    return note + table(header, [*rows, *missing(records, _EXPECTED, len(header))])


def _where(record: Row) -> str:
    prompt = f"prompt of {record['prefix_tokens']} tokens"
    return f"{record['shape']}, {prompt}, {record['device']}, {record['dtype']}, {record['threads']} threads"


def combinations(record: Row | None) -> str:
    """The table of rates on the testbed, every method without the prompt and with it."""
    header = ["method", "requests", "harmful answers", "with URIAL", "helpful answers", "with URIAL"]
    if record is None:
        return table(header, [["plain sampling", "", *[NONE] * 4]])
    rows = []
    for name, arm in record["arms"].items():
        counts = [str(arm["urial"][rate]["n"]) for rate in ("harmful", "helpful")]
        cells = [_share(arm[prompt][rate]) for rate in ("harmful", "helpful") for prompt in ("without", "urial")]
        rows.append([name, " + ".join(counts), *cells])
    about = (
        "Held-out requests of the testbed, harmful + harmless, temperature 1, the exact judge; in brackets 95 % intervals. Methods that\n"
        "answer the same requests answer them with the same numbers. The prompt is `URIAL.testbed()`, three kind exchanges; DeRa mixes in\n"
        f"the adapter with λ = {record['weight']:g}; the edit is `{record['preset']}`, fitted without the prompt; RAIN has its\n"
        "preset `town` (`python benchmarks/urial_combinations.py`):\n\n"
    )
    return about + table(header, rows)


def _share(rate: Row) -> str:
    return f"{rate['rate']:.1%} ({rate['ci'][0]:.1%} to {rate['ci'][1]:.1%})"


__all__ = ["combinations", "first_tokens", "together"]
