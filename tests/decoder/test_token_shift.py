"""Token shift: ranks, divergences and classes against plain transformers, every kind of side, and what goes wrong."""

from __future__ import annotations

import json
import random
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aligned_models import aligned_model, merged, pair, reference_model, stock_logits
from models import tiny_decoder
from test_edits_engine import edit_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from raindecode import (
    AlignEZ,
    ChatFormat,
    Decoder,
    DeRa,
    Policy,
    Positions,
    Sampling,
    TokenShift,
    teacher_forcing,
    testbed,
)
from raindecode.engine.edits import EditBank
from raindecode.errors import ConfigError, NumericError, PromptError
from raindecode.hidden_edits import Site
from raindecode.mixture import Mix
from raindecode.policy.alignez.edits import Examples
from raindecode.teacher_forcing import rows_in_flight
from raindecode.testbed import world
from rainkernels.ops.logits import rank

PROMPTS = ["the inner", "on a", "a", "other"]
FORMAT = ChatFormat("\nQ: {prompt}\nA:", prefix="Some text in front.\n")
NUMBERS = ("ranks", "logprob_base", "logprob_aligned", "kl", "aligned_top_ranks", "candidate_ids", "candidate_probs")


# ---- the testbed against plain transformers -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def town() -> Decoder:
    return Decoder.from_pretrained("testbed", adapter="testbed", device="cpu")


def town_pairs(count: int) -> tuple[list[str], list[str]]:
    """Requests and replies of the grammar."""
    requests, rng = testbed.sample_requests(count), random.Random(0)
    return [r.text for r in requests], [" " + world.draw_reply(rng, r).strip() for r in requests]


def plain_rows(model: PreTrainedModel, paths: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """[len(path), vocabulary] float64 of float32 forwards of transformers, in batches padded behind."""
    found = []
    for at in range(0, len(paths), 32):
        some = paths[at : at + 32]
        ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.int64)
        for i, path in enumerate(some):
            ids[i, : len(path)] = torch.tensor(path)
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits
        found += [logits[i, : len(path)].double() for i, path in enumerate(some)]
    return found


