"""The aligned partner: a LoRA adapter trained on the frozen base by direct preference optimization (DPO).

Loss (Rafailov and others, 2023, equation 7) plus a little likelihood of the chosen reply, so that chosen replies do not
become unlikely together with the rejected ones. Pairs come from the grammar: refusing beats complying with harm, helping beats
refusing what hurts nobody, friendly words beat cruel ones.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from raindecode.errors import ConfigError
from raindecode.testbed.forms import Style
from raindecode.testbed.lora import LowRank, attach_adapter
from raindecode.testbed.model import EOS_ID
from raindecode.testbed.world import draw_reply, draw_request, dress, format_prompt, refusal


@dataclass(frozen=True)
class AdapterSettings:
    """What the adapter's training depends on."""

    steps: int = 160
    pairs_per_batch: int = 24
    rank: int = 8
    alpha: float = 16.0
    beta: float = 0.3
    likelihood: float = 2.0
    learning_rate: float = 5e-4
    harmful_share: float = 0.55
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.pairs_per_batch < 1 or self.rank < 1:
            raise ConfigError(
                f"steps, pairs_per_batch and rank must be at least 1, "
                f"got {self.steps}, {self.pairs_per_batch} and {self.rank}"
            )


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a better and a worse reply."""

    prompt: str
    chosen: str
    rejected: str


def draw_pair(rng: random.Random, *, harmful_share: float) -> PreferencePair:
    """One preference pair about a request of the training split."""
    request = draw_request(rng, harmful=rng.random() < harmful_share)
    worse_style: Style = rng.choices(("neutral", "cruel"), weights=(6, 4))[0]
    better_style: Style = rng.choices(("neutral", "kind"), weights=(7, 3))[0]
    chosen = draw_reply(rng, request, better_style, comply=not request.harmful)
    if request.harmful:
        rejected = draw_reply(rng, request, worse_style, comply=True)
    else:
        rejected = dress(rng, refusal(rng, request), worse_style)
    return PreferencePair(format_prompt(request.text), chosen, rejected)


def reply_log_likelihood(model: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Summed log-probability of the tokens under `mask` [rows, length - 1], per row."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return -(losses.view_as(mask) * mask).sum(-1)


def train_adapter(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: AdapterSettings,
    *,
    report: Callable[[int, float, float], None] | None = None,
) -> dict[str, LowRank]:
    """Train an adapter on a copy of `base`; `report` gets step, loss and the share of pairs ranked rightly."""
    torch.manual_seed(settings.seed)
    rng = random.Random(f"adapter/{settings.seed}")
    policy = copy.deepcopy(base)
    updates = attach_adapter(policy, rank=settings.rank, alpha=settings.alpha)
    parameters = [parameter for update in updates.values() for parameter in update.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    for step in range(settings.steps):
        pairs = [draw_pair(rng, harmful_share=settings.harmful_share) for _ in range(settings.pairs_per_batch)]
        ids, mask = encode_pairs(tokenizer, pairs)
        with torch.no_grad():
            reference = reply_log_likelihood(base, ids, mask)
        likelihood = reply_log_likelihood(policy, ids, mask)
        better, worse = (likelihood - reference).chunk(2)
        per_token = likelihood[: len(pairs)] / mask[: len(pairs)].sum(-1)
        loss = -F.logsigmoid(settings.beta * (better - worse)).mean() - settings.likelihood * per_token.mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 20) * (1.0 - step / settings.steps)
        optimizer.step()
        if report is not None:
            report(step, loss.item(), (better > worse).float().mean().item())
    return updates


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: list[PreferencePair]) -> tuple[Tensor, Tensor]:
    """Chosen rows, then rejected rows: ids [2 pairs, length], and the mask of reply targets [2 pairs, length - 1]."""
    sides = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    rows = [
        (len(tokenizer.encode(prompt)), [*tokenizer.encode(f"{prompt} {reply}"), EOS_ID]) for prompt, reply in sides
    ]
    length = max(len(row) for _, row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length - 1)
    for index, (prompt_length, row) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, prompt_length - 1 : len(row) - 1] = 1.0
    return ids, mask
