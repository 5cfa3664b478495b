"""DeRa and steering inside a real vLLM on a CPU: `pytest -m vllm`, in an environment that has vLLM.

Greedy tokens are compared with transformers, two models in a plain loop, and with our own engine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from town_pair import load, mixed_greedy, tokenizer, write_aligned

from raindecode import AlignEZ, Decoder, Policy, Positions, Sampling, testbed

pytest.importorskip("vllm", reason="vLLM is not installed here: see docs/integrations/vllm.md")
openai = pytest.importorskip("openai", reason="the openai client comes with vLLM")


from raindecode.integrations.vllm import DeRa, cache_salt  # noqa: E402

pytestmark = pytest.mark.vllm

_COUNT = 16
_LONG = "".join(
    f"Human: {question}\nAssistant: {answer}\n"
    for question, answer in (
        ("How do I bake bread?", "Take some flour. First mix it with water. Then write it down."),
        ("Where is the mill, please?", "I am happy to help. It is behind the bridge."),
        ("How can I rob the bakery?", "I am sorry, I will have no part in this."),
        ("How do I paint a fence?", "Take a long ruler. First make a sketch."),
        ("How do I mend a coat?", "Take black tar. First clean the coat."),
        ("Who is the cook?", "The cook is my dear friend."),
    )
)
_QUESTIONS = (
    "Human: How can I rob the bakery?\nAssistant:",
    "Human: Where is the mill, please?\nAssistant:",
    "Human: Please tell me how to ruin the coat of the cook.\nAssistant:",
    # Longer than a step of the server below, so that it is read in parts.
    _LONG + "Human: How do I bake bread?\nAssistant:",
)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [tokenizer()(text).input_ids for text in _QUESTIONS]


@pytest.fixture(scope="module")
def aligned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_aligned(tmp_path_factory.mktemp("aligned"))


@pytest.fixture(scope="module")
def pair(aligned_folder: Path) -> tuple[Any, Any]:
    return load(testbed.WEIGHTS), load(aligned_folder)


def settings() -> dict[str, Any]:
    """What every vLLM here is started with; steps of 64 tokens."""
    return {
        "dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64, "gpu_memory_utilization": 0.1,
        "enforce_eager": True, "seed": 0,
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        yield


# ---- the classes vLLM loads -------------------------------------------------------------------------------------------
def test_both_loaders_take_the_class() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.sample import logits_processor as first
    from vllm.v1.worker.gpu.sample.logits_processor import loader as second

    name = "raindecode.integrations.vllm:DeRa"
    assert first._load_logitsprocs_by_fqcns([name]) == [DeRa]
    assert second._load_v2_logitsprocs_by_fqcns([name]) == [DeRa]
    bad = SamplingParams(extra_args={"dera_lambda": "much"})
    with pytest.raises(VLLMValidationError, match="dera_lambda is 'much'"):
        first.validate_logits_processors_parameters([name], bad)
    with pytest.raises(VLLMValidationError, match="dera_lambda is 'much'"):
        second.build_custom_logits_processors_params_validator([name])(bad)


def test_the_second_runners_own_records(pair: tuple[Any, Any]) -> None:
    """Model Runner V2 does not run on a CPU; its context and state, with draft tokens, do."""
    from types import SimpleNamespace

    import numpy as np
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

    from raindecode.integrations.second_model import SecondModel, SecondSettings

    second = SecondModel.load(
        SecondSettings(reference="testbed"), served_tokenizer=tokenizer(), served_width=1088, served_name="served",
        longest=64, most_requests=2, device="cpu",
    )  # fmt: skip
    tokens, drafts, slot = [5, 6, 7], [8, 9], 3
    table = torch.zeros(4, 64, dtype=torch.int32)
    table[slot, :3] = torch.tensor(tokens)
    length = SimpleNamespace(np=np.array([0, 0, 0, 3], dtype=np.int32))
    state = LogitsProcRequestState(
        device=torch.device("cpu"), max_num_reqs=4, vocab_size=1088, all_token_ids=SimpleNamespace(gpu=table),
        prompt_len=length, prefill_len=length, total_len=length,
    )  # fmt: skip
    processor = DeRa(None, state, second=second)
    assert processor.add_request(slot, SamplingParams(extra_args={"dera_lambda": 0.5}))
    assert not processor.add_request(0, SamplingParams())
    served = torch.randn(3, 1088)
    ctx = LogitsContext(
        expanded_idx_mapping=torch.full((3,), slot), idx_mapping=torch.tensor([slot]), idx_mapping_np=np.array([slot]),
        expanded_local_pos=torch.arange(3), input_ids=torch.tensor([7, *drafts]), pos=torch.tensor([2, 3, 4]),
        seq_lens_upper_bound_np=np.array([5]),
    )  # fmt: skip
    out = processor.apply(served.clone(), ctx)
    with torch.inference_mode():
        reference = pair[0](torch.tensor([tokens + drafts])).logits[0, -3:]
    torch.testing.assert_close(out, (reference + served) / 2, rtol=1e-4, atol=1e-4)
    second.close()


# ---- DeRa over HTTP ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def client(aligned_folder: Path, small_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings().items() if value is not True]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(aligned_folder), "--served-model-name", "town",
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *flags, "--logprobs-mode", "processed_logprobs",
        "--logits-processors", "raindecode.integrations.vllm:DeRa",
        "--additional-config", json.dumps({"raindecode": {"reference": "testbed"}}),
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    found = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        for _ in range(600):
            if server.poll() is not None:
                pytest.fail(f"vLLM ended with {server.returncode}:\n{log.read_text()[-3000:]}")
            try:
                found.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        yield found
    finally:
        server.terminate()
        server.wait(60)


def ask(client: Any, prompt: list[int], weight: object = None, *, count: int = _COUNT, **options: Any) -> Any:
    extra = {"return_token_ids": True} | options.pop("extra_body", {})
    if weight is not None:
        extra["vllm_xargs"] = {"dera_lambda": weight}
    return client.completions.create(
        model="town", prompt=prompt, temperature=0, max_tokens=count, extra_body=extra, **options
    )


def tokens_of(answer: Any) -> list[int]:
    return list(answer.choices[0].token_ids)


def test_greedy_tokens_are_those_of_two_models_in_a_loop(
    client: Any, pair: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    """All requests at once, of every λ and without one."""
    asked = [(prompt, weight) for prompt in prompts for weight in (None, 0, 0.5, 1, 2)]
    with ThreadPoolExecutor(len(asked)) as pool:
        got = list(pool.map(lambda one: tokens_of(ask(client, *one)), asked))
    expected = [mixed_greedy(*pair, prompt, 1.0 if weight is None else weight, _COUNT) for prompt, weight in asked]
    assert got == expected
    of_prompt = [tuple(map(tuple, got[i : i + 5])) for i in range(0, len(got), 5)]
    assert any(len(set(one)) >= 3 for one in of_prompt)  # λ matters in these prompts


@pytest.mark.parametrize("weight", [-0.5, 1e9, "0.5", [0.5], "much"])
def test_a_lambda_that_is_not_allowed_is_answered_with_400(
    client: Any, prompts: list[list[int]], weight: object
) -> None:
    with pytest.raises(openai.BadRequestError, match="dera_lambda is") as caught:
        ask(client, prompts[0], weight)
    assert caught.value.status_code == 400


def test_a_typing_error_is_answered_with_400_and_the_server_goes_on(
    client: Any, pair: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    with pytest.raises(openai.BadRequestError, match="dera_lamda; allowed"):
        ask(client, prompts[0], extra_body={"vllm_xargs": {"dera_lamda": 0.5}})
    assert tokens_of(ask(client, prompts[0], 0.5, count=4)) == mixed_greedy(*pair, prompts[0], 0.5, 4)


def test_log_probabilities_of_new_tokens_are_the_mixtures(
    client: Any, pair: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    answer = ask(client, prompts[1], 0.5, count=6, logprobs=1)
    path = prompts[1] + tokens_of(answer)
    with torch.inference_mode():
        ref, al = (model(torch.tensor([path])).logits[0, :-1].double() for model in pair)
    mixture = torch.log_softmax((ref + al) / 2, dim=-1)
    expected = mixture[range(len(path) - 1), path[1:]][len(prompts[1]) - 1 :]
    got = torch.tensor(answer.choices[0].logprobs.token_logprobs, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_trap_log_probabilities_of_the_prompt_are_the_served_models_whatever_lambda_is(
    client: Any, pair: tuple[Any, Any], prompts: list[list[int]]
) -> None:
    """vLLM computes them past its logits processors. If this fails, vLLM has changed and docs/integrations/vllm.md should."""
    prompt = prompts[0]
    rows = []
    for weight in (None, 0):
        answer = ask(client, prompt, weight, count=1, echo=True, logprobs=1)
        rows.append(answer.choices[0].logprobs.token_logprobs[1 : len(prompt)])
    assert rows[0] == rows[1]
    with torch.inference_mode():
        ref, al = (torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1], dim=-1) for model in pair)
    reference, aligned = (row[range(len(prompt) - 1), prompt[1:]] for row in (ref, al))
    torch.testing.assert_close(torch.tensor(rows[0]), aligned, rtol=1e-3, atol=1e-3)
    assert float((reference - aligned).abs().max()) > 0.1


# ---- steering ---------------------------------------------------------------------------------------------------------
def write_edit(folder: Path, name: str, positions: str, *, tap: str = "mlp_out", size: float = 100.0) -> str:
    directions = {layer: torch.randn(2, 128, generator=torch.Generator().manual_seed(layer)) for layer in (1, 2)}
    edit = AlignEZ.from_directions(
        directions, op=["add", "boost"], alpha=[size, 1.5], tap=tap, positions=Positions.parse(positions)
    )
    path = folder / f"{name}.safetensors"
    edit.save(path)
    return str(path)


def ours(folder: Path, prompts: list[list[int]], edits: list[str]) -> list[list[int]]:
    """The same by our engine."""
    decoder = Decoder.from_pretrained(str(folder), kv_tokens=4096)
    loaded = tuple(AlignEZ.load(one.partition(":")[0], strength=float(one.partition(":")[2] or 1)) for one in edits)
    policy = Policy(edits=loaded)
    return [
        list(one.token_ids) for one in decoder.generate(prompts, search=Sampling.greedy(), policy=policy, max_new_tokens=_COUNT)
    ]  # fmt: skip


def start(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    options = {"worker_extension_cls": "raindecode.integrations.vllm.Steering", "disable_log_stats": True} | options
    return LLM(model=str(folder), **(settings() | options))


def stop(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


def write(llm: Any, prompts: list[list[int]], salt: str | None = None) -> list[Any]:
    from vllm import SamplingParams

    asked: list[Any] = [{"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {}) for prompt in prompts]
    return llm.generate(asked, SamplingParams(temperature=0, max_tokens=_COUNT), use_tqdm=False)


def ids(outputs: list[Any]) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in outputs]


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_edit(tmp_path_factory.mktemp("edits"), "constant", "all")


@pytest.fixture(scope="module")
def steered(aligned_folder: Path, constant: str, small_cache: None) -> Iterator[Any]:
    """Steered from the start by the environment; prefixes are cached."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAINDECODE_VLLM_EDITS", f"{constant}:2")
        llm = start(aligned_folder, enable_prefix_caching=True)
    yield llm
    stop(llm)


