"""Options that add aligned models to a command and say how they are mixed (DeRa)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from raindecode.errors import ConfigError
from raindecode.policy.dera import DeRa

_PANEL = "Aligned models (DeRa)"

AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="Aligned model that is a LoRA adapter on --model: a PEFT folder, a hub id, or `testbed`. May be repeated.",
        rich_help_panel=_PANEL,
    ),
]
AlignedOption = Annotated[
    list[str] | None,
    typer.Option(
        "--aligned",
        help="Aligned model that is a whole model with the same tokenizer. May be repeated; numbered after the adapters.",
        rich_help_panel=_PANEL,
    ),
]
LambdaOption = Annotated[
    str | None,
    typer.Option(
        "--lambda",
        help="Weight of the aligned model: 0 is --model alone, 1 the aligned one (default), above 1 goes beyond it. With "
        "several aligned models one weight each, comma between.",
        rich_help_panel=_PANEL,
    ),
]
AllowNegativeOption = Annotated[
    bool,
    typer.Option(
        "--allow-negative", help="Accept weights below 0, which reverse the alignment.", rich_help_panel=_PANEL
    ),
]
TargetKlOption = Annotated[
    float | None,
    typer.Option(
        "--target-kl",
        help="Instead of --lambda: at every token, the weight (at most 2) whose mixture is this many nats from --model.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class AlignedModels:
    """The aligned models a command was given, and how they are mixed.

    Attributes:
        adapters, models: names for Decoder.from_pretrained.
        dera: None when there is no aligned model.
    """

    adapters: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    dera: DeRa | None = None

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments for Decoder.from_pretrained."""
        return {"adapter": self.adapters, "aligned": self.models}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an answer, as plain data for the records of --output; empty without aligned models."""
        if self.dera is None:
            return {}
        assert isinstance(self.dera.weights, tuple)
        weights = {"lambda": list(self.dera.weights)} if self.dera.kl is None else {"target_kl": self.dera.kl}
        return {
            **({"adapter": list(self.adapters)} if self.adapters else {}),
            **({"aligned": list(self.models)} if self.models else {}),
            **weights,
            **({"mixture_stats": True} if self.dera.stats else {}),
        }


def aligned_models(
    adapters: Sequence[str] | None, models: Sequence[str] | None, *, weights: str | None = None,
    allow_negative: bool = False, target_kl: float | None = None, stats: bool = False,
) -> AlignedModels:  # fmt: skip
    """What the options above describe.

    Args:
        weights: the text of --lambda.
        stats: measure the mixture at every token.

    Raises:
        ConfigError: a weight is no number or not allowed, there are not as many as aligned models, or an option has no
            aligned model to speak of.
    """
    number = len(adapters or ()) + len(models or ())
    if not number:
        given = {"--lambda": weights is not None, "--target-kl": target_kl is not None}
        given |= {"--allow-negative": allow_negative, "--mixture-stats": stats}
        named = [name for name, there in given.items() if there]
        if named:
            raise ConfigError(
                f"{', '.join(named)} is about an aligned model, and none was given: name one with --adapter or --aligned"
            )
        return AlignedModels()
    if weights is not None and target_kl is not None:
        raise ConfigError("--lambda and --target-kl exclude each other: give the weight, or the KL it is solved for")
    if target_kl is not None and allow_negative:
        raise ConfigError(
            "--allow-negative is about --lambda, and --target-kl solves for weights from 0 to 2: drop one of them"
        )
    if target_kl is not None:
        dera = DeRa.target_kl(target_kl)
    elif weights is not None:
        dera = DeRa(weight_list("--lambda", weights), allow_negative=allow_negative, stats=stats)
    elif number == 1:
        dera = DeRa(1.0, stats=stats)
    else:
        raise ConfigError(
            f"{number} aligned models were given without --lambda: give one weight per model, comma between, such as "
            f"--lambda {','.join(['0.5'] * number)}"
        )
    dera.mix(1 + number)  # so that a wrong number of weights is refused before models are loaded
    return AlignedModels(tuple(adapters or ()), tuple(models or ()), dera)


def weight_list(option: str, text: str) -> list[float]:
    """Numbers with commas between.

    Raises:
        ConfigError: something else; the message names `option`.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}; allowed: a number, or several with commas between") from error
