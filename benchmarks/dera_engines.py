"""The engines of bench_dera.py over one pair of models: raindecode's and the baselines, and the check that they agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from decode_models import build_model, llama_config, weight_bytes
from naive.dera import Notebook, Single, TwoModels, mixed
from rain_engines import load_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from raindecode import Decoder, Policy, Sampling, testbed
from raindecode.engine.adapter import load_adapter
from raindecode.policy.dera import DeRa

Row = dict[str, Any]
Stamp = Callable[[], None]
OURS = ("single", "lora_pair", "two_models")
BASELINES = ("single_transformers", "two_models_transformers", "notebook")
RECOMPUTE = "notebook_recompute"
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""By how much the logit of a greedy token may lie below the largest one: ties may fall otherwise in another batch."""
_STRENGTH = 0.3  # spread of an update over that of the weights it is added to
_SLACK = 2**30


def load_shape(name: str, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The testbed, or random weights with a tokenizer that has a word for every row: a mixture is over tokens only."""
    if name == "testbed":
        return load_model(name, device, dtype), AutoTokenizer.from_pretrained(testbed.WEIGHTS)
    model = build_model(name, device, dtype)
    core = Tokenizer(WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0"))
    core.pre_tokenizer = Whitespace()
    return model, PreTrainedTokenizerFast(tokenizer_object=core, bos_token="w1", eos_token="w2")


def bytes_needed(name: str, dtype: torch.dtype) -> int:
    """Memory of a run, rounded up: the weights of reference and aligned model, which all engines share."""
    if name == "testbed":
        return _SLACK
    return int(2 * weight_bytes(llama_config(name), dtype) * 1.05 + _SLACK)


@torch.no_grad()
def save_random_adapter(model: PreTrainedModel, folder: Path, rank: int) -> None:
    """A LoRA adapter on every linear layer of the blocks, in PEFT's format, strong enough that the models disagree."""
    alpha = 2 * rank
    noise = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, linear in _linears(model):
        rows, columns = linear.weight.shape
        # Entries of (alpha / rank) up @ down spread like 2 sqrt(rank) times those of the factors.
        spread = _STRENGTH * float(linear.weight.float().std()) / (2 * rank**0.5)
        down = torch.randn(rank, columns, generator=noise) / columns**0.5
        up = torch.randn(rows, rank, generator=noise) * spread * columns**0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": rank, "lora_alpha": alpha}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _linears(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    head = model.get_output_embeddings()
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


@torch.no_grad()
def merged_model(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A copy of the model with the adapter added to its weights; the sum is rounded once."""
    twin = deepcopy(model)
    for name, update in load_adapter(str(folder), model).updates.items():
        weight = twin.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.float() + update.scale * (update.up.float() @ update.down.float()))
    return twin


class Engines:
    """Every engine wanted, over the same reference and the same update of it.

    Args:
        model: the reference as transformers made it. Baselines run it as it is, raindecode copies that share its weights.
        folder: the LoRA adapter; the whole aligned model is made of it.
        prompt: token ids every engine decodes after.
        longest: tokens of the longest decode.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, weight: float,
        names: Sequence[str], prompt: Sequence[int], longest: int,
    ) -> None:  # fmt: skip
        self.reference, self.tokenizer, self.weight, self.prompt = model, tokenizer, weight, list(prompt)
        self.dtype = model.dtype
        self.aligned = merged_model(model, folder)  # the check needs it whatever the engines
        self._kv_tokens = 4 * (len(prompt) + longest) + 64  # for two models, and what a last round left
        self.decoders: dict[str, Decoder] = {}
        if "single" in names:
            self.decoders["single"] = self._decoder()
        if "lora_pair" in names:
            self.decoders["lora_pair"] = self._decoder(adapters=[str(folder)])
        if "two_models" in names:
            self.decoders["two_models"] = self._decoder(aligned=[(sharing(self.aligned), tokenizer)])
        pair = (model, self.aligned, weight)
        kinds: dict[str, Callable[[], Any]] = {
            "single_transformers": lambda: Single(model),
            "two_models_transformers": lambda: TwoModels(*pair),
            "notebook": lambda: Notebook(*pair),
            RECOMPUTE: lambda: Notebook(*pair, use_cache=False),
        }
        self._baselines = {name: make() for name, make in kinds.items() if name in names}

    def _decoder(self, **options: Any) -> Decoder:
        return Decoder(sharing(self.reference), self.tokenizer, kv_tokens=self._kv_tokens, **options)

    def decode(self, name: str, num_tokens: int, stamp: Stamp) -> tuple[list[int], list[float] | None]:
        """Greedy tokens of an engine after the prompt, and their log-probabilities where it reports them."""
        if name not in self.decoders:
            return self._baselines[name].decode(self.prompt, num_tokens, stamp), None
        policy = None if name == "single" else Policy(dera=DeRa(self.weight))
        (done,) = self.decoders[name].generate(
            [self.prompt], search=Sampling.greedy(ignore_eos=True, logprobs=True), policy=policy,
            max_new_tokens=num_tokens, on_progress=lambda *_: stamp(), progress=False,
        )  # fmt: skip
        assert done.logprobs is not None
        return done.token_ids, [one.logprob for one in done.logprobs]

    @torch.inference_mode()
    def check(self, name: str, tokens: Sequence[int], logprobs: Sequence[float] | None) -> Row:
        """Compare an engine's greedy tokens with plain transformers, which runs prompt and answer in one piece.

        Returns:
            margin: by how much the logit of a token lies below the largest one, at most. 0 is the same choice everywhere.
            logprob_error: largest difference of the log-probabilities reported; None where the engine reports none.
            allowed, ok: for both.
        """
        weight = 0.0 if name.startswith("single") else self.weight
        rows = self._rows(self.reference, tokens)
        if weight:
            rows = mixed(weight, self._rows(self.aligned, tokens), rows)
        rows = rows[:, : len(self.tokenizer)]
        chosen = torch.tensor(tokens, device=rows.device)[:, None]
        margin = margin_of(rows, tokens)
        found: Row = {"margin": margin, "logprob_error": None}
        if logprobs is not None:
            expected = rows.log_softmax(-1).gather(-1, chosen)[:, 0]
            found["logprob_error"] = float((torch.tensor(logprobs, device=rows.device) - expected).abs().max())
        allowed = ALLOWED[self.dtype]
        ok = margin <= allowed and (found["logprob_error"] or 0.0) <= allowed
        return found | {"allowed": allowed, "ok": ok}

    def _rows(self, model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
        return answer_rows(model, self.prompt, tokens)


@torch.inference_mode()
def answer_rows(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Logits [len(tokens), vocabulary] float32 that each token of an answer was chosen from, prompt and answer in one forward."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.device)
    run: Any = model
    rows: Tensor = run(ids, use_cache=False, logits_to_keep=len(tokens)).logits[0]
    return rows.float()


def margin_of(rows: Tensor, tokens: Sequence[int]) -> float:
    """By how much the logit of a token lies below the largest one of its row, at most. 0 is the greedy choice everywhere."""
    chosen = torch.tensor(tokens, device=rows.device)[:, None]
    return float((rows.amax(-1, keepdim=True) - rows.gather(-1, chosen)).max())


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same weights in the same memory: raindecode switches the attention of what it is given."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


__all__ = [
    "ALLOWED",
    "BASELINES",
    "OURS",
    "RECOMPUTE",
    "Engines",
    "answer_rows",
    "bytes_needed",
    "load_shape",
    "margin_of",
    "save_random_adapter",
    "sharing",
]
