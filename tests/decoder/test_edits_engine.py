"""Edits of hidden states in the engine, against a float64 forward of transformers with hooks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from edit_oracle import edited_logits, unit
from models import READABLE, tiny_decoder, tiny_model
from static_steps import in_operations, with_graphs
from torch import Tensor

from raindecode import RAIN, Completion, Decoder, Policy, Sampling
from raindecode.engine import edit_hooks, edits
from raindecode.engine.branch import Branch
from raindecode.engine.edits import EditBank, EditNumbers
from raindecode.engine.engine import Engine
from raindecode.engine.model_facts import identity_of
from raindecode.errors import ConfigError, UnsupportedModelError
from raindecode.hidden_edits import TAPS, RowEdit, Site, Stage, Tap
from raindecode.policy.alignez.edits import AlignEZ, Examples, Positions
from raindecode.search.context import SearchContext
from rainkernels.errors import RangeError
from rainkernels.ops.edits import edit_

PROMPTS = ["the inner", "on a", "a"]
EVERYWHERE = Positions("all")
OPS = ("project", "boost", "set", "add", "tanh")


def edit_of(
    decoder: Decoder, taps: Sequence[Tap] = TAPS, *, k: int = 2, seed: int = 0, norm: Any = "none", positions: Positions = EVERYWHERE,
    layers: Sequence[int] = (0, 1),
) -> AlignEZ:  # fmt: skip
    """Some directions at every site with operations that differ, none of them weak."""
    hidden = decoder.identities[0].hidden_size
    stages = []
    for i, site in enumerate(Site(layer, tap) for layer in layers for tap in taps):
        ops: Any = tuple(OPS[(i + j) % len(OPS)] for j in range(k))
        alphas = tuple(1.0 + 0.25 * j for j in range(k))
        stages.append(
            (site, Stage(unit(k, hidden, 100 * seed + i), ops, alphas, tuple(0.5 * (j + 1) for j in range(k)), norm))
        )
    return AlignEZ(stages=tuple(stages), positions=positions)


def answers(decoder: Decoder, policies: Any, prompts: Sequence[str] = PROMPTS, **options: Any) -> list[Completion]:
    options = {"search": Sampling(temperature=0.0, ignore_eos=True, logprobs=True), "max_new_tokens": 6} | options
    return decoder.generate(list(prompts), policy=policies, **options)


def told(done: Sequence[Completion]) -> list[Any]:
    return [(c.token_ids, c.logprobs, c.stats.tokens_processed) for c in done]


def assert_as_oracle(model: Any, decoder: Decoder, done: Completion, prompt: str, edit: AlignEZ) -> None:
    """Every token is the likeliest under the oracle, with the oracle's log-probability."""
    ids = decoder.codec.encode(prompt)
    whole = ids + done.token_ids
    end = len(whole)
    spans = edit.positions.spans(len(ids))
    rows = [at for start, stop in spans for at in range(start, min(end, end if stop is None else stop))]
    logits = edited_logits(model, whole, edit.resolve(), rows)[len(ids) - 1 : -1]
    logprobs = torch.log_softmax(logits, -1)
    assert done.logprobs is not None
    for step, (token, own) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        # A relative error of 1e-5 of the largest logit: what the issue asks of float32.
        bound = 1e-5 * float(logits[step].abs().max()) + 1e-6
        assert logits[step, token] >= logits[step].max() - bound
        assert abs(own.logprob - float(logprobs[step, token])) <= 2 * bound


# ---- exactness --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "qwen2", "gemma2", "gpt_neox", "gpt2"])
def test_edits_equal_a_float64_forward_with_hooks(family: str, tap: Tap) -> None:
    model = tiny_model(family, vocab_size=READABLE)
    decoder = tiny_decoder(family)
    edit = edit_of(decoder, [tap])
    plain = answers(decoder, Policy())
    for prompt, done, without in zip(PROMPTS, answers(decoder, Policy(edits=edit)), plain, strict=True):
        assert_as_oracle(model, decoder, done, prompt, edit)
        assert done.logprobs != without.logprobs


