"""Catalog: what a server has to align by, and what a request's `align` comes to."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from raindecode.decoder import Decoder
from raindecode.errors import ConfigError
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.schedule import check_fits
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.policy.urial import URIAL
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.server.align import Align, DeraPart, EditPart, RainPart, parse_alias
from raindecode.server.faults import Fault
from raindecode.server.settings import ServerSettings

_MOST_EDITS = 256  # remembered with their strengths: requests that name one share its device tables
DEFAULT_PROMPT = "default"


class Catalog:
    """Everything by name. Files are read once, here.

    Raises:
        EditFileError, PromptFileError: a file is missing, damaged or of another kind.
        ConfigError: an edit is for another model, or the server's own `align` does not hold.
    """

    def __init__(self, decoder: Decoder, settings: ServerSettings) -> None:
        self.name = settings.served_name
        self._decoder = decoder
        self.preset = settings.preset or ("town" if settings.model == "testbed" else "hh")
        named = RAIN.preset(settings.preset).format if settings.preset else None  # type: ignore[arg-type]
        self._chat_format = named
        self.edits = {name: AlignEZ.load(path, force=settings.force_edits) for name, path in settings.edits.items()}
        for edit in self.edits.values():
            check_fits(edit, decoder.identities)
        first = URIAL.testbed() if settings.model == "testbed" else URIAL.default()
        self.prompts: dict[str, ChatFormat] = {DEFAULT_PROMPT: first}
        self.prompts |= {name: URIAL.load(path) for name, path in settings.prompts.items()}
        self._made: OrderedDict[tuple[str, float, str, bool], AlignEZ] = OrderedDict()
        try:
            self.default = Align.model_validate(dict(settings.align))
        except ValidationError as error:
            raise ConfigError(
                f"the server's align {dict(settings.align)!r} does not hold: {first_error(error)}"
            ) from error
        try:  # so that a server that can answer nothing does not start
            self.choose(self.default, Sampling(), chat=True)
        except Fault as fault:
            raise ConfigError(f"the server's align {dict(settings.align)!r} does not hold: {fault.message}") from fault

    @property
    def aliases(self) -> list[str]:
        """Names a client may ask for: the model, and the model aligned in one way each."""
        ways = ["rain", "urial", *(f"urial={name}" for name in self.prompts if name != DEFAULT_PROMPT)]
        ways += ["dera=0", "dera=0.5", "dera=1"] if self._decoder.num_models == 2 else []
        ways += [f"edit={name}" for name in self.edits]
        return [self.name, *(f"{self.name}@{way}" for way in ways)]

    def align_of(self, model: str | None, given: Align | None, weight: float | None) -> Align:
        """What a request is aligned by: what it says, then what its model's name says, then the server's default.

        Args:
            weight: its dera_lambda.

        Raises:
            Fault: there is no such model, or no such alias.
        """
        align = self.default
        base, at, alias = (model or self.name).partition("@")
        if base != self.name:
            raise Fault(
                404,
                f"the model {model!r:.120} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )
        if at:
            try:
                align = Align.model_validate(parse_alias(alias)).over(align)
            except (ConfigError, ValidationError) as error:
                text = str(error) if isinstance(error, ConfigError) else first_error(error)
                raise Fault(404, text, param="model", code="model_not_found") from error
        if weight is not None:
            if given is not None and given.dera is not None:
                raise Fault(400, "dera_lambda and align.dera say the same; give one of them", param="dera_lambda")
            align = Align.model_validate({"dera": weight}).over(align)
        return align if given is None else given.over(align)

    def choose(self, align: Align, sampling: Sampling, *, chat: bool) -> tuple[Sampling | RAIN, Policy]:
        """The search and the policy of a request.

        Args:
            sampling: what plain sampling would be like.
            chat: whether prompts are what a user says, to be written in a chat's form; else they are fed as they are.

        Raises:
            Fault: something is named that this server does not have.
            ConfigError: a value is not allowed.
        """
        search = self._rain(align.rain or RainPart.model_validate({})) if align.searches else sampling
        return search, Policy(prompt=self._format(align, chat), dera=_dera(align.dera), edits=self._edits(align))

    def _rain(self, part: RainPart) -> RAIN:
        changes = part.model_dump(exclude_none=True, exclude={"preset", "tree"})
        return RAIN.preset(part.preset or self.preset, record_tree=part.tree, **changes)  # type: ignore[arg-type]

    def _format(self, align: Align, chat: bool) -> ChatFormat | None:
        if align.urial:
            name = DEFAULT_PROMPT if align.urial is True else align.urial
            if name not in self.prompts:
                raise Fault(
                    400,
                    f"there is no constant prompt {name!r:.120}; this server has {', '.join(self.prompts)}",
                    param="align.urial",
                )
            return self.prompts[name]
        if not chat:
            return ChatFormat()
        return None if align.searches else self._chat_format

    def _edits(self, align: Align) -> tuple[AlignEZ, ...]:
        return tuple(self._edit(part) for part in align.edits or ())

    def _edit(self, part: EditPart) -> AlignEZ:
        if part.name not in self.edits:
            have = (
                f"this server has {', '.join(self.edits)}"
                if self.edits
                else "this server was started without edits (--edit)"
            )
            raise Fault(400, f"there is no edit {part.name!r:.120}; {have}", param="align.edits")
        name = part.name, part.strength, part.on, part.judge
        if name not in self._made:
            self._made[name] = replace(self.edits[part.name], strength=part.strength, on=part.on, judge=part.judge)
            while len(self._made) > _MOST_EDITS:
                self._made.popitem(last=False)
        self._made.move_to_end(name)
        return self._made[name]


def _dera(part: DeraPart | None) -> DeRa | None:
    if part is None:
        return None
    given: dict[str, Any] = part.model_dump(
        exclude_none=True, include={"plausibility", "plausibility_model", "max_weight"}
    )
    if part.target_kl is not None:
        if part.weight is not None:
            raise ConfigError("align.dera has lambda and target_kl, the KL it would be solved for; give one of them")
        return DeRa.target_kl(part.target_kl, **given)
    return DeRa(1.0 if part.weight is None else part.weight, allow_negative=part.allow_negative, **given)


def first_error(error: ValidationError) -> str:
    """The first thing a body was refused for, as a sentence."""
    one = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in one["loc"])
    return f"{where}: {one['msg']}" if where else str(one["msg"])
