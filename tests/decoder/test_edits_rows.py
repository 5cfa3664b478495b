"""What edited rows leave behind: kept logits, K/V names, slots held, graphs over tables that grew, states of several places."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from models import run_alone, tiny_decoder
from static_steps import captured_twice, in_operations, with_graphs
from test_edits_engine import EVERYWHERE, PROMPTS, answers, edit_of, told
from torch import Tensor

from raindecode import Decoder, Policy, Sampling
from raindecode.engine.branch import Ledger
from raindecode.engine.edits import EditBank
from raindecode.engine.types import Want
from raindecode.hidden_edits import TAPS, Site, Stage
from raindecode.mixture import SINGLE
from raindecode.policy.alignez.edits import AlignEZ, Positions
from raindecode.policy.alignez.schedule import Edits
from raindecode.search.context import SearchContext
from raindecode.search.evaluator import as_evaluator
from raindecode.search.rain import RAIN
from raindecode.search.scored import Scored
from rainkernels.errors import RangeError
from rainkernels.ops.edits import edit_


def test_kept_logits_are_those_of_the_same_edits() -> None:
    """A row of logits is held by tokens and edits; the path of a branch is its tokens, whatever their edits."""
    decoder = tiny_decoder("llama")
    ids = decoder.codec.encode(PROMPTS[0])
    full = Edits((edit_of(decoder),), 1).schedule(len(ids), {})[0]
    half = Edits((edit_of(decoder).scaled(0.5),), 1).schedule(len(ids), {})[0]

    def search(ledger: Ledger) -> Generator[Any, Any, list[Any]]:
        paths = [None, decoder.engine.hold(ledger, full), decoder.engine.hold(ledger, half)]
        rows = []
        for again in (False, True):
            for path in paths:
                branch = decoder.engine.open(ledger, ids, SINGLE, path)
                (got,) = yield [Want(branch, logits=True, keep=not again)]
                assert branch.tokens() == ids
                rows.append(got.logits)
        return rows

    rows = run_alone(decoder.engine, search)
    for i, row in enumerate(rows[:3]):
        np.testing.assert_array_equal(row, rows[3 + i])
        assert all(np.abs(row - other).max() > 1e-3 for other in rows[:i])


def test_an_edit_held_again_keeps_its_slot() -> None:
    """Ended, come again, and still there when every other slot is taken."""
    bank = EditBank(4, torch.device("cpu"), torch.float32)
    stages: Any = {0: [(Site(0, "mlp_out"), Stage(torch.eye(4)[:1], ("add",), (1.0,), (0.0,)))]}
    bank.hold(1, stages)
    bank.drop(1, [0])
    bank.hold(1, stages)
    for number in range(2, 20):
        bank.hold(number, stages)
    (column,) = bank._columns
    assert sorted(column.slot((number, 0)) for number in range(1, 20)) == list(range(1, 20))


def test_an_edit_that_does_not_fit_leaves_its_slot_free() -> None:
    bank = EditBank(4, torch.device("cpu"), torch.float32)
    good, zero = (Stage(rows, ("add",), (1.0,), (0.0,)) for rows in (torch.eye(4)[:1], torch.zeros(1, 4)))
    for number in range(1, 20):
        with pytest.raises(RangeError):
            bank.hold(number, {0: [(Site(0, "mlp_out"), good), (Site(1, "mlp_out"), zero)]})
    bank.hold(20, {0: [(Site(1, "mlp_out"), good)]})
    assert {site.table.num_slots for site in bank.sites} == {8}
    assert all(int(site.table.count.sum()) <= 1 for site in bank.sites)  # type: ignore[union-attr]


def test_graphs_follow_tables_that_grow() -> None:
    """Captured with small tables, then more edits than these hold: the graphs that read them are made anew, and once only."""
    decoder, other = tiny_decoder("llama"), tiny_decoder("llama")
    captures: list[int] = []

    def capture(run: Any) -> Any:
        captures.append(1)
        return captured_twice(run)

    graphs = with_graphs(decoder.engine, capture)
    in_operations(other.engine)
    few = [Policy(edits=edit_of(decoder, seed=seed)) for seed in range(2)]
    many = [Policy(edits=edit_of(decoder, seed=seed, k=3)) for seed in range(2, 22)]
    for policies in (few, many, few):
        ours = answers(decoder, policies, PROMPTS[:1] * len(policies), max_new_tokens=3)
        theirs = answers(other, policies, PROMPTS[:1] * len(policies), max_new_tokens=3)
        assert [done.token_ids for done in ours] == [done.token_ids for done in theirs]
        for one, two in zip(ours, theirs, strict=True):
            assert one.logprobs is not None
            assert two.logprobs is not None
            np.testing.assert_allclose(
                [p.logprob for p in one.logprobs], [p.logprob for p in two.logprobs], rtol=0, atol=1e-5
            )
        made = len(captures)
        decoder.engine.tree.clear()
        answers(decoder, policies, PROMPTS[:1] * len(policies), max_new_tokens=3)
        assert len(captures) == made
    assert graphs.replays == decoder.engine.model_steps


@pytest.mark.parametrize("lane", ["native", "operations", "modules"])
def test_states_of_all_places_at_once(lane: str) -> None:
    """Under edits too: each as alone, before the edits of its own place and behind those in front of it."""
    decoder = tiny_decoder("llama")
    if lane == "operations":
        in_operations(decoder.engine)
    elif lane == "modules":
        decoder.engine.runner.fused = None
    ids = decoder.codec.encode(PROMPTS[0])
    schedule = Edits((edit_of(decoder, positions=EVERYWHERE),), 1).schedule(len(ids), {})[0]
    sites = [Site(layer, tap) for layer in (0, 1) for tap in TAPS]

    def search(ledger: Ledger) -> Generator[Any, Any, list[Tensor]]:
        found = []
        for path in (None, decoder.engine.hold(ledger, schedule)):
            for wanted in (sites, *([site] for site in sites)):
                branch = decoder.engine.open(ledger, ids, SINGLE, path)
                (got,) = yield [Want(branch, taps=wanted, taps_from=1)]
                found.append(got.tapped)
        return found

    found = run_alone(decoder.engine, search)
    plain, edited = found[:7], found[7:]
    for together, *alone in (plain, edited):
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain[0][0], edited[0][0])  # nothing was edited in front of the first place
    assert all((plain[0][i] - edited[0][i]).abs().max() > 1e-2 for i in range(1, 6))


def test_two_bases_at_one_place_are_not_held_by_one_name() -> None:
    """One of them may drop out for a prompt, and the other must not be taken for it."""
    made = [
        torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(s))).Q[:8].contiguous()
        for s in (0, 1)
    ]
    site = Site(0, "mlp_out")
    stages = tuple((site, Stage(basis, ("tanh",) * 8, (1.0,) * 8, (0.0,) * 8)) for basis in made)
    edit = AlignEZ(stages=stages, select="cosine")
    decoder = tiny_decoder("llama")
    bank = decoder.engine.runner.edits
    for number, query in enumerate((-made[0].sum(0) - made[1].sum(0), made[0].sum(0)), start=1):
        resolved = edit.resolve({site: query})
        bank.hold(number, {0: resolved})
        row = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
        expected = row.double()
        for _, stage in resolved:
            u, alphas = stage.directions.double(), torch.tensor(stage.alphas).double()
            expected = expected + (alphas * torch.tanh(expected @ u.T)) @ u
        for _, _, table, column in bank.sites:
            edit_(row, table, torch.tensor([bank._columns[column].slot((number, 0))], dtype=torch.int32))
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-5)


def test_strengths_multiply() -> None:
    decoder = tiny_decoder("llama")
    edit = edit_of(decoder)
    twice, once = edit.scaled(0.5).scaled(0.5), edit.scaled(0.25)
    first, second = answers(decoder, [Policy(edits=twice), Policy(edits=once)], PROMPTS[:1] * 2)
    assert told([first]) == told([second])
    assert twice.strength == 0.25


def test_a_score_comes_from_the_unedited_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of edits can be compared, so `judge=True` is RAIN's alone."""
    decoder = Decoder.from_pretrained("testbed")
    judges = []
    inner = SearchContext.open_judge

    def watched(context: SearchContext, tokens: Any) -> Any:
        judges.append(inner(context, tokens))
        return judges[-1]

    monkeypatch.setattr(SearchContext, "open_judge", watched)
    edit = AlignEZ(stages=edit_of(decoder, ["mlp_out"]).stages, strength=0.2, judge=True, positions=Positions("last"))
    requests = decoder.requests(["How do I smash the lamp of the tailor?"], policy=Policy(edits=edit), max_new_tokens=4)
    search = Scored(Sampling(), as_evaluator(RAIN.preset("town").evaluator))
    ((_, done),) = decoder.stream(requests, search=search)
    assert not isinstance(done, BaseException)
    assert done.value is not None
    assert judges
    assert not any(branch.is_edited for branch in judges)
