"""What bench_alignez.py times apart from whole steps: the parts an edit adds to a step, and fits beside their forwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from alignez_engines import BASES, OURS, Engines
from kernel_bench.measure import CpuTimer, Run, alternate, make_timer, paired_ratio, quartiles
from naive.alignez import Edit, Folded

from raindecode import Decoder
from raindecode.commands.fitting import Timed
from raindecode.engine.batch import Part
from raindecode.engine.edits import EditBank, RowEdits
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.pairs import Pair
from rainkernels.ops.edits import add_edit_rmsnorm

Row = dict[str, Any]
Tick = Callable[[str], None]


# ---- the parts of a step ------------------------------------------------------------------------------------------------------
class _Places:
    """All layers' fused norm of one step: a row per request, and the tables of its edits."""

    def __init__(self, engines: Engines, names: Sequence[str]) -> None:
        model = engines.model
        rows, hidden = len(engines.prompts), model.config.hidden_size
        self.layers = model.config.num_hidden_layers
        place: Row = {"device": model.device, "dtype": model.dtype}
        noise = torch.Generator().manual_seed(3)
        self.x, self.residual = (torch.randn(rows, hidden, generator=noise).to(**place) for _ in range(2))
        self.weight, self.out = torch.ones(hidden, **place), torch.empty(rows, hidden, **place)
        self.banks: dict[str, tuple[EditBank, list[Part]]] = {}
        for name in names:
            edits = dict.fromkeys(policy.edits[0] for policy in engines.policies[name])  # type: ignore[index]
            bank = EditBank(hidden, model.device, model.dtype)
            for number, edit in enumerate(edits, 1):
                bank.hold(number, {0: edit.resolve()})
            numbers = np.arange(1, rows + 1) if len(edits) > 1 else np.ones(rows)
            batch: Any = SimpleNamespace(edits=numbers.astype(np.int64), num_rows=rows)
            self.banks[name] = bank, [Part(0, batch)]

    def lookup(self, name: str) -> Run:
        """What the host adds to a step: the slot of every row, and what the forward is handed."""
        bank, parts = self.banks[name]

        def run() -> object:
            slots = bank.slots(parts)
            assert slots is not None
            return RowEdits(bank.sites, slots)

        return run

    def norms(self, name: str | None) -> Run:
        """Residual add, edit and norm of all layers; None for no edit."""
        tables: list[tuple[Any, Any]] = [(None, None)] * self.layers
        if name is not None:
            bank, parts = self.banks[name]
            slots = bank.slots(parts)
            assert slots is not None
            slots = slots.to(self.x.device)
            tables = [(site.table, slots[site.column]) for site in bank.sites]

        def run() -> None:
            for table, slot in tables:
                add_edit_rmsnorm(self.x, self.residual, self.weight, table, slot, eps=1e-5, out=self.out)

        return run


def parts_ms(engines: Engines, repeats: int) -> Row:
    """Milliseconds of the parts that edits add to a step, alone, contenders in turns; median and quartiles.

    `added`: of raindecode the slot lookup, and the fused norms of all layers less the same norms without tables; of
    transformers the arithmetic of the hooks, without what Python adds around it.
    """
    places = _Places(engines, ("edits", "edits_256"))
    timer, host = make_timer(engines.model.device), CpuTimer()
    runs = {
        "norms": places.norms(None),
        "norms_edits": places.norms("edits"),
        "norms_edits_256": places.norms("edits_256"),
    }
    runs |= {name: _folded(engines, name) for name in ("hooks", "hooks_256")}
    lookups = {f"lookup_{name}": places.lookup(name) for name in ("edits", "edits_256")}
    with torch.inference_mode():
        prepared = {label: timer.prepare([run]) for label, run in runs.items()}
        prepared |= {label: host.prepare([run]) for label, run in lookups.items()}
        samples = {
            label: [us / 1e3 for us in taken] for label, taken in alternate(prepared, repeats, float("inf")).items()
        }
    for name in ("edits", "edits_256"):
        sums = zip(samples[f"norms_{name}"], samples["norms"], samples[f"lookup_{name}"], strict=True)
        samples[f"added_{name}"] = [norms - bare + lookup for norms, bare, lookup in sums]
    found = {label: _spread(taken) for label, taken in samples.items()}
    added = {name: found[f"added_{name}"]["median"] for name in ("edits", "edits_256")}
    return {"added_ms": added | {name: found[name]["median"] for name in ("hooks", "hooks_256")}, "ms": found}


