"""Bodies of requests, in OpenAI's form. Fields that are not named here are accepted and mean nothing, as clients expect."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raindecode.server.align import Align, Finite

_MOST_TOKENS = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=_MOST_TOKENS)]
Text = Annotated[str, Field(min_length=1, max_length=2**22)]
_REFUSED = {
    "logit_bias": "this server does not change single tokens' logits",
    "tools": "this server does not call tools",
    "functions": "this server does not call functions",
    "suffix": "this server does not fill in the middle",
}
_ZERO = ("presence_penalty", "frequency_penalty")


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


class _Body(BaseModel):
    """What both ways to ask for an answer share."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    model: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        None, description="The served model, or an alias such as `name@dera=0.5` or `name@rain,urial`."
    )
    max_tokens: Annotated[int, Field(ge=0, le=_MOST_TOKENS)] | None = Field(
        None, description="Most tokens of an answer."
    )
    temperature: Finite | None = Field(None, ge=0, le=100)
    top_p: Finite | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=_MOST_TOKENS)] | None = Field(None, description="0 or -1 keep all tokens.")
    min_p: Finite | None = Field(None, ge=0, le=1)
    repetition_penalty: Finite | None = Field(None, gt=0, le=100)
    presence_penalty: Finite | None = Field(None, description="Only 0: not supported.")
    frequency_penalty: Finite | None = Field(None, description="Only 0: not supported.")
    n: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None, description="Answers per prompt, with seeds seed, seed + 1, ..."
    )
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = Field(None, description="Only as many as n.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = Field(
        None, description="Same request and seed: same answer. Drawn by the server without."
    )
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(None, description="Give the answer's token ids, too.")
    align: Align | None = Field(None, description="Which of RAIN, DeRa, AlignEZ and URIAL answer it.")
    dera_lambda: Finite | None = Field(None, description="Short for align.dera.", ge=-1000, le=1000)
    vllm_xargs: dict[str, Any] | None = Field(
        None, description="Its dera_lambda is read, so that requests for vLLM work here."
    )

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, reason in _REFUSED.items():
            if given.get(name):
                raise ValueError(f"{name} is not supported: {reason}")
        for name in _ZERO:
            if given.get(name) not in (None, 0):
                raise ValueError(f"{name} is not supported: leave it out or 0; repetition_penalty is")
        shape = given.get("response_format")
        if isinstance(shape, dict) and shape.get("type", "text") != "text":
            raise ValueError("response_format is not supported: this server writes text; leave it out")
        return given

    @model_validator(mode="after")
    def _agrees(self) -> _Body:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported beyond n: leave it out, or as n")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed where stream is true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(_Body):
    """POST /v1/completions"""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(
        description="A text or token ids, or several of them. Fed as they are, unless a constant prompt (align.urial) says how queries "
        "are written."
    )
    echo: bool | None = Field(None, description="Give the prompt back before the answer, with its log-probabilities.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Log-probabilities of the tokens, and of so many of the likeliest at each place."
    )


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ChatBody(_Body):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=_MOST_TOKENS)] | None = Field(
        None, description="As max_tokens."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _asks(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class TokenizeBody(BaseModel):
    """POST /tokenize"""

    model_config = ConfigDict(extra="ignore")
    prompt: str = Field(max_length=2**22)
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    """POST /detokenize"""

    model_config = ConfigDict(extra="ignore")
    tokens: Annotated[list[TokenId], Field(max_length=2**20)]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error has this form."""

    error: ErrorDetail
