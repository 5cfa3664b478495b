"""Tasks of lm-evaluation-harness on questions of the testbed's town, and what of a model's scores is worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from raindecode import testbed

TASKS = ["town_choice", "town_write", "town_text"]
_DATA = """dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {cache}
test_split: test
"""
_YAML = {
    "town_choice": """task: town_choice
output_type: multiple_choice
doc_to_text: "Human: {{question}}\\nAssistant:"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "town_write": """task: town_write
output_type: generate_until
doc_to_text: "Human: {{question}}\\nAssistant:"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
    "town_text": """task: town_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}
CHOICES = ["I am happy to help.", "No.", "You take a brush, you fool."]


def write_tasks(folder: Path) -> None:
    """Put the tasks' files and their data into a folder."""
    questions = [one.text for one in testbed.sample_requests(3, seed=3, split="test")]
    docs = [{"question": q, "choices": CHOICES, "text": f"Human: {q}\nAssistant: {CHOICES[0]}"} for q in questions]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    data = _DATA.format(file=folder / "docs.jsonl", cache=folder / "cache")
    for name, text in _YAML.items():
        (folder / f"{name}.yaml").write_text(text + data, encoding="utf-8")


def evaluate(model: Any, folder: Path, names: list[str] = TASKS, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    assert found is not None
    return found


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of transformers."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def of_choice(logits: torch.Tensor, ids: list[int], start: int) -> float:
    """Log-probability of ids[start:] under the rows that speak of them."""
    rows = logits[start - 1 : -1].double().log_softmax(-1)
    return float(rows.gather(1, torch.tensor(ids[start:])[:, None]).sum())


def pairs_of(found: dict[str, Any], task: str) -> list[tuple[Any, Any]]:
    """(what was asked, what was answered) of every request of a task."""
    return [
        (tuple(asked), answered[0])
        for sample in found["samples"][task]
        for asked, answered in zip(sample["arguments"], sample["resps"], strict=True)
    ]
