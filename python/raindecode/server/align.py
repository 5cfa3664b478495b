"""The object `align` of a request: which method answers it. Aliases of model names say the same in one string."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raindecode.errors import ConfigError
from raindecode.search.rain import Preset

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
_MOST_WEIGHT = 1000.0


class _Part(BaseModel):
    """Part of `align`: a key that is not known here is an error, so that a typing mistake does not pass."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Clients that write every field say null where they mean nothing."""
        return {name: one for name, one in given.items() if one is not None} if isinstance(given, dict) else given

    def _said(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


class RainPart(_Part):
    """Settings of RAIN that differ from the preset's."""

    preset: Preset | None = Field(None, description="Published set-up; the server's default without.")
    max_iterations: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="Iterations of a root (maxT)."
    )
    min_new_iterations: Annotated[int, Field(ge=1, le=10_000)] | None = None
    min_visits: Annotated[int, Field(ge=0, le=10_000)] | None = Field(None, description="minT")
    value_threshold: Finite | None = Field(None, description="Vt, from -1 to 1.", ge=-1, le=1)
    num_samples: Annotated[int, Field(ge=1, le=64)] | None = None
    max_tries: Annotated[int, Field(ge=1, le=256)] | None = None
    dynamic_tries: Annotated[int, Field(ge=1, le=64)] | None = None
    top_k: Annotated[int, Field(ge=1, le=64)] | None = None
    first_top_k: Annotated[int, Field(ge=1, le=64)] | None = None
    expansion_temperature: Finite | None = Field(None, gt=0, le=100)
    c_puct: Finite | None = Field(None, ge=0, le=1000)
    similarity_weight: Finite | None = Field(None, ge=0, le=1)
    similarity_threshold: Finite | None = Field(None, ge=-1, le=1)
    max_children: Annotated[int, Field(ge=1, le=64)] | None = None
    dynamic_children: bool | None = None
    width: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] | None = Field(
        None, description="Leaves worked on at once; changes the speed, not the answer."
    )
    tree: bool = Field(False, description="Return the search trees with the answer.")


class DeraPart(_Part):
    """How the server's models are mixed."""

    weight: Annotated[float, Field(ge=-_MOST_WEIGHT, le=_MOST_WEIGHT, allow_inf_nan=False)] | Annotated[
        list[Annotated[float, Field(ge=-_MOST_WEIGHT, le=_MOST_WEIGHT, allow_inf_nan=False)]], Field(min_length=1, max_length=16)
    ] | None = Field(None, alias="lambda", description="0 is the reference, 1 the aligned model; one per aligned model.")  # fmt: skip
    target_kl: Finite | None = Field(
        None, gt=0, description="Solve for the weight that gives this KL in nats per token."
    )
    max_weight: Finite | None = Field(None, gt=0, le=_MOST_WEIGHT)
    allow_negative: bool = False
    plausibility: Finite | None = Field(None, ge=0, le=1)
    plausibility_model: Annotated[int, Field(ge=0, le=16)] | None = None

    def over(self, other: DeraPart) -> DeraPart:
        """This, with what it leaves out as `other` says; a weight goes before a KL to solve it for, and the other way round."""
        values = self._said()
        if "weight" in values or "target_kl" in values:
            other = other.model_copy(update={"weight": None, "target_kl": None})
        return other.model_copy(update=values)


class EditPart(_Part):
    """One edit of hidden states, by the name the server knows it by."""

    name: str = Field(min_length=1, max_length=200)
    strength: Finite = Field(1.0, ge=-1000, le=1000)
    on: Literal["reference", "aligned", "both"] = "reference"
    judge: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        name, colon, number = given.rpartition(":")
        try:
            return {"name": name, "strength": float(number)} if colon else {"name": given}
        except ValueError:
            return {"name": given}


class Align(_Part):
    """How a request is aligned. What it leaves out is as the server was started."""

    search: Literal["sampling", "rain"] | None = None
    rain: RainPart | None = Field(
        None, description="Settings of RAIN; `true` takes the preset's, and both choose it as the search."
    )
    dera: DeraPart | None = Field(None, description="Mix the models; a number is short for its `lambda`.")
    edits: Annotated[list[EditPart], Field(max_length=16)] | None = Field(
        None, description='Edits of hidden states: names, "name:strength", or objects. An empty list turns them off.'
    )
    urial: bool | Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="A constant prompt before the query: `true` for the default, or a name; `false` turns it off."
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        made = dict(given)
        if isinstance(made.get("rain"), bool):
            if made["rain"]:
                made["rain"] = {}
            elif made.get("search") == "rain":
                raise ValueError("it says rain false and search 'rain': leave one of them out")
            else:
                made |= {"rain": None, "search": "sampling"}
        if _is_number(made.get("dera")):
            made["dera"] = {"lambda": made["dera"]}
        if isinstance(made.get("edits"), (str, dict)):
            made["edits"] = [made["edits"]]
        return made

    @model_validator(mode="after")
    def _agrees(self) -> Align:
        if self.rain is not None and self.search == "sampling":
            raise ValueError("it holds settings of RAIN and says search 'sampling': leave one of them out")
        return self

    def over(self, other: Align) -> Align:
        """This, with what it leaves out as `other` says."""
        values = self._said()
        if self.rain is not None and other.rain is not None:
            values["rain"] = other.rain.model_copy(update=self.rain._said())
        if self.dera is not None and other.dera is not None:
            values["dera"] = self.dera.over(other.dera)
        if "search" in values and values["search"] == "sampling" and other.rain is not None:
            other = other.model_copy(update={"rain": None})
        elif "rain" in values and other.search == "sampling":
            other = other.model_copy(update={"search": None})
        return other.model_copy(update=values)

    @property
    def searches(self) -> bool:
        """Whether RAIN answers."""
        return self.search == "rain" or (self.search is None and self.rain is not None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse_alias(text: str) -> dict[str, Any]:
    """What stands behind the "@" of a model's name, as the object `align`: parts with commas between, each `rain`, `rain=PRESET`,
    `sampling`, `dera=WEIGHT`, `urial`, `urial=NAME` or `edit=NAME[:STRENGTH]`.

    Raises:
        ConfigError: a part is something else, or is there twice.
    """
    made: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if name in made:
            raise ConfigError(f"the model's name says {name!r} twice; say it once")
        made[name] = value

    for part in text.split(","):
        key, equals, value = part.partition("=")
        if key in ("rain", "sampling") and not equals:
            put("search", key)
        elif key == "rain" and value in get_args(Preset):
            put("rain", {"preset": value})
        elif key == "dera" and _as_float(value) is not None:
            put("dera", {"lambda": _as_float(value)})
        elif key == "urial" and (value or not equals):
            put("urial", value or True)
        elif key == "edit" and value:
            made.setdefault("edits", []).append(value)
        else:
            raise ConfigError(
                f"the model's name holds {part!r:.80} behind '@'; allowed: rain, rain=PRESET ({', '.join(get_args(Preset))}), sampling, "
                "dera=WEIGHT, urial, urial=NAME, edit=NAME[:STRENGTH], with commas between"
            )
    return made


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