def _folded(engines: Engines, name: str) -> Run:
    """The arithmetic of all layers' hooks on the step's rows."""
    model, rows = engines.model, len(engines.prompts)
    stacked = engines.shared if name == "hooks" else torch.stack(engines.own, dim=1)
    folded = [Folded(Edit(u, engines.ops), model.dtype, model.device) for u in stacked]
    hidden = torch.randn(rows, 1, model.config.hidden_size).to(model.device, model.dtype)

    def run() -> None:
        for each in folded:
            each.apply(hidden)

    return run


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = quartiles(values)
    return {"median": middle, "q1": low, "q3": high}


# ---- one decode, edited and not ------------------------------------------------------------------------------------------------
def toggled_ms(engines: Engines, rounds: int, pairs: int, tick: Tick) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of a decode's steps with its edits and without, `pairs` of them in each of `rounds` decodes, by engine.

    Two decodes differ by where their caches lie, which is worth some percent of a step, and more than edits are. Here one
    decode takes its edits off for every other step (on, off, off, on, ...), so that nothing else differs. What it decodes then
    is nobody's answer, but as long.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in BASES}
    for name in (name for _ in range(rounds) for name in BASES):
        decode = engines.begin(name, 2 * pairs)
        switch = _switch(engines, name)
        for pair in range(pairs):
            taken = {}
            for on in (True, False) if pair % 2 == 0 else (False, True):
                with nullcontext() if on else switch():
                    begin = time.perf_counter()
                    decode.step()
                    taken[on] = (time.perf_counter() - begin) * 1e3
            found[name].append((taken[True], taken[False]))
            tick(f"{name}, on and off")
        decode.end()
    return found


def _switch(engines: Engines, name: str) -> Callable[[], AbstractContextManager[None]]:
    """What takes the edits of a decode off for a while."""
    if name in OURS:
        bank: Any = engines.decoders[name].engine.runner.edits  # type: ignore[index]

        @contextmanager
        def without_slots() -> Iterator[None]:
            bank.slots = lambda parts: None
            try:
                yield
            finally:
                del bank.slots

        return without_slots
    hooks: Any = engines.hooked[name]

    @contextmanager
    def without_hooks() -> Iterator[None]:
        hooks.remove()
        try:
            yield
        finally:
            hooks.attach()

    return without_hooks


# ---- fits ---------------------------------------------------------------------------------------------------------------------
def draw_pairs(tokenizer: Any, count: int) -> list[Pair]:
    """Pairs of random words: questions of 16 tokens, answers and what elicited them of 16 to 32 more."""
    rng = np.random.default_rng(4)

    def text(tokens: int) -> str:
        return str(tokenizer.decode(rng.integers(3, len(tokenizer), tokens).tolist(), skip_special_tokens=True))

    pairs = []
    for _ in range(count):
        prompt, lengths = text(16), rng.integers(16, 33, 4)
        chosen, rejected, wanted, unwanted = (" " + text(int(tokens)) for tokens in lengths)
        pairs.append(Pair(prompt, chosen, rejected, chosen_prompt=prompt + wanted, rejected_prompt=prompt + unwanted))
    return pairs


def fits(decoder: Decoder, pairs: Sequence[Pair], presets: Sequence[str], rounds: int, tick: Tick) -> Row:
    """Seconds of each preset's fit and of the forwards in it; nothing is cached before.

    Forwards that do the same work twice differ by more than what a fit adds to them, so both are taken from the same fit.

    Returns:
        fit_s, forwards_s: medians by preset; fit_ratio: median and quartiles of the ratios fit by fit.
    """
    found: Row = {"fit_s": {}, "forwards_s": {}, "fit_ratio": {}}
    decoder.activations([(pair.prompt, pair.chosen) for pair in pairs[:2]])  # warm
    for name in presets:
        fit, forwards = [], []
        for turn in range(rounds):
            tick(f"round {turn + 1}, {name}")
            decoder.engine.tree.clear()
            timed, begin = Timed(decoder), time.perf_counter()
            AlignEZ.fit(timed, pairs, name, progress=False)
            fit.append(time.perf_counter() - begin)
            forwards.append(timed.seconds)
        found["fit_s"][name], found["forwards_s"][name] = quartiles(fit)[1], quartiles(forwards)[1]
        found["fit_ratio"][name] = paired_ratio(fit, forwards)
    return found


__all__ = ["draw_pairs", "fits", "parts_ms"]