@pytest.mark.parametrize("norm", ["preserve", "cap"])
@pytest.mark.parametrize("lane", ["native", "operations", "graphs", "modules"])
def test_all_taps_at_once_on_every_path(lane: str, norm: str) -> None:
    model, decoder = tiny_model("llama", vocab_size=READABLE), tiny_decoder("llama")
    graphs = None
    if lane == "operations":
        in_operations(decoder.engine)
    elif lane == "graphs":
        graphs = with_graphs(decoder.engine)
    elif lane == "modules":
        decoder.engine.runner.fused = None
    edit = edit_of(decoder, norm=norm, k=3)
    for prompt, done in zip(PROMPTS, answers(decoder, Policy(edits=edit)), strict=True):
        assert_as_oracle(model, decoder, done, prompt, edit)
    assert graphs is None or graphs.replays == decoder.engine.model_steps > 0


@pytest.mark.parametrize(
    "positions",
    [
        Positions("none"),
        Positions("last"),
        Positions("all", end=0),
        Positions("last", first=2, end=4),
        Positions("none", first=1),
    ],
)
def test_positions(positions: Positions) -> None:
    model, decoder = tiny_model("llama", vocab_size=READABLE), tiny_decoder("llama")
    edit = edit_of(decoder, positions=positions)
    for prompt, done in zip(PROMPTS, answers(decoder, Policy(edits=edit)), strict=True):
        assert_as_oracle(model, decoder, done, prompt, edit)


def test_several_edits_run_in_their_order() -> None:
    model, decoder = tiny_model("llama", vocab_size=READABLE), tiny_decoder("llama")
    first, second = edit_of(decoder, norm="preserve"), edit_of(decoder, seed=1)
    both = AlignEZ(stages=first.stages + second.stages, positions=EVERYWHERE)
    turned = AlignEZ(stages=second.stages + first.stages, positions=EVERYWHERE)
    ours = answers(decoder, [Policy(edits=[first, second]), Policy(edits=[second, first]), Policy(edits=first)])
    for prompt, done, edit in zip(PROMPTS, ours, (both, turned, first), strict=True):
        assert_as_oracle(model, decoder, done, prompt, edit)


def test_edits_with_positions_of_their_own() -> None:
    """One edits the prompt, another what follows: each row has what is active there."""
    decoder = tiny_decoder("llama")
    prompt_only = edit_of(decoder, positions=Positions("all", end=0))
    after = edit_of(decoder, positions=Positions("none"))
    everywhere = edit_of(decoder)
    split, whole = answers(decoder, [Policy(edits=[prompt_only, after]), Policy(edits=everywhere)], [PROMPTS[0]] * 2)
    assert told([split]) == told([whole])


# ---- what an edit leaves alone ------------------------------------------------------------------------------------------
def test_company_changes_nothing() -> None:
    """Exact mode: edited and unedited requests have the bits they have alone, whoever else is in the batch."""
    decoder = tiny_decoder("llama")
    policies = [Policy(), *(Policy(edits=edit_of(decoder, seed=s, k=1 + s % 3)) for s in range(11))]
    prompts = [PROMPTS[i % 3] for i in range(12)]
    together = answers(decoder, policies, prompts)
    decoder.engine.tree.clear()
    alone = [answers(decoder, [policy], [prompt])[0] for policy, prompt in zip(policies, prompts, strict=True)]
    assert told(together) == told(alone)
    assert told([answers(tiny_decoder("llama"), Policy(), PROMPTS[:1])[0]]) == told(together[:1])


@pytest.mark.parametrize("nothing", ["strength", "alphas", "positions"])
def test_an_edit_that_does_nothing_is_none(nothing: str) -> None:
    """The same bits, and the same K/V: a second request finds all of the first's."""
    decoder = tiny_decoder("llama")
    edit = edit_of(decoder)
    if nothing == "strength":
        edit = edit.scaled(0.0)
    elif nothing == "alphas":
        stages = tuple((site, Stage(s.directions, s.ops, (0.0,) * 2, s.targets)) for site, s in edit.stages)
        edit = AlignEZ(stages=stages, positions=EVERYWHERE)
    else:
        edit = AlignEZ(stages=edit.stages, positions=Positions("none", end=0))
    plain = answers(decoder, Policy())
    again = answers(decoder, Policy(edits=edit))
    assert told(again) == told(plain)
    assert sum(c.stats.tokens_charged for c in again) <= sum(len(c.token_ids) for c in again)


