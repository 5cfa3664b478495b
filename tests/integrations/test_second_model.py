"""Parameters of a request, and the arithmetic of a row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from raindecode.errors import ConfigError
from raindecode.integrations.dera_params import lambda_of
from raindecode.integrations.second_model import mix_rows

INF = math.inf


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        (None, None), ({}, None), ({"other": 3}, None), ({"dera_lambda": 0}, 0.0), ({"dera_lambda": 0.25, "other": "x"}, 0.25),
        ({"dera_lambda": 1000}, 1000.0), ({"dera_lambda": -1, "dera_allow_negative": True}, -1.0),
        ({"dera_lambda": -1.5, "dera_allow_negative": 1}, -1.5), ({"dera_lambda": 2, "dera_allow_negative": False}, 2.0),
        ({"dera_lambda": np.float32(0.5)}, 0.5),
    ],
)  # fmt: skip
def test_lambda_of_a_request(given: Any, weight: float | None) -> None:
    assert lambda_of(given) == weight


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dera_lambda": "0.5"}, "dera_lambda is '0.5'; allowed: a number from 0 to 1000"),
        ({"dera_lambda": True}, "dera_lambda is True"),
        ({"dera_lambda": [0.5]}, "dera_lambda is"),
        ({"dera_lambda": {"a": 1}}, "dera_lambda is"),
        ({"dera_lambda": math.nan}, "dera_lambda is nan"),
        ({"dera_lambda": INF}, "dera_lambda is inf"),
        ({"dera_lambda": 10**400}, "dera_lambda is 1000"),
        ({"dera_lambda": -0.5}, "with dera_allow_negative from -1000 on"),
        ({"dera_lambda": -1001, "dera_allow_negative": True}, "allowed: a number from -1000"),
        ({"dera_lambda": 0.5, "dera_allow_negative": "yes"}, "dera_allow_negative is 'yes'"),
        ({"dera_lambda": None}, "dera_lambda is None"),
        ({"dera_allow_negative": True}, "dera_lambda is None"),
        ({"dera_lamda": 0.5}, "the request has dera_lamda; allowed of DeRa: dera_lambda"),
    ],
)
def test_a_lambda_that_is_not_allowed(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lambda_of(given)


@pytest.mark.parametrize("role", ["reference", "aligned"])
def test_rows_are_mixed_as_defined(role: Any) -> None:
    torch.manual_seed(0)
    served, other = torch.randn(5, 40), torch.randn(5, 48).bfloat16()
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, -0.5])
    got = mix_rows(served, other, weights, role=role, vocab_size=37)
    here, there = served[:, :37].double(), other[:, :37].double()
    ref, al = (there, here) if role == "reference" else (here, there)
    torch.testing.assert_close(got[:, :37].double(), ref + weights.double()[:, None] * (al - ref), rtol=1e-5, atol=1e-5)
    assert torch.equal(got[0, :37], ref[0].float())  # λ of 0 and 1 are the models' own rows, bit for bit
    assert torch.equal(got[2, :37], al[2].float())
    assert bool(torch.isneginf(got[:, 37:]).all())
    assert got.shape == served.shape


def test_what_either_model_rules_out_stays_out() -> None:
    """Columns: nobody, the stack (served), the other model, both. A model of weight 0 has no say, the stack always has."""
    served = torch.tensor([[1.0, -INF, 2.0, -INF]]).expand(4, 4)
    other = torch.tensor([[0.5, 1.0, -INF, -INF]]).expand(4, 4)
    weights = torch.tensor([0.0, 1.0, 3.0, -1.0])
    got = mix_rows(served, other, weights, role="reference", vocab_size=4)
    assert got.tolist() == [
        [0.5, -INF, -INF, -INF], [1.0, -INF, 2.0, -INF], [2.0, -INF, -INF, -INF], [0.0, -INF, -INF, -INF],
    ]  # fmt: skip
    got = mix_rows(served, other, weights, role="aligned", vocab_size=4)
    assert got[:2].tolist() == [[1.0, -INF, 2.0, -INF], [0.5, -INF, -INF, -INF]]
