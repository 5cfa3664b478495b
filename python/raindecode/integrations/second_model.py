"""The other model of a DeRa pair, for stacks that serve one of the two: it follows their requests and gives its logits.

Knows no serving stack. vLLM and SGLang bring rows of logits of the model they serve; what is here brings the other model's for
the same tokens, all rows of a step in one forward, and mixes them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

import torch
from torch import Tensor

from raindecode import testbed
from raindecode.engine.adapter import load_adapter
from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.engine import Engine
from raindecode.engine.kv_tree import KVTree
from raindecode.engine.loader import build_engine, load_pretrained
from raindecode.engine.model_facts import context_length_of, device_of, name_of, vocabulary_of
from raindecode.engine.task import Task
from raindecode.engine.types import Got, Want
from raindecode.engine.vocabulary import check_same_tokenizer, shared_vocab_size
from raindecode.errors import CapacityError, ConfigError
from raindecode.mixture import Mix
from raindecode.settings import require_whole

Role = Literal["reference", "aligned"]
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_POOL_BYTES_CPU: Final = 2**30
_POOL_SHARE_GPU: Final = 0.1  # of the memory that is free when the model has been loaded


@dataclass(frozen=True)
class SecondSettings:
    """Which model of a DeRa pair the plug-in loads; the serving stack serves the other.

    Exactly one of `reference` and `aligned` names it.

    Attributes:
        reference: the model served is the aligned one, this is what it was trained from: a folder, a hub id, or "testbed".
        aligned: the model served is the reference, this is the aligned one.
        adapter: with `aligned`: a PEFT folder; the model is what `aligned` names with this LoRA adapter on it.
        kv_tokens: tokens of its KV pool; None: what all requests can have, at most 1 GiB on a CPU and a tenth of
            the free memory on a GPU. When it is full, requests that wait give up their K/V and compute it again.
        dtype: "float32", "bfloat16" or "float16"; None: that of the served model.
        trust_remote_code: as in transformers.

    Raises:
        ConfigError: a value is not allowed.
    """

    reference: str | None = None
    aligned: str | None = None
    adapter: str | None = None
    kv_tokens: int | None = None
    dtype: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("reference", "aligned", "adapter"):
            given = getattr(self, name)
            if given is not None and (not isinstance(given, str) or not given):
                raise ConfigError(f"raindecode.{name} is {given!r}; allowed: a folder or a hub id")
        if (self.reference is None) == (self.aligned is None):
            raise ConfigError(
                "the DeRa plug-in needs the other model of the pair, and one of its two names: {'reference': PATH} when the aligned "
                f"model is served, {{'aligned': PATH}} when the reference is; given: reference={self.reference!r}, "
                f"aligned={self.aligned!r}"
            )
        if self.adapter is not None and self.aligned is None:
            raise ConfigError("raindecode.adapter belongs to 'aligned': {'aligned': BASE, 'adapter': FOLDER}")
        if self.kv_tokens is not None:
            require_whole("raindecode.kv_tokens", self.kv_tokens, 1)
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ConfigError(f"raindecode.dtype is {self.dtype!r}; allowed: {', '.join(_DTYPES)}")
        if not isinstance(self.trust_remote_code, bool):
            raise ConfigError(f"raindecode.trust_remote_code is {self.trust_remote_code!r}; allowed: true or false")

    @classmethod
    def parse(cls, given: object) -> SecondSettings:
        """Settings from a mapping, as it comes out of JSON.

        Raises:
            ConfigError: it is no mapping, has a key that is not known, or a value is not allowed.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping):
            raise ConfigError(f"the settings of the DeRa plug-in are {given!r}; give an object with {', '.join(known)}")
        if unknown := sorted(str(key) for key in given if key not in known):
            raise ConfigError(
                f"the settings of the DeRa plug-in hold {', '.join(unknown)}; allowed: {', '.join(known)}"
            )
        return cls(**given)

    @property
    def role(self) -> Role:
        """Which half of the pair the model loaded is."""
        return "reference" if self.reference is not None else "aligned"

    @property
    def path(self) -> str:
        """What is loaded."""
        return self.reference or self.aligned or ""


