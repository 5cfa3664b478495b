"""A thousand prompts in one call: what grows, whether the batch stays full, what is left at the end.

    python benchmarks/many_prompts.py [--requests 1000] [--max-new-tokens 8] [--kv-tokens N] [--max-concurrent 32] [--trace]
                                      [--json FILE]

For plain sampling and for RAIN, one after another, each on a decoder of its own over the embedded model with a KV pool that is
far too small to cache everything. Each runs a round first (a fifth of the requests, not counted), so that what is made once is
there. After every fifth of the requests it notes the resident memory of the process (MiB, after a garbage collection and, in
brackets in the table, before it), the KV tokens in use and evicted, and the sizes of the tables that live as long as the engine.
With --trace it also notes what tracemalloc counts, and takes a few times as long.
`full` is the share of forwards that ran while exactly min(max_concurrent, requests left) requests were under way.
Exit code 1 when a batch was not full, or a slot or cursor is left at the end. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from raindecode import RAIN, Completion, Sampling, testbed  # noqa: E402

Row = dict[str, Any]
_KV_TOKENS = {"sampling": 4_000, "rain": 20_000}  # a few times what 32 requests hold at once
_PARTS = 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--kv-tokens", type=int, help="of the pool; default: 4,000 for sampling, 20,000 for RAIN")
    parser.add_argument("--max-concurrent", type=int, default=32)
    parser.add_argument("--trace", action="store_true", help="count Python's allocations, too (slow)")
    parser.add_argument("--json", type=Path, help="write the record to this file, too")
    arguments = parser.parse_args(argv)
    if arguments.requests < _PARTS:
        parser.error(f"--requests is {arguments.requests}; allowed: {_PARTS} or more")
    record: Row = {
        "op": "many_prompts", "model": "testbed", "threads": torch.get_num_threads(), "torch": torch.__version__,
        "requests": arguments.requests, "max_new_tokens": arguments.max_new_tokens,
        "max_concurrent": arguments.max_concurrent, "runs": {},
    }  # fmt: skip
    for name, search in (("sampling", Sampling(ignore_eos=True)), ("rain", RAIN.preset("town"))):
        pool = arguments.kv_tokens or _KV_TOKENS[name]
        record["runs"][name] = run(name, search, pool, arguments)
    show(record)
    line = json.dumps(record)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return int(any(one["full"] < 1 or one["slots_lost"] or one["cursors_left"] for one in record["runs"].values()))


def run(name: str, search: Sampling | RAIN, kv_tokens: int, arguments: argparse.Namespace) -> Row:
    """One search over all prompts."""
    decoder = raindecode.Decoder.from_pretrained(
        "testbed", device="cpu", kv_tokens=kv_tokens, max_concurrent=arguments.max_concurrent
    )
    count, warm = arguments.requests, arguments.requests // _PARTS
    prompts = [request.text for request in testbed.sample_requests(warm + count)]
    options: Row = {"search": search, "max_new_tokens": arguments.max_new_tokens}
    decoder.generate(prompts[:warm], seed=list(range(count, count + warm)), progress=False, **options)
    requests = decoder.requests(prompts[warm:], seed=list(range(count)), **options)
    watch = Watch(decoder, count)
    if arguments.trace:
        tracemalloc.start()
    parts, began = [watch.look(0)], time.perf_counter()
    answers = watch.counted(decoder.stream(requests, search=search, progress=False))
    for outcome in track(answers, name, total=count, console=Console(stderr=True)):
        if isinstance(outcome, BaseException):
            raise outcome
        if watch.finished % (count // _PARTS) == 0:
            parts.append(watch.look(watch.finished))
    seconds = time.perf_counter() - began
    tracemalloc.stop()
    tree = decoder.engine.tree
    cursors = tree.num_cursors
    tree.clear()
    return {
        "kv_tokens": kv_tokens, "seconds": round(seconds, 2), "answers_per_second": round(count / seconds, 2),
        "tokens": watch.tokens, "forwards": watch.forwards, "full": watch.full / watch.forwards, "parts": parts,
        "slots_lost": tree.num_slots - tree.num_free, "cursors_left": cursors,
    }  # fmt: skip


class Watch:
    """Counts forwards and how many requests were under way in each, and looks at what could grow."""

    def __init__(self, decoder: raindecode.Decoder, count: int) -> None:
        self.engine = decoder.engine
        self.count = count
        self.finished = self.forwards = self.full = self.tokens = 0
        forward: Any = self.engine.runner.forward

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.forwards += 1
            self.full += self.engine.num_running == min(self.engine.max_tasks, self.count - self.finished)
            return forward(*args, **kwargs)

        self.engine.runner.forward = counting  # type: ignore[method-assign]

    def counted(self, stream: Iterator[tuple[int, Any]]) -> Iterator[Completion | BaseException]:
        """The outcomes of a stream, counted and then forgotten, as a caller does who writes them to a file."""
        for _, outcome in stream:
            self.finished += 1
            if isinstance(outcome, Completion):
                self.tokens += len(outcome.token_ids)
            yield outcome

    def look(self, finished: int) -> Row:
        """Memory and the tables of the engine now."""
        before = resident()
        gc.collect()
        tree = self.engine.tree
        traced = (
            {"traced_mib": round(tracemalloc.get_traced_memory()[0] / 2**20, 2)} if tracemalloc.is_tracing() else {}
        )
        return {
            "finished": finished, "rss_mib_before_gc": round(before, 1), "rss_mib": round(resident(), 1),
            "python_objects": len(gc.get_objects()), "kv_tokens_used": tree.num_used, "kv_tokens_evicted": tree.num_evicted,
            "kv_nodes": sum(1 for _ in tree.nodes()), "cursors": tree.num_cursors,
            "kept_logits": len(self.engine.kept), "kept_logits_mib": round(self.engine.kept.num_bytes / 2**20, 1),
            **traced,
        }  # fmt: skip


def resident() -> float:
    """Memory of this process in RAM, MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmRSS; this benchmark needs Linux")


def show(record: Row) -> None:
    """The table."""
    table = Table(title=f"{record['requests']} prompts in one call, at most {record['max_concurrent']} at once")
    columns = ("search", "finished", "resident MiB", "KV tokens", "evicted", "KV nodes", "kept logits MiB", "objects")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "search" else "right")
    for name, one in record["runs"].items():
        for part in one["parts"]:
            table.add_row(
                "" if part["finished"] else name, str(part["finished"]),
                f"{part['rss_mib']:.1f} ({part['rss_mib_before_gc']:.1f})", f"{part['kv_tokens_used']:,}",
                f"{part['kv_tokens_evicted']:,}", f"{part['kv_nodes']:,}", f"{part['kept_logits_mib']:.1f}",
                f"{part['python_objects']:,}",
            )  # fmt: skip
        table.add_section()
    Console(width=120).print(table)
    for name, one in record["runs"].items():
        print(
            f"{name}: {one['seconds']:.1f} s, {one['answers_per_second']:.2f} answers a second, batch full in "
            f"{one['full']:.2%} of {one['forwards']:,} forwards; lost slots {one['slots_lost']}, cursors left {one['cursors_left']}"
        )


if __name__ == "__main__":
    sys.exit(main())
