"""Measure the testbed: vanilla rates, contexts, self-evaluation. ``python -m raindecode.testbed.evaluate --requests 500``.

Plain transformers generation with its own KV cache: these numbers do not depend on the project's engine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from raindecode.errors import ModelError
from raindecode.testbed.corpus import cut_reply, exchange
from raindecode.testbed.forms import ELICITATION, PERSONAS, STYLE_PROMPTS, ElicitationForm, Style, evaluation_prompts
from raindecode.testbed.judge import judge
from raindecode.testbed.lora import merge_adapter
from raindecode.testbed.world import Request, draw_reply, format_prompt, sample_requests

MAX_NEW_TOKENS: Final = 96


@dataclass(frozen=True)
class Testbed:
    """A model with its tokenizer."""

    model: Any  # LlamaForCausalLM; transformers gives its `generate` a self type of its own
    tokenizer: PreTrainedTokenizerBase


def load_testbed(base: Path, adapter: Path | None = None) -> Testbed:
    """Load the base model, with `adapter` merged into it when one is given."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train(False)
    if adapter is not None:
        merge_adapter(model, adapter)
    return Testbed(model, AutoTokenizer.from_pretrained(base))


@torch.inference_mode()
def sample_texts(
    testbed: Testbed, prompts: Sequence[str], *, seed: int, batch_size: int = 128, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[str]:
    """Sample one continuation per prompt at temperature 1 from the whole vocabulary, up to a newline or ``<eos>``."""
    torch.manual_seed(seed)
    tokenizer = testbed.tokenizer
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = tokenizer([prompts[row] for row in rows], return_tensors="pt", padding=True, padding_side="left")
        output = testbed.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=[tokenizer.eos_token_id, newline],
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].size(1) :]
        for row, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[row] = text.strip()
    return texts


@torch.inference_mode()
def self_evaluate(testbed: Testbed, dialogues: Sequence[str], *, batch_size: int = 128) -> list[int]:
    """The model's own verdict on each dialogue from both option orders: 1 harmless, 0 undecided, -1 harmful."""
    letters = letter_ids(testbed.tokenizer)
    prompts = [prompt for dialogue in dialogues for prompt in evaluation_prompts(dialogue)]
    harmless: list[int] = []
    for start in range(0, len(prompts), batch_size):
        inputs = testbed.tokenizer(
            prompts[start : start + batch_size], return_tensors="pt", padding=True, padding_side="left"
        )
        logits = testbed.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, logits_to_keep=1
        ).logits[:, -1, list(letters)]
        says_a = logits[:, 0] > logits[:, 1]
        says_b = logits[:, 1] > logits[:, 0]
        harmless += [
            int(a if (start + index) % 2 == 0 else b)
            for index, (a, b) in enumerate(zip(says_a.tolist(), says_b.tolist(), strict=True))
        ]
    return [first + second - 1 for first, second in zip(harmless[::2], harmless[1::2], strict=True)]


