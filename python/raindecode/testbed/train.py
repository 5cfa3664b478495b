"""Rebuild the testbed from nothing: ``python -m raindecode.testbed.train --out DIR [--stage ...] [--quick]``.

Three stages with fixed seeds and fixed step counts: the tokenizer, the base model, the DPO adapter. Measured at 18
minutes on two shared CPU cores. `DIR/base` and `DIR/adapter` are what the package carries under `testbed/weights`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

from raindecode.testbed.adapter import AdapterSettings, train_adapter
from raindecode.testbed.base import BaseSettings, StepReport, train_base
from raindecode.testbed.lora import save_adapter
from raindecode.testbed.model import save_model
from raindecode.testbed.tokenizer import save_tokenizer, train_tokenizer

STAGES: Final = ("tokenizer", "base", "adapter")
_QUICK_BASE: Final = {"steps": 6, "tokens_per_batch": 1024, "documents_per_block": 60}
_QUICK_ADAPTER: Final = {"steps": 2, "pairs_per_batch": 4}


def run_stages(stages: Sequence[str], out: Path, *, seed: int, quick: bool, compiled: bool, console: Console) -> None:
    """Run `stages` in order; a later stage reads what an earlier one wrote to `out`."""
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        for stage in stages:
            if stage == "tokenizer":
                save_tokenizer(train_tokenizer(seed=seed), out / "base")
            elif stage == "base":
                _base_stage(out, BaseSettings(seed=seed, **(_QUICK_BASE if quick else {})), compiled, progress)
            else:
                _adapter_stage(out, AdapterSettings(seed=seed, **(_QUICK_ADAPTER if quick else {})), progress)


def _base_stage(out: Path, settings: BaseSettings, compiled: bool, progress: Progress) -> None:
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    task = progress.add_task("base", total=settings.steps, note="")
    mean_loss, mean_right = 0.0, 0.5

    def report(step: StepReport) -> None:
        nonlocal mean_loss, mean_right
        mean_loss = step.loss if step.step == 0 else 0.95 * mean_loss + 0.05 * step.loss
        if step.letters_right is not None:
            mean_right = 0.95 * mean_right + 0.05 * step.letters_right
        progress.update(task, completed=step.step + 1, note=f"loss {mean_loss:.3f}, letters {mean_right:.1%}")

    save_model(train_base(tokenizer, settings, compiled=compiled, report=report), out / "base")


def _adapter_stage(out: Path, settings: AdapterSettings, progress: Progress) -> None:
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    task = progress.add_task("adapter", total=settings.steps, note="")

    def report(step: int, loss: float, right: float) -> None:
        progress.update(task, completed=step + 1, note=f"loss {loss:.3f}, pairs {right:.0%}")

    updates = train_adapter(base, tokenizer, settings, report=report)
    save_adapter(updates, out / "adapter", rank=settings.rank, alpha=settings.alpha)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m raindecode.testbed.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write base/ and adapter/ to")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--quick", action="store_true", help="a handful of steps, to see that everything runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile: slower, needs no C++ compiler")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    stages = STAGES if options.stage == "all" else (options.stage,)
    compiled = not (options.no_compile or options.quick)
    run_stages(stages, options.out, seed=options.seed, quick=options.quick, compiled=compiled, console=console)
    console.print(f"wrote {', '.join(stages)} to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
