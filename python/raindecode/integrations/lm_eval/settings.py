"""What the harness's model arguments ask for: a decoder, a policy and a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from raindecode.commands.edited import file_and_strength
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.policy.urial import URIAL
from raindecode.search.rain import RAIN

SEARCHES = ("sampling", "rain")
_AS_GIVEN = ChatFormat()  # no turn markers and no stop strings: what the task wrote is what the model reads


@dataclass(frozen=True)
class Method:
    """How scores and answers are made.

    Attributes:
        policy: without a prompt: texts are fed as they are.
        format: how a context is written as the user's words; None feeds it as it is.
        rain: None for plain sampling, whose settings each task names.
    """

    policy: Policy
    format: ChatFormat | None
    rain: RAIN | None

    @property
    def answering(self) -> Policy:
        """The policy of prompts that are generated from."""
        return replace(self.policy, prompt=self.format or _AS_GIVEN)


def load_decoder(pretrained: str | Decoder, *, device: str | None, dtype: str | None, **options: Any) -> Decoder:
    """The decoder itself, or one loaded by name. A GPU that is not there becomes the CPU, as the harness has it.

    Raises:
        ModelError, ConfigError: as Decoder.from_pretrained; ConfigError too when options are given for a loaded decoder.
    """
    if isinstance(pretrained, Decoder):
        given = [name for name, value in options.items() if value not in (None, (), "", False)]
        if given or dtype not in (None, "auto"):
            named = [*given, *([] if dtype in (None, "auto") else ["dtype"])]
            raise ConfigError(
                f"{', '.join(named)} says how a model is loaded, and a Decoder was given: load it that way"
            )
        return pretrained
    if device is not None and str(device).startswith("cuda") and not torch.cuda.is_available():
        device = None
    number_type: Any = None if dtype == "auto" else dtype
    chosen = {name: value for name, value in options.items() if value is not None}
    return Decoder.from_pretrained(
        pretrained, device=None if device is None else str(device), dtype=number_type, **chosen
    )


def mixture(
    dera: float | Sequence[float] | None, target_kl: float | None, num_aligned: int, *, allow_negative: bool
) -> DeRa | None:
    """The mixture; an aligned model that is loaded counts in full where nothing else is said, as on the command line.

    Raises:
        ConfigError: the weights are not allowed, or do not fit the aligned models.
    """
    if dera is not None and target_kl is not None:
        raise ConfigError("dera and target_kl exclude each other: give the weight, or the KL it is solved for")
    if not num_aligned and (dera is not None or target_kl is not None):
        raise ConfigError(
            "dera and target_kl mix aligned models, and none was given: name one with adapter= or aligned="
        )
    if target_kl is not None:
        return DeRa.target_kl(target_kl)
    if dera is not None:
        return DeRa(dera, allow_negative=allow_negative)
    if num_aligned > 1:
        raise ConfigError(
            f"{num_aligned} aligned models were given without weights: give one each, such as dera={[0.5] * num_aligned}"
        )
    return DeRa(1.0) if num_aligned else None


def edits_of(given: str | Sequence[str], *, on: str, judge: bool, force: bool) -> tuple[AlignEZ, ...]:
    """Edits from texts FILE[:STRENGTH].

    Raises:
        EditFileError: a file is missing or of another kind. ConfigError: an argument is not allowed.
    """
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"edits is {given!r}; give FILE or FILE:STRENGTH, or a list of these")
    choices: dict[str, Any] = {"on": on, "judge": judge, "force": force}
    parts = [file_and_strength(name) for name in names if name]
    return tuple(AlignEZ.load(file, strength=strength, **choices) for file, strength in parts)


def searching(search: str, preset: str | None, changes: Mapping[str, Any] | None, model: str) -> RAIN | None:
    """RAIN as asked for; None for plain sampling.

    Raises:
        ConfigError: there is no such search, preset or setting.
    """
    if search not in SEARCHES:
        raise ConfigError(f"search is {search!r}; allowed: {', '.join(SEARCHES)}")
    if search == "rain":
        if changes is not None and not isinstance(changes, Mapping):
            raise ConfigError(f"rain is {changes!r}; give settings of RAIN by name, such as {{'max_iterations': 20}}")
        name: Any = preset or ("town" if model == "testbed" else "hh")
        return RAIN.preset(name, **(changes or {}))
    if preset is not None or changes:
        raise ConfigError("rain_preset and rain are settings of search=rain; give that too, or drop them")
    return None


def format_of(prompt: str | None, decoder: Decoder, rain: RAIN | None) -> ChatFormat | None:
    """How contexts are written: "raw" (or None) as they are, "format" as the search or the decoder writes prompts, "urial" behind the
    default URIAL prompt, or behind that of a file.

    Raises:
        ConfigError: there is no format. PromptFileError: the file is none of a prompt.
    """
    if prompt is None or prompt == "raw":
        return None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"prompt is {prompt!r}; allowed: 'raw', 'format', 'urial', or the file of a URIAL prompt")
    if prompt == "urial":
        return URIAL.testbed() if decoder.name == "testbed" else URIAL.default()
    if prompt != "format":
        return URIAL.load(prompt)
    found = rain.format if rain is not None and rain.format is not None else decoder.format
    if found is None:
        raise ConfigError("prompt=format asks for the format of the decoder or of RAIN, and neither has one")
    return found