class Follower:
    """One request of the serving stack, as the second model sees it. Close it when the request ends."""

    def __init__(self, engine: Engine, mix: Mix) -> None:
        self.ledger = Ledger()
        self.branch: Branch = engine.open(self.ledger, (), mix)

    @property
    def length(self) -> int:
        """Tokens it has been given."""
        return self.branch.length

    def extend(self, tokens: Sequence[int]) -> None:
        """More tokens of the request. They run with the next `SecondModel.logits`."""
        self.branch.append(tokens)

    def close(self) -> None:
        """Let go of its K/V. Safe to call twice."""
        self.ledger.release()


class SecondModel:
    """A model behind our engine that gives next-token logits for requests another stack runs.

    Args:
        engine: over the model; its last model is the one that is asked.
        role: which half of the pair it is.
        vocab_size: ids that exist in both models.
    """

    def __init__(self, engine: Engine, role: Role, vocab_size: int) -> None:
        self.engine = engine
        self.role = role
        self.vocab_size = vocab_size
        self._model = len(engine.models) - 1
        self._mix = Mix(tuple(float(i == self._model) for i in range(len(engine.models))))
        self._followers: dict[Follower, None] = {}

    @classmethod
    def load(
        cls,
        settings: SecondSettings,
        *,
        served_tokenizer: Any,
        served_width: int,
        served_name: str,
        longest: int,
        most_requests: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SecondModel:
        """Load the model the settings name and check that it can be mixed with the one that is served.

        Args:
            served_tokenizer: of the served model; None where the stack has none, and widths alone are compared.
            served_width: logits of the served model.
            served_name: what to call it in messages.
            longest: tokens of the longest request.
            most_requests: requests that run at a time.
            device, dtype: of the served model; None: the GPU where there is one, and the settings' or the device's usual type.

        Raises:
            ModelError, AdapterError: it cannot be loaded. UnsupportedModelError: our engine cannot serve it.
            VocabularyError: it has other tokens. ConfigError: its context or the KV pool is too small, or devices do not fit.
        """
        place = torch.device(device) if device is not None else device_of(None)
        if settings.dtype is not None:
            dtype = _DTYPES[settings.dtype]
        elif dtype is None:
            dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
        path = str(testbed.WEIGHTS) if settings.path == "testbed" else settings.path
        model, tokenizer = load_pretrained(
            path, device=place, dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
        width = vocabulary_of(model)
        if served_tokenizer is not None:
            check_same_tokenizer(served_tokenizer, tokenizer, name=name_of(model))
            shared = shared_vocab_size(tokenizer, [served_width, width], [served_name, name_of(model)])
        elif width == served_width:
            shared = width
        else:
            raise ConfigError(
                f"{served_name} has {served_width} logits, {name_of(model)} has {width}, and no tokenizer says which ids they share: "
                "start the server with its tokenizer"
            )
        if context_length_of(model) < longest:
            raise ConfigError(
                f"{name_of(model)} reads at most {context_length_of(model)} tokens, requests may have {longest}: start the server "
                f"with a context of {context_length_of(model)} or less"
            )
        adapter = str(testbed.ADAPTER) if settings.adapter == "testbed" else settings.adapter
        adapters = [] if adapter is None else [load_adapter(adapter, model)]
        kv_tokens = settings.kv_tokens
        if kv_tokens is not None and kv_tokens < longest:
            raise ConfigError(f"raindecode.kv_tokens is {kv_tokens}; allowed: {longest} (one request) or more")
        # Bits need not be those of another number of rows here: the serving stack's own are not, either.
        engine, _ = build_engine(model, adapters=adapters, kv_tokens=longest, exact=False, cuda_graphs=False)
        if kv_tokens is None:
            kv_tokens = min(_pool_tokens(engine, place), longest * most_requests)
        if kv_tokens > longest:
            for runner in engine.runners:
                runner.resize(kv_tokens + 1)
            engine = Engine(engine.runners, KVTree(kv_tokens + 1))
        return cls(engine, settings.role, shared)

    def follow(self) -> Follower:
        """Begin to follow a request, of which no token is known yet."""
        follower = Follower(self.engine, self._mix)
        self._followers[follower] = None
        return follower

    def drop(self, follower: Follower) -> None:
        """The request has ended."""
        follower.close()
        self._followers.pop(follower, None)

    def close(self) -> None:
        """Let go of every request."""
        for follower in list(self._followers):
            self.drop(follower)

    def logits(self, asked: Sequence[tuple[Follower, Sequence[int]]]) -> Tensor:
        """Logits after every follower's tokens, and after each of the draft tokens behind them; all in one forward.

        Args:
            asked: followers, each once and with at least one token, with draft tokens that are looked at and forgotten.
        Returns:
            [sum of 1 + len(drafts), vocabulary] where the model left them, follower by follower.

        Raises:
            CapacityError: one request alone does not fit the KV pool.
        """
        try:
            return self._run(asked)
        except CapacityError:
            # The pool is full of requests that wait for another step; they give up their K/V and compute it again then.
            busy = {follower for follower, _ in asked}
            for follower in self._followers:
                if follower not in busy:
                    follower.branch.unpin()
        try:
            return self._run(asked)
        except CapacityError:
            if len(asked) == 1:
                raise
        rows = []
        for one in asked:
            for follower, _ in asked:
                if follower is not one[0]:
                    follower.branch.unpin()
            rows.append(self._run([one]))
        return torch.cat(rows)

    def _run(self, asked: Sequence[tuple[Follower, Sequence[int]]]) -> Tensor:
        ledger = Ledger()  # of the drafts, which end with this step

        def search() -> Generator[Sequence[Want], list[Got], list[Tensor]]:
            wants = []
            for follower, drafts in asked:
                branch = follower.branch
                if drafts:
                    wants.append(Want(branch))  # so that its K/V stays when the drafts go
                    branch = branch.fork(ledger=ledger)
                    branch.append(drafts)
                wants.append(Want(branch, rows_from=follower.length - 1))
            answers = yield wants
            rows = [answer.rows[self._model] for answer in answers if answer.rows]
            return [row for row in rows if row is not None]

        with torch.inference_mode():
            (task,) = self.engine.run([Task(search(), ledger)])
            if task.error is not None:
                raise task.error
            return torch.cat(task.result)


def _pool_tokens(engine: Engine, place: torch.device) -> int:
    """Tokens the KV pool holds when nobody says: the serving stack has taken, or will take, most of the memory."""
    room = _POOL_BYTES_CPU
    if place.type == "cuda":
        room = int(torch.cuda.mem_get_info(place)[0] * _POOL_SHARE_GPU)
    return room // max(1, sum(runner.bytes_per_token for runner in engine.runners))


def mix_rows(served: Tensor, other: Tensor, weights: Tensor, *, role: Role, vocab_size: int) -> Tensor:
    """z = z_ref + λ (z_al - z_ref) for rows of logits, each with a λ of its own.

    Args:
        served: [n, vocabulary] float32, of the model that is served; what is -inf there stays so, whatever λ is: a stack
            forbids tokens this way.
        other: [n, other vocabulary] any float dtype, of the other model.
        weights: [n] float32, λ of each row.
        role: which half of the pair `other` is.
        vocab_size: ids that exist in both models; the others become -inf.
    Returns:
        [n, vocabulary] float32. A row with λ of 0 or 1 is the reference's or the aligned model's own, but for what is -inf.
    """
    mixed = torch.full_like(served, -torch.inf)
    here, there = served[:, :vocab_size], other[:, :vocab_size].to(served.dtype)
    reference, aligned = (there, here) if role == "reference" else (here, there)
    weight = weights[:, None]
    z = torch.where(weight == 1, aligned, reference + weight * (aligned - reference))
    z = torch.where(weight == 0, reference, z)
    # Where a model that counts says -inf, inf - inf would leave NaN, and a negative λ +inf.
    banned = torch.isneginf(here)
    banned |= torch.isneginf(reference) & (weight != 1)
    banned |= torch.isneginf(aligned) & (weight != 0)
    mixed[:, :vocab_size] = z.masked_fill(banned, -torch.inf)
    return mixed
