"""What tensor parallelism must not change, as numbers. Run by every process of test_tensor_parallel.py, and there by one alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from raindecode import testbed
from raindecode.decoder import Decoder
from raindecode.errors import AdapterError, ConfigError, UnsupportedModelError
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling

PROMPTS = ["How do I paint a fence?", "How can I hurt my neighbour Tom?", "Who are you?"]


def run(aligned: str, processes: int, scratch: str) -> dict[str, Any]:
    """Answers of all kinds, and what the decoder says of itself."""
    decoder = Decoder.from_pretrained("testbed", aligned=aligned, device="cpu", tensor_parallel=processes)
    shaped = Sampling(temperature=0.9, top_k=30, top_p=0.95)
    direction = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    edit = AlignEZ.from_directions({3: direction}, op="add", alpha=300.0, model=decoder.identities[0])
    search = RAIN.preset("town", max_iterations=5, min_new_iterations=2, min_visits=1)
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": [1, 2, 3], "progress": False}
    asked = {
        "plain": decoder.generate(PROMPTS, search=shaped, **options),
        "greedy": decoder.generate(PROMPTS, search=Sampling.greedy(), **options),
        "dera": decoder.generate(PROMPTS, search=shaped, policy=Policy(dera=DeRa(0.5, stats=True)), **options),
        "edited": decoder.generate(PROMPTS, search=Sampling.greedy(), policy=Policy(edits=edit), **options),
        "rain": decoder.generate(PROMPTS, search=search, **(options | {"max_new_tokens": 5})),
        "rain of a mixture": decoder.generate(
            PROMPTS[:2], search=search, policy=Policy(dera=DeRa(0.5)), **(options | {"max_new_tokens": 4, "seed": 5})
        ),
    }
    (k, _) = decoder.engine.runner.pool.layers[0]
    return {
        "tokens": {name: [one.token_ids for one in answers] for name, answers in asked.items()},
        "counters": {name: [one.stats.tokens_processed for one in answers] for name, answers in asked.items()},
        "values": [one.value for one in asked["rain"]],
        "logprobs": [[t.logprob_models for t in one.mixture.tokens] for one in asked["dera"]],
        "exact": decoder.exact,
        "fused": decoder.engine.runner.fused is not None,
        "kv_heads": k.shape[1],
        "kv_tokens": decoder.engine.tree.num_slots,
        "identities": [one.fingerprint for one in decoder.identities],
        "refused": refused(decoder, processes, scratch) if processes > 1 else [],
    }


def refused(decoder: Decoder, processes: int, scratch: str) -> list[str]:
    """What is not done with split weights, by the words it is refused with."""
    found = []
    try:
        Decoder.from_pretrained("testbed", adapter="testbed", tensor_parallel=processes)
    except AdapterError as error:
        found.append(str(error))
    try:
        decoder.save_prefix(f"{scratch}/prefix.safetensors")
    except ConfigError as error:
        found.append(str(error))
    try:
        Decoder.from_pretrained(f"{scratch}/gpt2", tensor_parallel=processes)
    except UnsupportedModelError as error:
        found.append(str(error))
    return found


def copy_of_testbed(folder: str) -> None:
    """A whole model some way from the testbed, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(testbed.WEIGHTS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(testbed.WEIGHTS)).save_pretrained(folder)


def model_without_a_plan(folder: str) -> None:
    """A GPT-2, which transformers does not know how to split."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder)


if __name__ == "__main__":
    aligned, processes, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    out.write_text(json.dumps(run(aligned, processes, str(out.parent))))
