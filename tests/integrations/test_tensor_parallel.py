"""Two processes that share a model's weights answer as one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from tp_cases import copy_of_testbed, model_without_a_plan, run
from transformers import LlamaConfig

from raindecode.decoder import Decoder
from raindecode.engine import loader
from raindecode.engine.parallel import check_heads
from raindecode.errors import ConfigError

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)
RANKS = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("tp")
    aligned = str(folder / "aligned")
    copy_of_testbed(aligned)
    model_without_a_plan(str(folder / "gpt2"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    script = Path(__file__).with_name("tp_cases.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), aligned, str(RANKS), str(folder / f"{rank}.json")],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        alone = json.loads(json.dumps(run(aligned, 1, str(folder))))
        for process in processes:
            said, _ = process.communicate()
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return alone, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("kind", ["plain", "greedy", "dera", "edited", "rain", "rain of a mixture"])
def test_tokens_and_counters_are_those_of_one_process(found: Any, kind: str) -> None:
    alone, ranks = found
    for rank in ranks:
        assert rank["tokens"][kind] == alone["tokens"][kind]
        assert rank["counters"][kind] == alone["counters"][kind]
    assert all(alone["tokens"][kind])
    assert kind == "greedy" or alone["tokens"][kind] != alone["tokens"]["greedy"]


def test_numbers_agree_up_to_rounding_and_between_ranks_exactly(found: Any) -> None:
    alone, (first, second) = found
    assert first["values"] == second["values"]
    assert first["logprobs"] == second["logprobs"]
    assert first["values"] == pytest.approx(alone["values"], abs=1e-4)
    for mine, one in zip(first["logprobs"], alone["logprobs"], strict=True):
        assert [x for row in mine for x in row] == pytest.approx([x for row in one for x in row], abs=1e-4)


def test_every_process_holds_its_own_heads_and_runs_transformers_forward(found: Any) -> None:
    alone, ranks = found
    assert alone["fused"]
    assert not any(rank["fused"] for rank in ranks)
    assert [rank["kv_heads"] for rank in ranks] == [alone["kv_heads"] // RANKS] * RANKS
    assert ranks[0]["kv_tokens"] == ranks[1]["kv_tokens"]
    assert ranks[0]["exact"] == ranks[1]["exact"]
    assert ranks[0]["identities"] == ranks[1]["identities"] == alone["identities"]


def test_adapters_prefix_files_and_models_without_a_plan_are_refused(found: Any) -> None:
    _, ranks = found
    for rank in ranks:
        adapter, prefix, gpt2 = rank["refused"]
        assert "split over processes" in adapter
        assert "aligned" in adapter
        assert "split over processes" in prefix
        assert "cannot be split over 2 processes" in gpt2


def test_more_processes_than_two_are_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "processes_of", lambda model: 4)
    assert Decoder.from_pretrained("testbed", device="cpu").exact == "off"
    with pytest.raises(ConfigError, match="4 processes"):
        Decoder.from_pretrained("testbed", device="cpu", exact=True)


def test_without_the_processes_it_says_how_to_start_them() -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        Decoder.from_pretrained("testbed", tensor_parallel=2)
    with pytest.raises(ConfigError, match="tensor_parallel is 0"):
        Decoder.from_pretrained("testbed", tensor_parallel=0)
    with pytest.raises(ConfigError, match="device is"):
        Decoder.from_pretrained("testbed", device="cuda:1" if torch.cuda.is_available() else "cpu:0", tensor_parallel=2)
    with pytest.raises(ConfigError, match="divides both"):
        check_heads(LlamaConfig(num_attention_heads=8, num_key_value_heads=2), 4)
    check_heads(LlamaConfig(num_attention_heads=8, num_key_value_heads=4), 4)


def test_a_world_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        Decoder.from_pretrained("testbed", tensor_parallel=2)
