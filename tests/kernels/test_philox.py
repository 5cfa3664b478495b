"""philox_uniforms: the published vectors, the same numbers on both lanes as on plain integers, arguments refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rainkernels import ShapeError, has_native
from rainkernels.ops.logits import philox_uniforms

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def number(x0: int, x1: int) -> float:
    """52 bits of the first two words, and a half."""
    return ((((x0 << 20) ^ (x1 >> 12)) & ((1 << 52) - 1)) + 0.5) * 2.0**-52


def plain(key: int, counter: int) -> float:
    """Philox4x32-10 on Python's integers."""
    mask = (1 << 32) - 1
    x0, x1, x2, x3 = (counter >> shift & mask for shift in (0, 32, 64, 96))
    k0, k1 = key & mask, key >> 32 & mask
    for _ in range(10):
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = p1 >> 32 ^ x1 ^ k0, p1 & mask, p0 >> 32 ^ x3 ^ k1, p0 & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return number(x0, x1)


# Known answers of Random123 (Salmon et al.): key, counter, first two words.
KNOWN = [
    (0, 0, 0x6627E8D5, 0xE169C58D),
    (-1, -1, 0x408F276D, 0x41C83B0E),
    (0x299F31D0A4093822, 0x0370734413198A2E85A308D3243F6A88, 0xD16CFE09, 0x94FDCCEB),
]


@pytest.mark.parametrize(("key", "counter", "x0", "x1"), KNOWN, ids=["zeros", "ones", "pi"])
def test_published_vectors(key: int, counter: int, x0: int, x1: int) -> None:
    assert philox_uniforms([key], [counter]) == [number(x0, x1)] == [plain(key, counter)]


def test_many_draws_equal_plain_integers() -> None:
    rng = np.random.default_rng(0)
    keys = [int(k) for k in rng.integers(-(2**63), 2**63 - 1, 200)]
    counters = [int(a) << 64 | int(b) & (1 << 64) - 1 for a, b in rng.integers(-(2**63), 2**63 - 1, (200, 2))]
    drawn = philox_uniforms(keys, counters)
    assert drawn == [plain(k, c) for k, c in zip(keys, counters, strict=True)]
    assert all(0.0 < u < 1.0 for u in drawn)
    assert 0.4 < float(np.mean(drawn)) < 0.6


def test_only_the_low_bits_count() -> None:
    expected = philox_uniforms([5, 7], [3, 9])
    assert philox_uniforms((5 + (1 << 64), 7), (3, 9 + (1 << 128))) == expected
    assert philox_uniforms(np.array([5, 7]), [np.int64(3), np.uint64(9)]) == expected  # type: ignore[arg-type]
    assert philox_uniforms([], []) == []


@pytest.mark.parametrize(
    ("keys", "counters", "kind"),
    [([1], [1, 2], ShapeError), ([1.5], [2], TypeError), ([1], ["2"], TypeError), ([None], [2], TypeError)],
)
def test_bad_arguments(keys: Any, counters: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        philox_uniforms(keys, counters)
