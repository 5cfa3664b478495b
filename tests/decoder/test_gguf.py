"""Control vectors in GGUF: bytes as the format has them, and no damage that is not refused by a typed error."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from raindecode.errors import EditFileError
from raindecode.policy.alignez import whole_files
from raindecode.policy.alignez.gguf import read_control_vector, write_control_vector

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ARCHITECTURE = key("general.architecture", STRING, text("controlvector"))
HINT = key("controlvector.model_hint", STRING, text("llama"))
COUNT = key("controlvector.layer_count", U32, struct.pack("<I", 2))


def info(name: str, width: int, offset: int, *, kind: int = 0, dimensions: tuple[int, ...] | None = None) -> bytes:
    sizes = (width,) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


TWO = [info("direction.1", 3, 0), info("direction.7", 3, 32)]
ROWS = struct.pack("<3f", 1, -2, 0.5) + bytes(20) + struct.pack("<3f", 0, 4, 8)


def build(
    keys: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = ROWS,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    keys = [ARCHITECTURE, HINT, COUNT] if keys is None else keys
    infos = TWO if infos is None else infos
    counts = (len(infos) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys + infos)
    return head + bytes(-len(head) % alignment) + data


def parse(tmp_path: Path, data: bytes) -> tuple[str, dict[int, Tensor]]:
    path = tmp_path / "vector.gguf"
    path.write_bytes(data)
    return read_control_vector(path)


def same(found: dict[int, Tensor], expected: dict[int, Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[i], expected[i]) for i in found)


EXPECTED = {1: torch.tensor([1.0, -2.0, 0.5]), 7: torch.tensor([0.0, 4.0, 8.0])}


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    hint, found = parse(tmp_path, build())
    assert hint == "llama"
    assert same(found, EXPECTED)
    assert {row.dtype for row in found.values()} == {torch.float32}


def test_what_is_written_are_these_bytes(tmp_path: Path) -> None:
    path = tmp_path / "vector.gguf"
    write_control_vector(path, "llama", {7: EXPECTED[7].double(), 1: EXPECTED[1].half()})
    assert path.read_bytes() == build(data=ROWS + bytes(20))
    assert path.read_bytes()[:24] == bytes.fromhex("47475546 03000000 0200000000000000 0300000000000000")


def test_what_others_may_have_written(tmp_path: Path) -> None:
    extra = [
        key("a.number", F32, struct.pack("<f", 2)),
        key("a.flag", BOOL, b"\1"),
        key("numbers", ARRAY, struct.pack("<IQ3H", 2, 3, 1, 2, 3)),
        key("texts", ARRAY, struct.pack("<IQ", STRING, 2) + text("one") + text("")),
        key("nothing", ARRAY, struct.pack("<IQ", STRING, 0)),
    ]
    assert same(parse(tmp_path, build([*extra, ARCHITECTURE], version=2))[1], EXPECTED)
    assert parse(tmp_path, build([ARCHITECTURE]))[0] == ""
    wide = key("general.alignment", U32, struct.pack("<I", 64))
    infos = [info("direction.7", 3, 64), info("direction.1", 3, 0)]
    data = ROWS[:12] + bytes(52) + ROWS[32:] + b"trailing bytes"
    assert same(parse(tmp_path, build([ARCHITECTURE, wide], infos, data, alignment=64))[1], EXPECTED)


@pytest.mark.parametrize("hint", ["", "llama", "Ünïcode ✓", "x" * 5000])
def test_round_trip(tmp_path: Path, hint: str) -> None:
    generator = torch.Generator().manual_seed(0)
    given = {layer: torch.randn(37, generator=generator) for layer in (1, 2, 31, 100_000)}
    path = tmp_path / "vector.gguf"
    write_control_vector(path, hint, given)
    again, found = read_control_vector(str(path))
    assert again == hint
    assert same(found, given)
    first = path.read_bytes()
    write_control_vector(path, hint, dict(reversed(given.items())))
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["vector.gguf"]


BIG = 2**64 - 1
BAD = {
    "empty": (b"", "does not begin with GGUF"),
    "magic": (build(magic=b"GGML"), "does not begin with GGUF"),
    "a pickle": (b"\x80\x04\x95", "does not begin with GGUF"),
    "version 1": (build(version=1), "version 1"),
    "big-endian": (build(version=3 << 24), "version 50331648"),
    "header only": (b"GGUF\x03\0\0\0", "ends within the header"),
    "many keys": (build(num_keys=BIG), f"names {BIG} keys"),
    "many tensors": (build(num_tensors=BIG), f"names {BIG} tensors"),
    "no tensor": (build(infos=[]), "holds 0 directions"),
    "5000 keys": (build([ARCHITECTURE, *[key(str(i), BOOL, b"\0") for i in range(5000)]]), "5001 keys"),
    "one tensor short": (build(num_tensors=3, data=b""), "ends within|more than its"),
    "long key": (build([struct.pack("<Q", BIG)], []), "names 1 keys|ends within a key"),
    "long key with room": (build([struct.pack("<Q", BIG) + bytes(64)]), "ends within a key"),
    "long value": (build([key("general.architecture", STRING, struct.pack("<Q", 1 << 62))]), "ends within the value"),
    "unknown type": (build([key("x", 13, bytes(8)), ARCHITECTURE]), "unknown type 13"),
    "nested array": (build([key("x", ARRAY, struct.pack("<IQ", ARRAY, 1)), ARCHITECTURE]), "array of the type 9"),
    "huge array": (build([key("x", ARRAY, struct.pack("<IQ", 12, BIG)), ARCHITECTURE]), "ends within"),
    "huge text array": (build([key("x", ARRAY, struct.pack("<IQ", STRING, BIG)), ARCHITECTURE]), "more than its"),
    "no text": (build([key("general.architecture", STRING, text(b"\xff\xfe"))]), "no text"),
    "another file": (build([key("general.architecture", STRING, text("llama"))]), "is 'llama', not 'controlvector'"),
    "no architecture": (build([HINT]), "is missing"),
    "architecture a number": (build([key("general.architecture", U32, bytes(4))]), "is 0, not"),
    "hint a number": (build([ARCHITECTURE, key("controlvector.model_hint", U32, bytes(4))]), "model_hint is no text"),
    "key twice": (build([ARCHITECTURE, HINT, HINT]), "'controlvector.model_hint' twice"),
    "alignment 0": (build([ARCHITECTURE, key("general.alignment", U32, bytes(4))]), "alignment is 0"),
    "alignment 24": (build([ARCHITECTURE, key("general.alignment", U32, struct.pack("<I", 24))]), "alignment is 24"),
    "alignment a text": (build([ARCHITECTURE, key("general.alignment", STRING, text("32"))]), "alignment is '32'"),
    "layer 0": (build(infos=[info("direction.0", 3, 0)]), "layers go from 1"),
    "layer -1": (build(infos=[info("direction.-1", 3, 0)]), "tensor 'direction.-1'"),
    "layer 01": (build(infos=[info("direction.01", 3, 0)]), "tensor 'direction.01'"),
    "layer 10^9": (build(infos=[info("direction.1000000000", 3, 0)]), "tensor 'direction.1000000000'"),
    "other digits": (build(infos=[info("direction.٣", 3, 0)]), "tensor 'direction"),
    "another tensor": (build(infos=[info("token_embd.weight", 3, 0)]), "tensor 'token_embd.weight'"),
    "same layer twice": (build(infos=[TWO[0], info("direction.1", 3, 32)]), "two directions of one layer"),
    "float16": (build(infos=[info("direction.1", 3, 0, kind=1)]), "tensor type 1"),
    "two dimensions": (build(infos=[info("direction.1", 3, 0, dimensions=(3, 1))]), "has 2 dimensions"),
    "2^32 dimensions": (build(infos=[text("direction.1") + b"\xff" * 40]), "4294967295 dimensions"),
    "width 0": (build(infos=[info("direction.1", 0, 0)]), "is empty"),
    "widths": (build(infos=[TWO[0], info("direction.7", 2, 32)]), r"widths \[2, 3\]"),
    "width overflows": (build(infos=[info("direction.1", 1 << 62, 0)]), "ends within direction.1"),
    "offset overflows": (build(infos=[info("direction.1", 3, (1 << 64) - 32)]), "ends within direction.1"),
    "offset unaligned": (build(infos=[TWO[0], info("direction.7", 3, 20)]), "offset 20, no multiple of 32"),
    "overlap": (build(infos=[TWO[0], info("direction.7", 3, 0)]), "overlaps"),
    "data short": (build()[:-1], "ends within direction.7"),
    "nan": (build(data=ROWS[:-4] + struct.pack("<f", float("nan"))), "direction.7 holds NaN or inf"),
    "inf": (build(data=struct.pack("<f", float("-inf")) + ROWS[4:]), "direction.1 holds NaN or inf"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_damage_is_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(EditFileError, match=message) as caught:
        parse(tmp_path, data)
    assert "vector.gguf" in str(caught.value)
    assert "export or download it again" in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = build()
    for length in range(len(whole)):
        with pytest.raises(EditFileError):
            parse(tmp_path, whole[:length])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(build()) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, len(build())),
    tail=st.binary(max_size=8),
)
def test_mutations_give_directions_or_a_typed_error(
    tmp_path: Path, edits: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    data = bytearray(build())
    for place, value in edits:
        data[place] = value
    try:
        hint, found = parse(tmp_path, bytes(data) if cut < 8 else bytes(data[:cut]) + tail)
    except EditFileError:
        return
    assert isinstance(hint, str)
    assert found
    assert min(found) >= 1
    assert {row.shape for row in found.values()} <= {(1,), (2,), (3,)}
    assert all(torch.isfinite(row).all() for row in found.values())


def test_every_single_byte_changed_gives_directions_or_a_typed_error(tmp_path: Path) -> None:
    whole = build()
    data_begins = len(whole) - len(ROWS)
    accepted = 0
    for place in range(len(whole)):
        for value in (0xFF, whole[place] ^ 0x01):
            changed = whole[:place] + bytes([value]) + whole[place + 1 :]
            try:
                _, found = parse(tmp_path, changed)
            except EditFileError:
                continue
            accepted += 1
            if place < data_begins:  # a name of a layer, the hint or an ignored key: the numbers are the same
                assert [row.tolist() for row in found.values()] == [[1.0, -2.0, 0.5], [0.0, 4.0, 8.0]]
    assert accepted


def test_paths_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EditFileError, match="there is no file"):
        read_control_vector(tmp_path / "nothing.gguf")
    with pytest.raises(EditFileError, match="is a folder"):
        read_control_vector(tmp_path)
    with pytest.raises(EditFileError, match=r"could not be read|there is no file"):
        read_control_vector("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EditFileError, match="no ordinary file"):
        read_control_vector(tmp_path / "pipe")
    large = tmp_path / "large.gguf"
    with large.open("wb") as stream:
        stream.truncate((1 << 26) + 1)
    with pytest.raises(EditFileError, match="has 67108865 bytes, and a control vector in GGUF may have 67108864"):
        read_control_vector(large)


ROW = torch.ones(4)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "no directions to write"),
        ({0: ROW}, "layer 0; a control vector in GGUF takes layers from 1"),
        ({-1: ROW}, "layer -1"),
        ({True: ROW}, "layer True"),
        ({"1": ROW}, "layer '1'"),
        ({1: ROW.long()}, r"torch.int64 \[4\]"),
        ({1: ROW[None]}, r"float32 \[1, 4\]"),
        ({1: ROW[:0]}, r"float32 \[0\]"),
        ({1: [1.0]}, "is list"),
        ({1: ROW, 2: torch.ones(5)}, r"widths \[4, 5\]"),
        ({1: ROW * float("nan")}, "layer 1 holds NaN"),
        ({1: ROW.double() * 1e39}, "beyond float32"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, directions: dict[int, Tensor], message: str) -> None:
    with pytest.raises(EditFileError, match=message):
        write_control_vector(tmp_path / "vector.gguf", "llama", directions)
    assert not list(tmp_path.iterdir())


def test_a_hint_that_is_no_text(tmp_path: Path) -> None:
    for hint in (None, b"llama", "\ud800"):
        with pytest.raises(EditFileError, match="model_hint is"):
            write_control_vector(tmp_path / "vector.gguf", hint, {1: ROW})  # type: ignore[arg-type]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vector.gguf"
    write_control_vector(path, "llama", {1: ROW})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files.os, "fsync", full)
    with pytest.raises(EditFileError, match="No space left"):
        write_control_vector(path, "llama", {1: 2 * ROW})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["vector.gguf"]
    with pytest.raises(EditFileError, match="could not be written"):
        write_control_vector(tmp_path / "no such folder" / "vector.gguf", "llama", {1: ROW})
    with pytest.raises(EditFileError, match="could not be written"):
        write_control_vector(tmp_path, "llama", {1: ROW})
    assert [p.name for p in tmp_path.iterdir()] == ["vector.gguf"]
    assert [p.name for p in tmp_path.parent.iterdir() if p.suffix == ".tmp"] == []


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    write_control_vector(tmp_path / "vector.gguf", "llama", {1: ROW})
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "vector.gguf").stat().st_mode == (tmp_path / "other").stat().st_mode