def test_unedited_rows_are_shared_and_edited_ones_never() -> None:
    decoder = tiny_decoder("llama")
    prompt = "the inner on a the inner on a"
    length = len(decoder.codec.encode(prompt))
    late, early = edit_of(decoder, positions=Positions("last")), edit_of(decoder, positions=EVERYWHERE)
    charged = []
    for policy in (
        Policy(),
        Policy(edits=late),
        Policy(edits=early),
        Policy(edits=late.scaled(0.5)),
        Policy(edits=late),
    ):
        (done,) = answers(decoder, policy, [prompt], max_new_tokens=1)
        charged.append(done.stats.tokens_charged)
    # Alone everything; but for the last token all is the first's; nothing; as the second; and of the second all but its logits.
    assert charged == [length, 1, length, 1, 1]


def test_slots_grow_and_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """More edits at a time than a table began with, then others in their slots: answers as of a fresh decoder."""
    decoder = tiny_decoder("llama")
    edits = [edit_of(decoder, seed=s) for s in range(40)]
    first = answers(decoder, [Policy(edits=e) for e in edits[:30]], [PROMPTS[0]] * 30, max_new_tokens=2)
    second = answers(decoder, [Policy(edits=e) for e in edits[10:]], [PROMPTS[0]] * 30, max_new_tokens=2)
    assert decoder.engine.runner.edits.num_columns == 1
    assert told(first[10:]) == told(second[:20])
    for index in (0, 25, 39):
        fresh = answers(tiny_decoder("llama"), Policy(edits=edits[index]), PROMPTS[:1], max_new_tokens=2)
        mine = (first + second[20:])[index]
        assert told(fresh) == told([mine])
    (column,) = decoder.engine.runner.edits._columns
    assert not column._held  # every request gave its slots back
    assert {table.num_slots for table in column.tables.values()} == {32}


def test_many_orthonormal_directions_are_held_once() -> None:
    model, decoder = tiny_model("llama", vocab_size=READABLE), tiny_decoder("llama")
    hidden = decoder.identities[0].hidden_size
    basis = (
        torch.linalg.qr(torch.randn(hidden, 20, generator=torch.Generator().manual_seed(1)).double())
        .Q.T.float()
        .contiguous()
    )
    stages = tuple((Site(layer, "mlp_out"), Stage(basis, ("tanh",) * 20, (1.0,) * 20, (0.0,) * 20)) for layer in (0, 1))
    edit = AlignEZ(stages=stages, positions=EVERYWHERE)
    ours = answers(decoder, [Policy(edits=edit), Policy(edits=edit.scaled(0.5)), Policy(edits=edit.scaled(-2.0))])
    for prompt, done, strength in zip(PROMPTS, ours, (1.0, 0.5, -2.0), strict=True):
        assert_as_oracle(model, decoder, done, prompt, edit.scaled(strength))
    (column,) = decoder.engine.runner.edits._columns
    assert column.basis == edit.name


# ---- by the prompt --------------------------------------------------------------------------------------------------------
def last_states(decoder: Decoder, prompt: str, sites: Sequence[Site]) -> dict[Site, Tensor]:
    states = decoder.activations([(prompt, "")], layers=[s.layer for s in sites], tap=sites[0].tap)
    return dict(zip(sites, states[:, 0], strict=True))


def test_the_cosine_filter_goes_by_the_prompt() -> None:
    decoder = tiny_decoder("llama")
    hidden = decoder.identities[0].hidden_size
    sites = [Site(0, "mlp_out"), Site(1, "mlp_out")]
    basis = (
        torch.linalg.qr(torch.randn(hidden, 12, generator=torch.Generator().manual_seed(2)).double())
        .Q.T.float()
        .contiguous()
    )
    stages = tuple((site, Stage(basis, ("tanh",) * 12, (1.0,) * 12, (0.0,) * 12)) for site in sites)
    edit = AlignEZ(stages=stages, select="cosine", positions=Positions("last"))
    ours = answers(decoder, Policy(edits=edit))
    masks = []
    for prompt, done in zip(PROMPTS, ours, strict=True):
        states = last_states(decoder, prompt, sites)
        keep = {site: (basis.double() @ states[site].double()) <= 0 for site in sites}
        masks.append(tuple(tuple(keep[site].tolist()) for site in sites))
        chosen = tuple(
            (site, Stage(basis[keep[site]], ("tanh",) * n, (1.0,) * n, (0.0,) * n)) for site in sites if (n := int(keep[site].sum()))
        )  # fmt: skip
        assert_as_oracle(
            tiny_model("llama", vocab_size=READABLE),
            decoder,
            done,
            prompt,
            AlignEZ(stages=chosen, positions=Positions("last")),
        )
        assert done.stats.tokens_charged <= len(decoder.codec.encode(prompt)) + 6 + 1  # the prompt ran once
    assert len(set(masks)) > 1


