"""What a server is started with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raindecode.errors import ConfigError
from raindecode.settings import require_finite, require_whole

_HOST = re.compile(r"\*|[A-Za-z0-9._-]+|[0-9A-Fa-f.]*(:[0-9A-Fa-f.]*){2,}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server. The model's own are those of Decoder.from_pretrained.

    Attributes:
        model: "testbed", a folder, or a hub id.
        loading: more arguments of Decoder.from_pretrained (adapter, aligned, device, dtype, kv_tokens, max_concurrent, ...).
        name: what clients call the model; "" takes the last part of `model`.
        edits: files of edits (AlignEZ) that requests may name.
        force_edits: accept edits that were fitted on another model of the same form.
        prompts: files of constant prompts (URIAL) that requests may name, besides "default".
        preset: of RAIN, and of how chats are written for a model without a chat template; "" takes town for the testbed, else hh for
            RAIN and the tokenizer's template for chats.
        align: what requests are aligned by that say nothing about it: as the field `align` of a request.
        host, port: where it listens. Loopback unless told otherwise.
        api_keys: any of them lets a request in; none: everybody.
        allowed_hosts: names clients may call this server by (the Host header), without a port; ("*",) takes any. Where it listens on
            loopback, loopback's names besides, and no others when empty, which keeps web pages from reaching it through a name of their
            own; elsewhere empty takes any.
        cors_origins: web pages of these origins may call it.
        max_queue: answers that may wait for a place beside those under way; further ones are refused (429).
        max_body_bytes: of a request (413).
        max_new_tokens: most tokens of an answer; 0 leaves it to the model's context.
        default_new_tokens: where a request says nothing.
        max_answers: most answers of one request, prompts times n.
        request_seconds: after these a request is given up (504); 0 never.
        body_seconds: in these a request's body has to arrive (408).
        drain_seconds: how long a shutdown waits for what is under way.
        keep_alive_seconds: between two events of a stream, and for an idle connection.
        log_prompts: write prompts and answers into the log.
        log_level: "debug", "info", "warning" or "error".

    Raises:
        ConfigError: a value lies outside what is allowed.
    """

    model: str = "testbed"
    loading: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    edits: Mapping[str, str] = field(default_factory=dict)
    force_edits: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    preset: str = ""
    align: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_body_bytes: int = 4 * 2**20
    max_new_tokens: int = 0
    default_new_tokens: int = 256
    max_answers: int = 64
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    drain_seconds: float = 30.0
    keep_alive_seconds: float = 15.0
    log_prompts: bool = False
    log_level: str = "info"

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_new_tokens"):
            require_whole(name, getattr(self, name), 0)
        for name in ("max_body_bytes", "default_new_tokens", "max_answers"):
            require_whole(name, getattr(self, name), 1)
        for name in ("request_seconds", "drain_seconds", "body_seconds", "keep_alive_seconds"):
            require_finite(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name):g}; allowed: 0 or more")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; allowed: 0 (any that is free) to 65535")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"log_level is {self.log_level!r}; allowed: debug, info, warning, error")
        for key in self.api_keys:
            if not key or not all("!" <= character <= "~" for character in key):
                raise ConfigError("an API key is empty, or holds white space or characters outside ASCII: give another")
        for kind, names in (("edit", self.edits), ("prompt", self.prompts)):
            for one in names:
                if not _NAME.fullmatch(one):
                    raise ConfigError(
                        f"the {kind} name {one!r:.80} is not one clients can use; allowed: letters, digits, '.', '_' and '-', up to 64, "
                        "beginning with a letter or digit"
                    )
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                raise ConfigError(
                    f"the host name {host!r:.80} is none; allowed: a name or an address without a scheme or a port, or '*'"
                )
        if "@" in self.served_name:
            raise ConfigError(
                f"the model's name {self.served_name!r} holds '@', which parts it from settings: give another"
            )

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.name or re.split(r"[/\\]", self.model.rstrip("/\\"))[-1] or self.model

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK or self.host.startswith("127.")

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names it may be called by; ("*",) for any."""
        given = tuple(host.lower() for host in self.allowed_hosts)
        if "*" in given:
            return ("*",)
        if self.is_loopback:
            return tuple(dict.fromkeys((*LOOPBACK, self.host.lower(), *given)))
        return given or ("*",)