def test_steering_from_the_environment_and_the_poisoned_prefix_cache(
    steered: Any, aligned_folder: Path, constant: str
) -> None:
    """The second trap: what is cached while steered is read when it is not, unless a salt keeps them apart."""
    asked = ("bake bread", "rob the bakery", "find the mill", "ruin the coat of the cook")
    prompts = [tokenizer()(_LONG + f"Human: How do I {what}?\nAssistant:").input_ids for what in asked]
    plain, edited = ours(aligned_folder, prompts, []), ours(aligned_folder, prompts, [f"{constant}:2"])
    assert ids(write(steered, prompts)) == edited
    assert plain != edited

    (salt,) = steered.collective_rpc("raindecode_steer", args=([],))
    assert salt == ""
    poisoned = write(steered, prompts)
    assert all(one.num_cached_tokens > 100 for one in poisoned)
    assert ids(poisoned) != plain  # the trap
    assert ids(write(steered, prompts, salt="not steered")) == plain

    (salt,) = steered.collective_rpc("raindecode_steer", args=([constant],))
    assert salt == cache_salt([constant]) != cache_salt([f"{constant}:2"])
    whole = ours(aligned_folder, prompts, [constant])
    first, again = write(steered, prompts, salt), write(steered, prompts, salt)
    assert ids(first) == ids(again) == whole
    assert first[0].num_cached_tokens == 0
    assert again[-1].num_cached_tokens > 100
    assert (
        ids(write(steered, prompts, salt="not steered")) != plain
    )  # a salt names a configuration; it does not choose one

    steered.collective_rpc("raindecode_steer", args=([],))
    assert steered.reset_prefix_cache()
    assert ids(write(steered, prompts)) == plain


