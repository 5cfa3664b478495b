"""lm-evaluation-harness's own client of completions scores our server as its back end scores the model itself."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", minversion="0.4.10", reason="lm-evaluation-harness is not installed, or an old one")
pytest.importorskip("fastapi", reason="the server's packages are not installed")
pytest.importorskip("uvicorn", reason="the server's packages are not installed")
pytest.importorskip("tenacity", reason="the harness's client of completions needs lm-eval[api]")

from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from town_tasks import evaluate, pairs_of, write_tasks

from raindecode import Decoder, testbed
from raindecode.integrations.lm_eval import RainDecodeLM
from raindecode.server import http
from raindecode.server.app import create_app
from raindecode.server.settings import ServerSettings


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server of the testbed with its aligned partner, in a thread."""
    decoder = Decoder.from_pretrained("testbed", adapter="testbed", kv_tokens=8192)
    settings = ServerSettings(port=0)
    told: queue.Queue[str] = queue.Queue()
    server = http.Server(create_app(settings, decoder), settings, told.put)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield told.get(timeout=60)
    server.should_exit = True
    thread.join(timeout=60)


def client(address: str, model: str) -> Any:
    """What `lm_eval run --model local-completions` makes; it leaves the beginning-of-text token out unless told otherwise."""
    return LocalCompletionsAPI(
        model=model, base_url=f"{address}/v1/completions", tokenizer=str(testbed.WEIGHTS), tokenizer_backend="huggingface",
        max_length=1024, add_bos_token=True, num_concurrent=3, max_retries=1,
    )  # fmt: skip


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Log-likelihoods to 1e-4, what is greedy and what is written alike."""
    for (asked, (score, greedy)), (same, (other, said)) in zip(
        pairs_of(found, "town_choice"), pairs_of(expected, "town_choice"), strict=True
    ):
        assert asked == same
        assert score == pytest.approx(other, abs=1e-4)
        assert greedy == said
    assert pairs_of(found, "town_write") == pairs_of(expected, "town_write")
    for (_, score), (_, other) in zip(pairs_of(found, "town_text"), pairs_of(expected, "town_text"), strict=True):
        assert score == pytest.approx(other, abs=1e-4)
    assert found["results"]["town_choice"]["acc_norm,none"] == expected["results"]["town_choice"]["acc_norm,none"]


def test_through_the_server_a_task_comes_out_as_in_the_back_end_of_the_harness(address, tasks):
    hf = HFLM(str(testbed.WEIGHTS), device="cpu", dtype="float32", batch_size=4)
    hf.get_model_info = dict  # it asks the hub
    compare(evaluate(client(address, "testbed"), tasks), evaluate(hf, tasks))


def test_an_alias_scores_the_mixture(address, tasks):
    """The mixture in process is checked against two models of transformers in test_lm_eval.py."""
    found = evaluate(client(address, "testbed@dera=0.5"), tasks)
    compare(found, evaluate(RainDecodeLM("testbed", adapter="testbed", dera=0.5, kv_tokens=4096), tasks))
    plain = evaluate(client(address, "testbed"), tasks, ["town_choice"])
    apart = [
        abs(score - other)
        for (_, (score, _)), (_, (other, _)) in zip(
            pairs_of(found, "town_choice"), pairs_of(plain, "town_choice"), strict=True
        )
    ]
    assert max(apart) > 0.1