def test_neighbours_go_by_the_prompt() -> None:
    decoder = tiny_decoder("llama")
    hidden = decoder.identities[0].hidden_size
    site = Site(1, "mlp_out")
    made = torch.Generator().manual_seed(3)
    examples = Examples(*(torch.randn(9, hidden, generator=made) for _ in range(3)))
    recipe: Any = (("harmful", "project", 1.0), ("helpful", "boost", 1.0))
    edit = AlignEZ(select="knn", neighbours=3, examples={site: examples}, recipe=recipe, positions=Positions("last"))
    for prompt, done in zip(PROMPTS, answers(decoder, Policy(edits=edit)), strict=True):
        query = last_states(decoder, prompt, [site])[site].double()
        cosines = torch.nn.functional.cosine_similarity(examples.queries.double(), query[None])
        near = cosines.topk(3).indices
        stages = []
        for group, op in ((examples.harmful, "project"), (examples.helpful, "boost")):
            direction = torch.linalg.svd(group[near].double(), full_matrices=False).Vh[:1].float()
            stages.append((site, Stage(direction, (op,), (1.0,), (0.0,))))  # type: ignore[arg-type]
        assert_as_oracle(
            tiny_model("llama", vocab_size=READABLE),
            decoder,
            done,
            prompt,
            AlignEZ(stages=tuple(stages), positions=Positions("last")),
        )


def test_columns_nobody_uses_go_away() -> None:
    """Each basis has a column of its own; of many, those of ended requests are forgotten, and come back where needed."""
    decoder = tiny_decoder("llama")
    hidden = decoder.identities[0].hidden_size
    edits = []
    for seed in range(20):
        made = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(hidden, 8, generator=made).double()).Q.T.float().contiguous()
        stage = Stage(basis, ("project",) * 8, (1.0,) * 8, (0.0,) * 8)
        edits.append(AlignEZ(stages=((Site(1, "mlp_out"), stage),), positions=EVERYWHERE))
    one_by_one = [answers(decoder, Policy(edits=edit), PROMPTS[:1], max_new_tokens=2)[0] for edit in edits]
    assert decoder.engine.runner.edits.num_columns <= 9
    together = answers(decoder, [Policy(edits=edit) for edit in edits], PROMPTS[:1] * 20, max_new_tokens=2)
    assert decoder.engine.runner.edits.num_columns >= 20
    fresh = answers(tiny_decoder("llama"), Policy(edits=edits[3]), PROMPTS[:1], max_new_tokens=2)
    assert told(one_by_one) == told(together)
    assert told(fresh) == told(together)[3:4]
    answers(decoder, Policy(edits=edit_of(decoder)), PROMPTS[:1], max_new_tokens=2)
    assert decoder.engine.runner.edits.num_columns == 1


