"""Files of edits: what safetensors writes is read and the other way round; everything else is a typed error."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from raindecode.errors import EditFileError, ModelError
from raindecode.policy.alignez.container import load_tensors, save_tensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
]  # fmt: skip


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {str(dtype): (10 * torch.rand(3, 5, generator=generator)).to(dtype) for dtype in DTYPES}
    return {
        **made,
        "layers.3.Θ": torch.randn(2, 3, 4, generator=generator).transpose(0, 2),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 128),
        "view": made["torch.float32"][1:, 2],
    }


METADATA = {"tap": "mlp_out", "sign": "mean ≥ 0", "": "empty name", "note": 'with "quotes"\n'}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    save_tensors(path, some_tensors(), METADATA)
    found, metadata = load_tensors(str(path))
    same(found, some_tensors())
    assert list(found) == sorted(found)
    assert metadata == METADATA
    assert [p.name for p in tmp_path.iterdir()] == ["edit.safetensors"]
    found["scalar"] += 1  # its own memory, which may be written to
    save_tensors(path, {"a": ONE}, {})
    assert load_tensors(path)[1] == {}
    same(found, {**some_tensors(), "scalar": torch.tensor(3.5)})  # and which does not change with the file


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    save_tensors(path, some_tensors(), METADATA)
    same(load_file(path), some_tensors())
    with safe_open(path, "pt") as opened:
        assert json.loads(opened.metadata()["raindecode"]) == METADATA


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    given_ = {name: tensor.clone().contiguous() for name, tensor in some_tensors().items()}
    for metadata in (None, METADATA):
        save_file(given_, path, metadata=metadata)
        found, texts = load_tensors(path)
        same(found, given_)
        assert texts == {}  # not ours


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    save_tensors(one, some_tensors(), METADATA)
    save_tensors(other, dict(reversed(some_tensors().items())), dict(reversed(METADATA.items())))
    assert one.read_bytes() == other.read_bytes()


def file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = struct.pack("<2f", 1, 2)
OURS: Any = {"a": entry()}
BAD = {
    "empty": b"",
    "a pickle": pickle.dumps({"a": 1}),
    "a zip archive": b"PK\x03\x04" + bytes(60),
    "gguf": b"GGUF\x03\0\0\0" + bytes(40),
    "huge header": file({}, length=2**64 - 1),
    "no utf-8": file(b'{"\xff":1}'),
    "deep json": file(b"[" * 200_000),
    "metadata a number": file({"__metadata__": {"a": 1}}),
    "texts no json": file({"__metadata__": {"raindecode": "{"}, **OURS}, EIGHT),
    "texts a list": file({"__metadata__": {"raindecode": "[]"}, **OURS}, EIGHT),
    "texts numbers": file({"__metadata__": {"raindecode": '{"a": 1}'}, **OURS}, EIGHT),
    "texts deep": file({"__metadata__": {"raindecode": "[" * 200_000}, **OURS}, EIGHT),
    "bool": file({"a": entry("BOOL", [8])}, EIGHT),
    "float8": file({"a": entry("F8_E4M3", [8])}, EIGHT),
    "float4": file({"a": entry("F4", [16])}, EIGHT),
    "complex": file({"a": entry("C64", [1])}, EIGHT),
    "huge empty shape": file({"a": entry(shape=[0, 2**63], offsets=[0, 0])}),
    "shape beyond the bytes": file({"a": entry(shape=[3])}, EIGHT),
    "offsets beyond the file": file({"a": entry(shape=[4], offsets=[0, 16])}, EIGHT),
    "overlap": file({"a": entry(), "b": entry()}, EIGHT),
    "bytes left over": file({"a": entry()}, EIGHT + b"\0"),
    "nan": file({"a": entry()}, struct.pack("<2f", 1, float("nan"))),
    "inf": file({"a": entry("BF16", [4])}, b"\x80\x3f" * 3 + b"\x80\xff"),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_damage_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "edit.safetensors"
    path.write_bytes(data)
    with pytest.raises(EditFileError) as caught:
        load_tensors(path)
    assert "edit.safetensors" in str(caught.value)
    assert "save or download it again" in str(caught.value)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("exploded",))


def test_a_pickle_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        Path("edit.safetensors").write_bytes(pickle.dumps(_Bomb(), protocol=protocol))
        with pytest.raises(EditFileError):
            load_tensors("edit.safetensors")
    torch.save({"a": torch.ones(2)}, "edit.safetensors")
    with pytest.raises(EditFileError):
        load_tensors("edit.safetensors")
    assert not Path("exploded").exists()


SMALL = file(
    {"__metadata__": {"raindecode": '{"tap":"x"}'}, "a": entry(), "b": entry("I16", [2, 1], [8, 12])},
    EIGHT + b"\1\0\2\0",
)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    path.write_bytes(SMALL)
    assert load_tensors(path)[0]["b"].tolist() == [[1], [2]]
    for length in range(len(SMALL)):
        path.write_bytes(SMALL[:length])
        with pytest.raises(EditFileError):
            load_tensors(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_mutations_give_tensors_or_a_typed_error(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL)
    for place, value in edits:
        data[place] = value
    path = tmp_path / "edit.safetensors"
    path.write_bytes(bytes(data))
    try:
        tensors, metadata = load_tensors(path)
    except EditFileError:
        return
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 12
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert all(isinstance(value, str) for value in metadata.values())
    same(load_file(path), tensors)  # whatever is accepted means the same to safetensors


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match="there is no file"):
        load_tensors(tmp_path / "nothing.safetensors")
    with pytest.raises(EditFileError, match="is a folder"):
        load_tensors(tmp_path)
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate((1 << 32) + 1)
    with pytest.raises(ModelError, match="has 4294967297 bytes"):
        load_tensors(large)


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {}, "no tensor was given"),
        ({"a": ONE.bool()}, {}, "'a' is torch.bool"),
        ({"a": ONE.to(torch.complex64)}, {}, "'a' is torch.complex64"),
        ({"a": ONE.to_sparse()}, {}, "sparse"),
        ({"a": [1.0]}, {}, "'a' is list"),
        ({"a": ONE * float("inf")}, {}, "'a' holds NaN or inf"),
        ({1: ONE}, {}, "cannot be stored"),
        ({"a": ONE}, {"rank": 3}, "metadata are {'rank': 3}"),
        ({"a\ud800": ONE}, {}, "cannot be stored"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, tensors: Any, metadata: Any, message: str) -> None:
    with pytest.raises(EditFileError, match=message):
        save_tensors(tmp_path / "edit.safetensors", tensors, metadata)
    assert not list(tmp_path.iterdir())


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    save_tensors(path, {"a": ONE}, {})
    script = (
        "import os, sys\nfrom raindecode.policy.alignez import whole_files\n"
        "whole_files.os.fsync = lambda _: os._exit(9)\nwhole_files.write_atomically(sys.argv[1], b'half')\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 9
    same(load_tensors(path)[0], {"a": ONE})
