"""Draws in double precision: the native lane against the definition, ties, bad rows, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rainkernels import DtypeError, RangeError, ShapeError, has_native
from rainkernels.ops.draws import draw_rows
from rainkernels.reference import draws as reference

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


@pytest.mark.parametrize("vocab", [1, 2, 17, 300, 5000])
@pytest.mark.parametrize("top_k", [0, 1, 3, 15, 64, 65, 400])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_draws_are_those_of_the_definition(vocab: int, top_k: int, temperature: float, threads: int) -> None:
    rng = np.random.default_rng(vocab + top_k)
    rows = [(3 * rng.standard_normal(vocab)).astype(np.float32) for _ in range(12)]
    rows[1] = np.round(rows[1])  # ties
    rows[2][rng.random(vocab) < 0.5] = -np.inf
    rows[2][-1] = 0.0
    rows[3][:] = 0.25
    asked = [row for row in rows for _ in range(4)]
    uniform = [u for _ in rows for u in (math.nan, 1e-9, float(rng.uniform(0.01, 0.99)), 1 - 1e-9)]
    logprob = [i % 3 > 0 for i in range(len(asked))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        drawn = draw_rows(asked, [temperature] * len(asked), [top_k] * len(asked), uniform, logprob)
    finally:
        torch.set_num_threads(before)
    for row, u, wanted, (token, prob, log) in zip(asked, uniform, logprob, drawn, strict=True):
        expected = reference.draw(row, temperature, top_k, u, wanted)
        assert token == expected[0]
        assert prob == pytest.approx(expected[1], rel=1e-12)
        assert log == pytest.approx(expected[2], rel=1e-9, abs=1e-12, nan_ok=True)
        assert math.isnan(log) != wanted


def test_rows_without_a_draw_say_so(lane: str) -> None:
    bad = [np.full(5, -np.inf), np.array([0, np.nan, 1.0]), np.array([0, np.inf]), np.array([np.nan])]
    rows = [row.astype(np.float32) for row in bad] + [np.array([0, 1], dtype=np.float32)]
    n = len(rows)
    for temperature in (0.0, 1.0):
        drawn = draw_rows(rows, [temperature] * n, [0] * n, [0.9] * n, [True] * n)
        assert [token for token, *_ in drawn] == [-1, -1, -1, -1, 1]
        assert all(math.isnan(prob) and math.isnan(log) for _, prob, log in drawn[:-1])
    assert draw_rows([], [], [], [], []) == []


def test_a_row_is_shaped_anew_where_its_filter_changes(lane: str) -> None:
    row = np.array([0.0, 3.0, 2.9, 1.0], dtype=np.float32)
    drawn = draw_rows([row] * 4, [1.0, 0.0, 1.0, 1.0], [0, 0, 1, 2], [1e-6, 0.5, 0.999, 0.999], [False] * 4)
    assert [token for token, *_ in drawn] == [0, 1, 1, 2]
    assert [prob for _, prob, _ in drawn[1:3]] == [1.0, 1.0]


def test_bad_requests_are_named(lane: str) -> None:
    row = np.zeros(4, dtype=np.float32)
    with pytest.raises(ShapeError, match=r"^top_k has 2 entries, there are 1 rows"):
        draw_rows([row], [1.0], [0, 0], [0.5], [False])
    with pytest.raises(DtypeError, match=r"^rows\[0\] is float64"):
        draw_rows([np.zeros(4)], [1.0], [0], [0.5], [False])  # type: ignore[list-item]
    with pytest.raises(ShapeError, match=r"^rows\[0\] has shape \(2, 4\)"):
        draw_rows([np.zeros((2, 4), dtype=np.float32)], [1.0], [0], [0.5], [False])
    with pytest.raises(ShapeError, match=r"^rows\[0\] has shape \(2,\)"):
        draw_rows([np.zeros(4, dtype=np.float32)[::2]], [1.0], [0], [0.5], [False])
    for temperature, top_k, uniform in (
        (-1.0, 0, 0.5),
        (math.nan, 0, 0.5),
        (1.0, -1, 0.5),
        (1.0, 0, 0.0),
        (1.0, 0, 1.0),
    ):
        with pytest.raises(RangeError, match=r"^request 0 has"):
            draw_rows([row], [temperature], [top_k], [uniform], [False])