def test_ranks_and_divergences_equal_those_of_plain_transformers(
    town: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 positions, base against adapter: ranks are those of a float64 sort of the very logits that were ranked.

    Two forwards in float32 differ by rounding, so beside transformers' a rank may lie within what that makes.
    """
    prompts, replies = town_pairs(350)
    sorted_here = []

    def ranking(base: torch.Tensor, aligned: torch.Tensor, tokens: torch.Tensor) -> Any:
        found = rank(base, aligned, tokens)
        order = torch.sort(base.double(), dim=1, descending=True, stable=True).indices
        sorted_here.append(torch.equal(found.rank, 1 + (order == tokens[:, None]).int().argmax(1).int()))
        ranked.append(len(tokens))
        return found

    ranked: list[int] = []
    monkeypatch.setattr(teacher_forcing, "rank", ranking)
    shift = town.token_shift(None, 1.0, prompts, answers=replies, progress=False)
    assert sum(ranked) >= 10_000
    assert all(sorted_here)
    base: Any = AutoModelForCausalLM.from_pretrained(testbed.WEIGHTS).eval()
    models = [base, merged(base, str(testbed.ADAPTER))]
    heads = [r.prompt_ids for r in town.requests(prompts)]
    paths = [[*head, *answer.token_ids.tolist()] for head, answer in zip(heads, shift.answers, strict=True)]
    plain = [plain_rows(model, paths) for model in models]
    positions = equal = 0
    for i, answer in enumerate(shift.answers):
        z, aligned = (rows[i][len(heads[i]) - 1 : -1] for rows in plain)
        ids = torch.from_numpy(answer.token_ids).long()
        own = z.gather(1, ids[:, None])
        order = torch.sort(z, dim=1, descending=True, stable=True).indices
        ranks = 1 + (order == ids[:, None]).int().argmax(1)
        tolerance = 1e-3
        least, most = (z > own + tolerance).sum(1) + 1, (z >= own - tolerance).sum(1)
        ours = torch.from_numpy(answer.ranks)
        assert bool((ours >= least).all() and (ours <= most).all())
        positions += len(ids)
        equal += int((ours == ranks).sum())
        log_p, log_q = torch.log_softmax(z, 1), torch.log_softmax(aligned, 1)
        for name, expected in (
            ("logprob_base", log_p.gather(1, ids[:, None])[:, 0]), ("logprob_aligned", log_q.gather(1, ids[:, None])[:, 0]),
            ("kl", (log_q.exp() * (log_q - log_p)).sum(1)),
        ):  # fmt: skip
            np.testing.assert_allclose(getattr(answer, name), expected.numpy(), rtol=1e-4, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(
            answer.candidate_probs, log_p.exp().topk(5, dim=1).values.numpy(), rtol=1e-3, atol=1e-6
        )
        top = aligned.argmax(1)
        top_ranks = 1 + (z > z.gather(1, top[:, None])).sum(1)
        assert np.mean(answer.aligned_top_ranks == top_ranks.numpy()) > 0.9
    assert positions >= 10_000
    assert equal >= 0.999 * positions, f"{equal} of {positions}"


def test_alignment_shifts_few_tokens_and_those_where_replies_open(town: Decoder) -> None:
    prompts = [r.text for r in testbed.sample_requests(60, seed=1)]
    shift = town.token_shift(None, 1.0, prompts, max_new_tokens=64, progress=False)
    summary, curve = shift.summary, shift.curve
    print(json.dumps(summary), json.dumps(curve[:4]))
    assert summary["answers"] == 60
    assert summary["unshifted"] + summary["marginal"] + summary["shifted"] == pytest.approx(1.0, abs=1e-12)
    assert summary["unshifted"] > 0.7
    early, late = (
        sum(p["n"] * p["shifted"] for p in part) / sum(p["n"] for p in part) for part in (curve[:3], curve[3:])
    )
    assert early > 2 * late
    for point in curve:
        assert point["unshifted"] + point["marginal"] + point["shifted"] == pytest.approx(1.0, abs=1e-12)
    assert [point["n"] for point in curve] == [sum(len(a.ranks) > t for a in shift.answers) for t in range(len(curve))]
    expected = town.generate(prompts, policy=Policy(dera=DeRa(1.0)), search=Sampling.greedy(), max_new_tokens=64)
    assert [a.token_ids.tolist() for a in shift.answers] == [c.token_ids for c in expected]
    assert [a.text for a in shift.answers] == [c.text for c in expected]
    # Read as given answers they are the same: only then is the aligned side's top token looked for.
    again = town.token_shift(None, 1.0, prompts, answers=[c.token_ids for c in expected])
    assert_same(shift, again, exact=town.exact == "rows")


def assert_same(one: TokenShift, other: TokenShift, *, exact: bool = True) -> None:
    assert [a.index for a in one.answers] == [a.index for a in other.answers]
    for mine, theirs in zip(one.answers, other.answers, strict=True):
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        for name in NUMBERS:
            if exact:
                np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name), err_msg=name)
            else:
                np.testing.assert_allclose(
                    getattr(mine, name), getattr(theirs, name), rtol=1e-4, atol=1e-5, err_msg=name
                )


# ---- sides ----------------------------------------------------------------------------------------------------------
def two(**options: Any) -> Decoder:
    reference = reference_model()
    return pair(reference, aligned_model(reference), **options)


def knn_of(decoder: Decoder) -> AlignEZ:
    made = torch.Generator().manual_seed(3)
    examples = Examples(*(torch.randn(9, decoder.identities[0].hidden_size, generator=made) for _ in range(3)))
    recipe: Any = (("harmful", "project", 1.0), ("helpful", "boost", 1.0))
    return AlignEZ(
        select="knn", neighbours=3, examples={Site(1, "mlp_out"): examples}, recipe=recipe, positions=Positions("last")
    )


SIDES = {
    "number": lambda d: 0.3,
    "dera": lambda d: DeRa(1.4),
    "kl": lambda d: DeRa.target_kl(0.2),
    "edit": edit_of,
    "cosine": lambda d: replace(edit_of(d, k=6), select="cosine"),
    "knn": knn_of,
    "answer_edit": lambda d: replace(edit_of(d), positions=Positions("none")),
    "prompt": lambda d: FORMAT,
    "all": lambda d: Policy(prompt=FORMAT, dera=DeRa(0.5), edits=replace(edit_of(d), on="both", force=True)),
}


def as_policy(side: Any) -> Policy:
    if isinstance(side, (float, DeRa)):
        return Policy(dera=side if isinstance(side, DeRa) else DeRa(side))
    return side if isinstance(side, Policy) else Policy(**{"prompt" if isinstance(side, ChatFormat) else "edits": side})


@pytest.mark.parametrize("name", SIDES)
def test_either_side_is_what_generate_answers_by(name: str) -> None:
    """Greedy tokens and their log-probabilities are those of decoding; read as base and aligned side, alone and in company."""
    decoder = two()
    side = SIDES[name](decoder)
    expected = decoder.generate(
        PROMPTS, policy=as_policy(side), search=Sampling.greedy(logprobs=True), max_new_tokens=9, seed=0
    )
    shift = decoder.token_shift(None, side, PROMPTS, max_new_tokens=9)
    swapped = decoder.token_shift(side, None, PROMPTS, answers=[c.token_ids for c in expected])
    for completion, answer, other in zip(expected, shift.answers, swapped.answers, strict=True):
        assert answer.token_ids.tolist() == completion.token_ids
        logprobs = [one.logprob for one in completion.logprobs]
        np.testing.assert_allclose(answer.logprob_aligned, logprobs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(other.logprob_base, logprobs, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(answer.logprob_base, other.logprob_aligned, rtol=1e-5, atol=1e-5)
        assert (other.ranks == 1).all()
        assert (answer.aligned_top_ranks == answer.ranks).all()
        assert (answer.kl > -1e-5).all()
        if completion.prompt not in PROMPTS[:2]:
            continue
        # The base's view by plain transformers.
        ids = list(decoder.requests([completion.prompt])[0].prompt_ids)
        for t, token in enumerate(completion.token_ids):
            row = stock_logits([reference_model()], [*ids, *completion.token_ids[:t]])[0]
            assert answer.ranks[t] == 1 + (row > row[token]).sum()
            assert answer.candidate_ids[t].tolist() == np.argsort(-row, kind="stable")[:5].tolist()


def test_several_aligned_models() -> None:
    reference = reference_model()
    others = [aligned_model(reference, seed=seed) for seed in (1, 2)]
    decoder = pair(reference, *others)
    shift = decoder.token_shift(DeRa([0.0, 1.0]), DeRa([1.0, 0.0]), PROMPTS, max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, shift.answers, strict=True):
        ids, tokens = decoder.codec.encode(prompt), answer.token_ids.tolist()
        for t, token in enumerate(tokens):
            aligned, base = stock_logits(others, [*ids, *tokens[:t]])
            assert aligned.argmax() == token
            assert answer.ranks[t] == 1 + (base > base[token]).sum()
    assert shift.base == "model, λ 0, 1"


def test_a_token_that_stops_or_ends_an_answer_is_read() -> None:
    decoder = two()
    free = decoder.token_shift(None, 1.0, PROMPTS, max_new_tokens=8)
    stop = free.answers[0].text[3:5]
    cut = decoder.token_shift(None, 1.0, PROMPTS[:1], max_new_tokens=8, stop=[stop]).answers[0]
    assert cut.finish_reason == "stop"
    assert stop not in cut.text
    data = decoder.token_shift(None, 1.0, PROMPTS[:1], max_new_tokens=8, stop=[stop]).to_json()["answers"][0]
    assert "".join(t["token"] for t in data["tokens"]).startswith(cut.text + stop)
    ended = int(free.answers[0].token_ids[2])
    last = decoder.token_shift(None, 1.0, PROMPTS[:1], max_new_tokens=8, stop_token_ids=[ended]).answers[0]
    assert last.token_ids[-1] == ended


# ---- answers that are given -----------------------------------------------------------------------------------------
def test_texts_become_the_tokens_behind_the_prompt() -> None:
    decoder = two()
    answers = [" and the", "xyz", "[1] é", "e inner"]
    shift = decoder.token_shift(None, 1.0, PROMPTS, answers=answers)
    for prompt, text, answer in zip(PROMPTS, answers, shift.answers, strict=True):
        ids, tokens = decoder.codec.encode(prompt), answer.token_ids.tolist()
        assert decoder.codec.decode([*ids, *tokens]) == prompt + text
        assert (answer.text, answer.finish_reason) == (text, "given")
    # "a" + "n..." merges nothing, but "th" + "e" would: the prompt's tokens stay, the answer is encoded alone.
    split = decoder.token_shift(None, 1.0, ["th"], answers=["e cat"]).answers[0]
    assert split.token_ids.tolist() == decoder.codec.encode("e cat")[len(decoder.codec.encode("")) :]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("text", "answers is a str for 4 prompts"), (["a"], "answers is a list of 1 for 4"), (None, ""), (3, "answers is a int"),
        (["a", "", "a", "a"], "answer 1 is empty"), (["a", [], "a", "a"], "answer 1 is empty"), (["a", [1, 2.5], "a", "a"], "answer 1 is"),
        (["a", [True], "a", "a"], "answer 1 is"), (["a", [[1]], "a", "a"], "answer 1 is"), (["a", [-1], "a", "a"], "no model knows"),
        (["a", [5000], "a", "a"], "no model knows"), (["a" * 2000, "a", "a", "a"], "answer 0 has 2000 tokens"),
        (["a", "\ud800", "a", "a"], "lone surrogate"), (["a", None, "a", "a"], "answer 1 is None"),
    ],
)  # fmt: skip
def test_bad_answers_are_refused(answers: Any, message: str) -> None:
    if answers is None:
        return
    decoder = two()
    steps = decoder.engine.model_steps
    with pytest.raises(PromptError, match=message):
        decoder.token_shift(None, 1.0, PROMPTS, answers=answers)
    assert decoder.engine.model_steps == steps


# ---- what decides nothing -------------------------------------------------------------------------------------------
def test_pieces_and_waves_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in flight are bounded by memory alone; an answer that is longer than that is read in pieces."""
    decoder = two()
    whole = decoder.token_shift(0.2, DeRa(0.9), PROMPTS, max_new_tokens=17, top=7)
    assert all(a.candidate_ids.shape == (len(a.ranks), 7) for a in whole.answers)
    for rows in (1, 3, 20):
        monkeypatch.setattr("raindecode.teacher_forcing._STEP_ROWS", rows)
        assert_same(
            whole, decoder.token_shift(0.2, DeRa(0.9), PROMPTS, max_new_tokens=17, top=7), exact=decoder.exact == "rows"
        )


def test_rows_in_flight_fit_into_memory() -> None:
    engine = two().engine
    mixes = [Mix((1.0, 0.0)), Mix((0.5, 0.5))]
    assert rows_in_flight(engine, mixes) == 2048
    engine.runner.model.config.vocab_size = 128_256
    rows = rows_in_flight(engine, mixes)
    assert 1 <= rows * 128_256 * 4 * 3 < 256 * 2**20
    engine.runner.model.config.vocab_size = 2**30
    assert rows_in_flight(engine, mixes) == 1


def test_the_number_of_requests_under_way_changes_nothing() -> None:
    one, many = two(max_concurrent=1), two(max_concurrent=32)
    assert one.exact == "rows"
    prompts = PROMPTS * 3
    assert_same(*(d.token_shift(None, 0.8, prompts, max_new_tokens=7) for d in (one, many)))


def test_largest_few_and_topk_agree_on_ties() -> None:
    from raindecode.teacher_forcing import _largest

    rows = torch.randint(0, 6, (40, 50), generator=torch.Generator().manual_seed(0)).float()
    few, many = _largest(rows, 16), _largest(rows.double(), 16)
    assert torch.equal(few[0].double(), many[0])
    order = torch.sort(rows, dim=1, descending=True, stable=True).indices
    assert torch.equal(few[1].long(), order[:, :16])
    banned = torch.full((1, 9), -torch.inf)
    banned[0, [2, 5]] = 1.0
    assert set(_largest(banned, 4)[1][0].tolist()) >= {2, 5}
    assert len(set(_largest(banned, 4)[1][0].tolist())) == 4


# ---- failures -------------------------------------------------------------------------------------------------------
def test_a_prompt_that_fails_costs_no_other() -> None:
    decoder = two()
    bad = decoder.codec.encode("Z")[-1]
    good = decoder.token_shift(None, 1.0, PROMPTS, max_new_tokens=6)
    with torch.no_grad():
        decoder.engine.runner.model.get_input_embeddings().weight[bad] = torch.nan
    prompts = [*PROMPTS[:2], "Z", *PROMPTS[2:]]
    answers: list[Any] = [a.token_ids.tolist() for a in good.answers]
    answers.insert(2, "abc")
    for options in ({"max_new_tokens": 6}, {"answers": answers}):
        shift = decoder.token_shift(None, 1.0, prompts, errors="return", **options)  # type: ignore[arg-type]
        assert shift.summary["failed"] == 1
        assert [a.index for a in shift.answers] == [0, 1, 3, 4]
        assert_same(replace(shift, answers=[replace(a, index=i) for i, a in enumerate(shift.answers)]), good)
        assert isinstance(shift.errors[0], NumericError)
    with pytest.raises(NumericError, match="logits at token 0 of the answer"):
        decoder.token_shift(None, 1.0, prompts, answers=answers)
    none = decoder.token_shift(None, 1.0, ["Z"], answers=["a"], errors="return")
    assert none.summary["unshifted"] is None
    assert none.to_json()["curve"] == []


def test_the_same_on_both_sides_is_refused() -> None:
    decoder = two()
    edit = edit_of(decoder)
    same: list[tuple[Any, Any]] = [
        (None, Policy()), (None, 0.0), (0.5, DeRa(0.5, stats=True)), (edit, Policy(edits=edit)), (None, replace(edit, strength=0.0)),
        (1.0, Policy(dera=DeRa(1.0), edits=edit)), (FORMAT, Policy(prompt=FORMAT)),
    ]  # fmt: skip
    for base, aligned in same:
        with pytest.raises(ConfigError, match="base and aligned are the same"):
            decoder.token_shift(base, aligned, PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"aligned": "chat"}, "aligned is a str; give a Policy"), ({"base": True}, "base is a bool"),
        ({"errors": "skip"}, "errors is 'skip'"),
        ({"aligned": DeRa(0.5, plausibility=0.1)}, "leave plausibility out"), ({"top": 0}, "top is 0"), ({"max_new_tokens": 0}, "is 0"),
        ({"prompts": []}, "there is no prompt"), ({"aligned": DeRa([0.5, 0.5])}, "2 DeRa weights"),
        ({"prompts": ["a" * 3000]}, "the context"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    decoder = two()
    with pytest.raises((ConfigError, PromptError), match=message):
        decoder.token_shift(**({"base": None, "aligned": 1.0, "prompts": PROMPTS} | arguments))


def test_a_decoder_of_one_model_compares_edits_and_prompts() -> None:
    decoder = tiny_decoder("llama")
    with pytest.raises(ConfigError, match="nothing to mix"):
        decoder.token_shift(None, 1.0, PROMPTS)
    assert decoder.token_shift(None, edit_of(decoder), PROMPTS, max_new_tokens=3).summary["positions"] >= 4
    assert isinstance(decoder.engine.runner.edits, EditBank)


# ---- results --------------------------------------------------------------------------------------------------------
def test_json_is_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = two()
    answers = ["the é inner", "aaa", "bab", "the"]
    shift = decoder.token_shift(None, 1.0, PROMPTS, answers=answers)
    data = json.loads(json.dumps(shift.to_json(), allow_nan=False))
    assert data["summary"] == shift.summary
    assert (data["base"], data["aligned"]) == ("model", "model, λ 1")
    shifted: dict[int, list[int]] = {}
    for entry, answer, text in zip(data["answers"], shift.answers, answers, strict=True):
        assert entry["text"] == text
        assert "".join(t["token"] for t in entry["tokens"]) == text
        for t, token in enumerate(entry["tokens"]):
            assert (token["id"], token["rank"]) == (answer.token_ids[t], answer.ranks[t])
            rank = token["rank"]
            assert token["class"] == ("unshifted" if rank == 1 else "marginal" if rank <= 3 else "shifted")
            assert token["kl"] == pytest.approx(answer.kl[t], abs=1e-6)
            assert [c["prob"] for c in token["candidates"]] == sorted(
                (c["prob"] for c in token["candidates"]), reverse=True
            )
            if rank <= 5:
                assert token["candidates"][rank - 1]["id"] == token["id"]
                assert np.log(token["candidates"][rank - 1]["prob"]) == pytest.approx(token["logprob_base"], abs=1e-2)
            shifted.setdefault(token["id"], []).append(rank > 3)
    expected = sorted(((-sum(s), i, len(s)) for i, s in shifted.items() if any(s)))
    assert [(-m["shifted"], m["id"], m["seen"]) for m in data["most_shifted"]] == expected
    assert [m["share"] for m in data["most_shifted"]] == [-count / seen for count, _, seen in expected]
    assert "answers" not in shift.to_json(answers=False)
    written: list[Any] = []
    page = types.ModuleType("raindecode.shift_page")
    page.write_page = lambda path, found: written.append((path, found))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "raindecode.shift_page", page)
    shift.write_html(tmp_path / "a.html")
    assert written == [(tmp_path / "a.html", shift.to_json())]


def test_pieces_of_characters_show_as_such() -> None:
    decoder = two()
    shift = decoder.token_shift(None, 1.0, ["a"], answers=["x→y"])
    tokens = [t["token"] for t in shift.to_json()["answers"][0]["tokens"]]
    assert tokens == ["x", "\ufffd", "\ufffd", "\ufffd", "y"]


def test_special_tokens_have_a_name_in_tables_only() -> None:
    decoder = two()
    shift = decoder.token_shift(None, 1.0, ["a"], answers=[[40, 2]], top=200)
    data = shift.to_json()["answers"][0]
    assert data["tokens"][1]["token"] == ""
    assert {c["id"]: c["token"] for c in data["tokens"][1]["candidates"]}[2] == "</s>"


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    decoder = two()
    shift = decoder.token_shift(None, 1.0, PROMPTS, max_new_tokens=5)
    shift.plot(tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert "share of answers" in drawn
    assert "model, λ 1 against model" in drawn
    replace(shift, answers=[]).plot(tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        shift.plot(tmp_path / "a.jpg")