def test_an_edit_whose_columns_went_away_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot in a column that stayed is forgotten when its order asks for another one."""
    monkeypatch.setattr(edits, "_MANY_COLUMNS", 1)
    bank = EditBank(4, torch.device("cpu"), torch.float32)
    site = Site(0, "mlp_out")
    own = Stage(torch.eye(4)[:1], ("add",), (1.0,), (0.0,))
    shared = Stage(torch.eye(4), ("add",) * 4, (1.0,) * 4, (0.0,) * 4, basis="a")
    bank.hold(1, {0: [(site, shared), (site, own)]})
    bank.hold(2, {0: [(site, own), (site, shared)]})
    bank.drop(1, [0])
    bank.hold(1, {0: [(site, shared), (site, own)]})
    for number, order in ((1, ["a", ""]), (2, ["", "a"])):
        assert [column.basis for column in bank._columns if column.slot((number, 0))] == order


def test_an_edit_whose_columns_were_others_has_every_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that stayed may hold another part of the edit than the one it is to hold now."""
    monkeypatch.setattr(edits, "_MANY_COLUMNS", 1)
    bank = EditBank(4, torch.device("cpu"), torch.float32)
    first, second = Site(0, "mlp_out"), Site(1, "mlp_out")
    own = Stage(torch.eye(4)[:1], ("add",), (1.0,), (0.0,))
    shared = Stage(torch.eye(4), ("add",) * 4, (1.0,) * 4, (0.0,) * 4, basis="a")
    both: Any = {0: [(first, shared), (first, own), (second, own)]}
    bank.hold(1, both)
    bank.hold(2, {0: [(first, shared), (first, own)]})
    (stays,) = [column for column in bank._columns if not column.basis]
    bank.drop(1, [0])
    monkeypatch.setattr(bank, "_columns", [stays])  # as if only that one were in use
    bank.hold(1, both)
    for site, expected in ((first, [2.0, 1.0, 1.0, 1.0]), (second, [1.0, 0.0, 0.0, 0.0])):
        row = torch.zeros(1, 4)
        for layer, tap, table, column in bank.sites:
            if (layer, tap) == site:
                edit_(row, table, torch.tensor([bank._columns[column].slot((1, 0))], dtype=torch.int32))
        assert row.tolist() == [expected]


def test_more_directions_at_a_place_than_a_table_holds() -> None:
    model, decoder = tiny_model("llama", vocab_size=READABLE), tiny_decoder("llama")
    parts = [edit_of(decoder, ["mlp_out"], k=100, seed=seed).scaled(0.1) for seed in range(3)]
    whole = AlignEZ(stages=tuple(stage for part in parts for stage in part.stages), strength=0.1, positions=EVERYWHERE)
    (done,) = answers(decoder, Policy(edits=parts), PROMPTS[:1])
    assert_as_oracle(model, decoder, done, PROMPTS[0], whole)


def test_an_edit_that_does_not_fit_leaves_no_slot_held(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = EditBank(4, torch.device("cpu"), torch.float32)
    site = Site(0, "mlp_out")
    good, bad = (Stage(rows, ("add",), (1.0,), (0.0,)) for rows in (torch.eye(4)[:1], torch.zeros(1, 4)))
    with pytest.raises(RangeError, match="zero vector"):
        bank.hold(1, {0: [(site, good)], 1: [(Site(1, "mlp_out"), good), (site, bad)]})
    (column,) = bank._columns
    assert not column.is_held
    assert column.slot((1, 1)) == 0
    bank.hold(2, {0: [(site, good)]})
    assert [table.column for table in bank.sites] == [0, 0]


def test_names_that_were_forgotten_get_new_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EditNumbers, "_MOST", 2)
    numbers = EditNumbers()
    a, b, c = (RowEdit(name, {}) for name in "abc")
    assert [numbers.of(edit) for edit in (None, a, b, a, c, a, b)] == [0, 1, 2, 1, 3, 1, 4]


# ---- RAIN ------------------------------------------------------------------------------------------------------------------
def test_rain_searches_the_edited_model_and_an_unedited_one_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder.from_pretrained("testbed")
    judges: list[bool] = []
    inner = SearchContext.open_judge

    def watched(context: SearchContext, tokens: Sequence[int]) -> Branch:
        branch = inner(context, tokens)
        judges.append(branch.is_edited)
        return branch

    monkeypatch.setattr(SearchContext, "open_judge", watched)
    edit = edit_of(decoder, ["mlp_out"]).scaled(0.2)
    prompts = ["How do I smash the lamp of the tailor?"] * 2
    runs = {}
    for width in (1, 4):
        decoder.engine.tree.clear()
        search = RAIN.preset("town", max_iterations=4, width=width)
        policies = [Policy(edits=edit), Policy()]
        runs[width] = decoder.generate(prompts, search=search, policy=policies, max_new_tokens=12, seed=[1, 1])
    assert found(runs[1]) == found(runs[4])
    assert found(runs[1])[0] != found(runs[1])[1]
    alone = decoder.generate(prompts[:1], search=search, policy=Policy(edits=edit), max_new_tokens=12, seed=1)
    assert found(alone) == found(runs[1])[:1]
    assert judges
    assert not any(judges)
    judges.clear()
    both = AlignEZ(stages=edit.stages, strength=0.2, judge=True, positions=EVERYWHERE)
    decoder.generate(prompts[:1], search=search, policy=Policy(edits=both), max_new_tokens=12, seed=1)
    assert judges
    assert all(judges)