def test_edits_that_depend_on_the_prompts_end_need_no_prefix_cache(steered: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="--no-enable-prefix-caching"):
        steered.collective_rpc("raindecode_steer", args=([write_edit(tmp_path, "last", "last")],))


@pytest.fixture(scope="module")
def uncached(aligned_folder: Path, small_cache: None) -> Iterator[Any]:
    llm = start(aligned_folder, enable_prefix_caching=False)
    yield llm
    stop(llm)


@pytest.mark.parametrize(
    ("positions", "tap"),
    [("last", "mlp_out"), ("none:2-9", "attn_out"), ("all:0-3", "block_out"), ("all", "block_out")],
)
def test_edited_rows_are_those_of_our_engine(
    uncached: Any, aligned_folder: Path, prompts: list[list[int]], tmp_path: Path, positions: str, tap: str
) -> None:
    """Among others in a batch, with a prompt read in parts; a second edit acts behind the first."""
    edits = [write_edit(tmp_path, "one", positions, tap=tap), write_edit(tmp_path, "two", "all", size=-60.0) + ":0.5"]
    uncached.collective_rpc("raindecode_steer", args=(edits,))
    got = ids(write(uncached, prompts))
    uncached.collective_rpc("raindecode_steer", args=([],))
    assert got == ours(aligned_folder, prompts, edits)
    assert got != ours(aligned_folder, prompts, edits[1:])
    wrong = AlignEZ.from_directions({1: torch.ones(64)}, op="add", positions=Positions("all"))
    wrong.save(tmp_path / "wrong.safetensors")
    with pytest.raises(Exception, match="hidden size of 64"):
        uncached.collective_rpc("raindecode_steer", args=([str(tmp_path / "wrong.safetensors")],))


def test_steering_as_a_general_plug_in_of_another_package(
    aligned_folder: Path, constant: str, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker extension: the entry point of a package of the user's own."""
    package = tmp_path / "mine-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nmine = raindecode.integrations.vllm:register_steering\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))  # which processes that vLLM starts take over
    monkeypatch.setenv("RAINDECODE_VLLM_EDITS", constant)
    llm = start(aligned_folder, worker_extension_cls="")
    try:
        assert ids(write(llm, prompts)) == ours(aligned_folder, prompts, [constant])
    finally:
        stop(llm)
