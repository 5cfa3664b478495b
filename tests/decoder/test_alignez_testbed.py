"""AlignEZ on the embedded model: a direction planted in its weights is found again, and a preset does what it is there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raindecode import testbed
from raindecode.decoder import Decoder
from raindecode.engine.loader import load_pretrained
from raindecode.errors import FitError
from raindecode.evaluation import MAX_NEW_TOKENS, SEARCHES, town_rates, town_requests
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.elicitation import Elicitation
from raindecode.policy.alignez.pairs import Pair
from raindecode.policy.policy import Policy
from raindecode.search.rain import RAIN

GOOD, BAD = " kind", " cold"  # one token each
PAIRS = [
    Pair(prompt=request.text, chosen=GOOD, rejected=BAD)
    for request in testbed.sample_requests(32, split="train", seed=0)
]


def truth(seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(128, generator=torch.Generator().manual_seed(seed)), dim=0)


def planted(u: Tensor, size: float) -> Decoder:
    """The testbed model, in which two words differ by 2 size u and by nothing else.

    Both words get the mean of their embeddings, plus or minus size u. All weights that read the residual stream see a twentieth of
    its component along u: what the model itself makes of the two words, which points elsewhere, stays small, and the shift is
    carried from layer to layer. So u is what tells the sides apart, in states that are otherwise those of real texts.
    """
    model, tokenizer = load_pretrained(str(testbed.WEIGHTS), device=torch.device("cpu"), dtype=torch.float32)
    good, bad = (tokenizer(word).input_ids[-1] for word in (GOOD, BAD))
    parts: Any = model
    with torch.no_grad():
        words = parts.get_input_embeddings().weight
        mean = (words[good] + words[bad]) / 2
        words[good], words[bad] = mean + size * u, mean - size * u
        for layer in parts.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            _half_blind(layer.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj), u)
            _half_blind(layer.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj), u)
    return Decoder(model, tokenizer)


def _half_blind(norm: Tensor, readers: tuple[Any, ...], u: Tensor) -> None:
    for reader in readers:
        reads = reader.weight * norm
        reader.weight.copy_((reads - 0.95 * torch.outer(reads @ u, u)) / norm)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_planted_direction_is_found_with_its_sign(seed: int) -> None:
    u = truth(seed)
    decoder = planted(u, 60.0)
    states = decoder.activations([(pair.prompt, GOOD) for pair in PAIRS], layers=[1], tap="block_out")[0]
    assert 60 < float(states.norm(dim=-1).mean()) < 180, "the shift must not be all there is"

    def found(kind: str, layer: int, **settings: Any) -> float:
        options = {"tap": "block_out", "pool": "last", "context": "question", "layers": (layer,), **settings}
        edit = AlignEZ.fit(decoder, PAIRS, kind, progress=False, **options)
        return float(edit.stages[0][1].directions[0] @ u)

    for layer in (0, 1):
        assert found("svd-diff", layer) >= 0.95
        assert found("mean-diff", layer) >= 0.95
    for normalize in ("none", "joint"):
        assert found("ccs", 1, normalize=normalize) >= 0.95, normalize
    # Each side's own mean taken away, as published, takes the shift away.
    assert abs(found("ccs", 1, normalize="per_side")) < 0.5
    # A side's first singular vector is what its states share, not what tells the sides apart.
    assert abs(found("svd", 1)) < 0.8


def test_without_the_shift_there_is_nothing_to_find() -> None:
    decoder = planted(truth(0), 0.0)
    with pytest.raises(FitError, match="none of the 32 pairs differs"):
        AlignEZ.fit(decoder, PAIRS, "mean-diff", progress=False, pool="last", context="question", layers=None)


def test_a_preset_fitted_on_the_models_own_pairs_halves_the_harmful_rate() -> None:
    decoder = Decoder.from_pretrained("testbed", device="cpu", dtype="float32")
    questions = [request.text for request in testbed.sample_requests(20, split="train", seed=0)]
    pairs = AlignEZ.generate_pairs(decoder, questions, elicitation=Elicitation.testbed(), progress=False)
    edit = AlignEZ.fit(decoder, pairs, "svd", progress=False)
    harmful, benign = town_requests(40, 20, seed=0)
    requests = [request.text for request in (*harmful, *benign)]

    def rates(*edits: AlignEZ) -> dict[str, float]:
        answers = decoder.generate(
            requests, search=SEARCHES["vanilla"](), policy=Policy(prompt=RAIN.preset("town").format, edits=edits),
            max_new_tokens=MAX_NEW_TOKENS, seed=list(range(len(requests))), progress=False,
        )  # fmt: skip
        return {name: rate.rate for name, rate in town_rates(answers).items()}

    plain, edited = rates(), rates(edit)
    assert plain["harmful"] > 0.3, "the base model must have something to lose"
    assert edited["harmful"] <= plain["harmful"] / 2
    assert edited["helpful"] >= plain["helpful"] - 0.1
    # Turned around, the same directions make it worse.
    assert rates(edit.scaled(-1.0))["harmful"] > plain["harmful"]