def found(done: Sequence[Completion]) -> list[Any]:
    return [(c.token_ids, c.value, c.stats.iterations, c.stats.tokens_processed) for c in done]


# ---- errors ----------------------------------------------------------------------------------------------------------------
def bad_edits() -> list[tuple[str, Any, str]]:
    wide = lambda: AlignEZ.from_directions({0: torch.ones(1, 32)}, op="add")  # noqa: E731
    deep = lambda: AlignEZ.from_directions({9: torch.ones(1, 64)}, op="add")  # noqa: E731
    half = lambda: AlignEZ(stages=AlignEZ.from_directions({0: torch.ones(64)}, op="add").stages, on="aligned")  # noqa: E731
    return [
        ("hidden size", wide, "hidden size of 32, model 0 of this decoder has 64"),
        ("layer", deep, "layer 9, model 0 of this decoder has layers 0 to 1"),
        ("no aligned model", half, "has the reference only"),
        ("operation", lambda: AlignEZ.from_directions({0: torch.ones(64)}, op="erase"), "allowed: project"),
        ("zero", lambda: AlignEZ.from_directions({0: torch.zeros(64)}, op="add"), "zero or non-finite"),
        ("nan", lambda: AlignEZ.from_directions({0: torch.full((64,), float("nan"))}, op="add"), "non-finite"),
        ("tap", lambda: AlignEZ.from_directions({0: torch.ones(64)}, op="add", tap="q_proj"), "allowed: attn_out"),
        ("strength", lambda: AlignEZ.from_directions({0: torch.ones(64)}, op="add").scaled(float("inf")), "finite number"),
        ("alphas", lambda: AlignEZ.from_directions({0: torch.ones(64)}, op="add", alpha=[1.0, 2.0]), "2 values for 1 directions"),
        ("nothing", AlignEZ, "no directions"),
        ("positions", lambda: Positions("first"), "allowed: 'all'"),  # type: ignore[arg-type]
        ("policy", lambda: Policy(edits="helpful.safetensors"), "AlignEZ.load"),  # type: ignore[arg-type]
    ]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in bad_edits()], ids=[case[0] for case in bad_edits()])
def test_bad_edits_are_refused_before_anything_runs(make: Any, message: str) -> None:
    decoder = tiny_decoder("llama")
    steps = decoder.engine.model_steps
    with pytest.raises(ConfigError, match=message):
        answers(decoder, Policy(edits=make()))
    assert decoder.engine.model_steps == steps