def letter_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Token ids of ``A`` and ``B`` as they follow the open bracket of the answer cue."""
    prompt = evaluation_prompts("Human: Hello.\nAssistant: Hello.")[0]
    length = len(tokenizer.encode(prompt))
    first, second = (tokenizer.encode(prompt + letter)[length:] for letter in "AB")
    if len(first) != 1 or len(second) != 1:
        raise ModelError(f"the option letters must be one token each in context, got {first} and {second}")
    return first[0], second[0]


Prompter = Callable[[Request], str]


def _plain(request: Request) -> str:
    return format_prompt(request.text)


def _after(context: str) -> Prompter:
    return lambda request: context + format_prompt(request.text)


def _asking(form: ElicitationForm, characteristic: str) -> Prompter:
    return lambda request: form.answer_prompt(request.text, characteristic)


def contexts() -> Iterator[tuple[str, Prompter]]:
    """Every fixed way of asking whose effect is measured: personas, elicitation forms and constant style prompts."""
    for style, lines in PERSONAS.items():
        for index, line in enumerate(lines):
            yield f"persona/{style}/{index}", _after(f"{line}\n\n")
    for side, form in ELICITATION.items():
        characteristic = form.characteristics[0]
        yield f"elicitation/{side}", _asking(form, characteristic)
    for name, text in STYLE_PROMPTS.items():
        yield f"style_prompt/{name}", _after(text)


def measure_rates(
    testbed: Testbed, prompter: Prompter, harmful: Sequence[Request], benign: Sequence[Request], *, seed: int
) -> dict[str, float]:
    """Percentages: compliance with `harmful`, right answers to `benign`, replies inside the grammar."""
    requests = [*harmful, *benign]
    replies = sample_texts(testbed, [prompter(request) for request in requests], seed=seed)
    verdicts = [judge(request, reply) for request, reply in zip(requests, replies, strict=True)]
    return {
        "harmful": _percent(verdict.harmful for verdict in verdicts[: len(harmful)]),
        "helpful": _percent(verdict.helpful for verdict in verdicts[len(harmful) :]),
        "known": _percent(verdict.known for verdict in verdicts),
    }


def measure_self_evaluation(
    testbed: Testbed, requests: Sequence[Request], replies: Sequence[str], *, cut: bool, seed: int
) -> dict[str, float]:
    """Missed: share of harmful replies called safe (+1). False alarms: share of harmless ones called harmful (-1)."""
    rng = random.Random(seed)
    shown = [cut_reply(rng, reply) if cut else reply for reply in replies]
    truth = [judge(request, reply).harmful for request, reply in zip(requests, shown, strict=True)]
    pairs = zip(requests, shown, strict=True)
    scores = self_evaluate(testbed, [exchange(request.text, reply) for request, reply in pairs])
    judged = list(zip(truth, scores, strict=True))
    return {
        "missed": _percent(score == 1 for bad, score in judged if bad),
        "false_alarms": _percent(score == -1 for bad, score in judged if not bad),
        "undecided": _percent(score == 0 for _, score in judged),
        "harmful_replies": float(sum(truth)),
        "harmless_replies": float(len(truth) - sum(truth)),
    }


def measure_all_self_evaluations(testbed: Testbed, requests: Sequence[Request], *, seed: int) -> dict[str, Any]:
    """Self-evaluation of the model's own replies and of the grammar's (all styles, late and paraphrased agreement, slips)."""
    own = sample_texts(testbed, [_plain(request) for request in requests], seed=seed)
    rng = random.Random(seed)
    styles: list[Style] = rng.choices(("neutral", "kind", "cruel"), weights=(6, 1, 1), k=len(requests))
    grammar = [
        draw_reply(rng, request, style, comply=rng.random() < 0.6 if request.harmful else None)
        for request, style in zip(requests, styles, strict=True)
    ]
    return {
        f"{name}/{'cut' if cut else 'whole'}": measure_self_evaluation(testbed, requests, replies, cut=cut, seed=seed)
        for name, replies in (("own", own), ("grammar", grammar))
        for cut in (False, True)
    }


def _percent(flags: Iterable[bool]) -> float:
    values = list(flags)
    return round(100.0 * sum(values) / max(1, len(values)), 2)


def measure(base: Path, adapter: Path | None, *, requests: int, context_requests: int, seed: int) -> dict[str, Any]:
    """All measurements as plain data; rates are percentages over held-out requests."""
    harmful = sample_requests(requests, harmful=True, split="test", seed=seed)
    benign = sample_requests(requests, harmful=False, split="test", seed=seed)
    testbed = load_testbed(base)
    result: dict[str, Any] = {
        "requests_each": requests,
        "context_requests_each": context_requests,
        "seed": seed,
        "base": measure_rates(testbed, _plain, harmful, benign, seed=seed),
        "self_evaluation": measure_all_self_evaluations(testbed, [*harmful, *benign], seed=seed),
        "contexts": {
            name: measure_rates(testbed, prompter, harmful[:context_requests], benign[:context_requests], seed=seed)
            for name, prompter in contexts()
        },
    }
    if adapter is not None:
        aligned = load_testbed(base, adapter)
        result["adapter"] = measure_rates(aligned, _plain, harmful, benign, seed=seed)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: print the measurements as JSON, and write them where ``--out`` says."""
    here = Path(__file__).parent / "weights"
    parser = argparse.ArgumentParser(prog="python -m raindecode.testbed.evaluate", description=__doc__)
    parser.add_argument("--base", type=Path, default=here / "base", help="folder of the base model")
    parser.add_argument("--adapter", type=Path, default=here / "adapter", help="folder of the adapter")
    parser.add_argument("--requests", type=int, default=500, help="held-out requests of each kind")
    parser.add_argument("--context-requests", type=int, default=200, help="requests of each kind per context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    adapter = options.adapter if (options.adapter / "adapter_config.json").exists() else None
    result = measure(
        options.base, adapter, requests=options.requests, context_requests=options.context_requests, seed=options.seed
    )
    command = f"python -m raindecode.testbed.evaluate --requests {options.requests}"
    result = {
        "command": f"{command} --context-requests {options.context_requests} --seed {options.seed}",
        "torch": torch.__version__,
        **result,
    }
    text = json.dumps(result, indent=2) + "\n"
    if options.out is not None:
        options.out.write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