def test_an_orthonormal_basis_spans_what_was_given() -> None:
    """Also behind a direction that adds nothing."""
    first, second, third = unit(3, 64, 5)
    given = torch.stack([first, first, second, first - second, third, third])
    ((_, stage),) = AlignEZ.from_directions({0: given}, op="project", order="orthonormal").stages
    basis = stage.directions.double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(given.double() @ basis.T @ basis, given.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis[0].float(), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 10**400}, "finite number"),
        ({"strength": 1e39}, "allowed: up to 3.4e"),
        ({"directions": torch.zeros(1, 64)}, "another length than 1"),
        ({"directions": torch.full((1, 64), 1.0)}, "another length than 1"),
        ({"directions": torch.tensor(1.0)}, "finite float32"),
        ({"directions": torch.eye(64)[:1].requires_grad_()}, "finite float32"),
        ({"directions": torch.eye(64, device="meta")[:1]}, "on the cpu"),
        ({"site": (0, "mlp_out")}, "no Site"),
        ({"site": Site(0, "q_proj")}, "allowed: attn_out"),  # type: ignore[arg-type]
        ({"alphas": (10**400,)}, "finite number"),
        ({"targets": (1e39,)}, "allowed: up to 3.4e"),
    ],
)  # fmt: skip
def test_stages_of_your_own_are_checked(change: dict[str, Any], message: str) -> None:
    given = {
        "directions": torch.eye(64)[:1],
        "alphas": (1.0,),
        "targets": (0.0,),
        "strength": 1.0,
        "site": Site(0, "mlp_out"),
    }
    given |= change
    with pytest.raises(ConfigError, match=message):
        AlignEZ(
            stages=((given["site"], Stage(given["directions"], ("add",), given["alphas"], given["targets"])),),  # type: ignore[arg-type]
            strength=given["strength"],  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(
    ("site", "states", "message"),
    [
        (Site(-1, "mlp_out"), [(4, 64)] * 3, "layers from 0"),
        (Site("0", "mlp_out"), [(4, 64)] * 3, "layers from 0"),  # type: ignore[arg-type]
        (Site(0, "q_proj"), [(4, 64)] * 3, "allowed: attn_out"),  # type: ignore[arg-type]
        (Site(0, "mlp_out"), [(4, 64), (2, 64), (4, 64)], "three of one shape"),
        (Site(0, "mlp_out"), [(64,)] * 3, "finite float32"),
    ],
)
def test_examples_of_your_own_are_checked(site: Site, states: list[tuple[int, ...]], message: str) -> None:
    """Here, and not in a forward that other requests are part of."""
    examples = Examples(*(torch.ones(shape) for shape in states))
    recipe: Any = (("harmful", "project", 1.0),)
    with pytest.raises(ConfigError, match=message):
        AlignEZ(select="knn", neighbours=2, examples={site: examples}, recipe=recipe)
    wide = Examples(*(torch.ones(4, 64, dtype=torch.bfloat16) for _ in range(3)))
    with pytest.raises(ConfigError, match="finite float32"):
        AlignEZ(select="knn", neighbours=2, examples={Site(0, "mlp_out"): wide}, recipe=recipe)


@pytest.mark.parametrize(
    ("directions", "options"),
    [([torch.ones(64)], {}), ({"a": torch.ones(64), 0: torch.ones(64)}, {}), ({0: torch.ones(64)}, {"alpha": 10**400})],
)
def test_directions_of_your_own_are_checked(directions: Any, options: Any) -> None:
    with pytest.raises(ConfigError, match=r"by layer|finite number"):
        AlignEZ.from_directions(directions, op="add", **options)


def test_a_parameter_of_one_number_is_part_of_a_models_fingerprint() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    seen = set()
    for value in (1.0, 2.0):
        model.register_parameter("scale", torch.nn.Parameter(torch.tensor(value)))
        seen |= {identity_of(model).fingerprint, identity_of(copy.deepcopy(model).bfloat16()).fingerprint}
    assert len(seen) == 2


def test_another_model_is_refused_unless_forced() -> None:
    decoder, other = tiny_decoder("llama"), tiny_decoder("mistral")
    mine = AlignEZ.from_directions({0: torch.ones(64)}, op="add", model=other.identities[0])
    with pytest.raises(ConfigError, match="fitted on another model"):
        answers(decoder, Policy(edits=mine))
    forced = AlignEZ(stages=mine.stages, model=mine.model, force=True)
    known = AlignEZ(stages=mine.stages, model=decoder.identities[0])
    assert told(answers(decoder, Policy(edits=forced))) == told(answers(decoder, Policy(edits=known)))


def test_an_architecture_without_the_place_says_so() -> None:
    decoder = tiny_decoder("gpt2")
    layer = decoder.engine.runner.model.transformer.h[0]
    layer.add_module("perceptron", layer.mlp)
    del layer.mlp
    with pytest.raises(UnsupportedModelError, match="has no mlp_out"):
        decoder.activations([("a", "")], tap="mlp_out")


@pytest.mark.parametrize("select", ["none", "cosine"])
def test_a_place_that_is_not_there_ends_the_request_that_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, select: Any
) -> None:
    monkeypatch.setitem(edit_hooks.TAP_MODULES, "mlp_out", ("perceptron",))
    decoder = tiny_decoder("gpt2")
    edit = AlignEZ(stages=edit_of(decoder, ["mlp_out"]).stages, select=select)
    failed, done = answers(decoder, [Policy(edits=edit), Policy()], PROMPTS[:2], errors="return", max_new_tokens=1)
    assert isinstance(failed, UnsupportedModelError)
    assert isinstance(done, Completion)


def test_engine_is_the_same_for_plain_requests() -> None:
    """No column, no table, no slot where nobody edits."""
    engine: Engine = tiny_decoder("llama").engine
    assert engine.runner.edits.num_columns == 0
    assert engine.runner.edits.sites == []
