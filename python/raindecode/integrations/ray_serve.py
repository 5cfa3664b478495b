"""`raindecode serve` in several processes, by Ray Serve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

try:
    from fastapi import FastAPI
    from ray import serve

    from raindecode.server.app import create_app
    from raindecode.server.settings import ServerSettings
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the Ray Serve application needs Ray 2.47 or newer and the server ({error}): pip install 'rainkernels[ray,server]'",
        name=error.name,
    ) from error

from raindecode.commands.common import quiet_libraries
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError
from raindecode.settings import as_strings, require_finite, require_whole

_MAX_CONCURRENT = 32  # of a Decoder that was not told


class _Replica:
    """What Ray Serve asks of a replica beside its application."""

    app: FastAPI  # Ray's wrapper provides it

    async def check_health(self) -> None:
        """Raises when the engine has failed; Ray then ends the replica and starts another."""
        service = self.app.state.service
        if not (service.is_healthy or service.is_draining):
            raise RuntimeError("the engine has failed; the replica's log says why")


def build_app(
    settings: ServerSettings,
    *,
    replicas: int = 2,
    max_replicas: int | None = None,
    target_ongoing_requests: float | None = None,
    max_ongoing_requests: int | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    health_check_seconds: float = 10.0,
) -> serve.Application:
    """The server of `raindecode serve` as a Ray Serve application: for serve.run, or a module that `serve run` names.

    Args:
        settings: of each replica. Ray's proxy listens, so `host` and `port` mean nothing; `allowed_hosts` has to hold the names clients
            call it by, unless these are of loopback. loading["device"] defaults to the GPU when a replica has one.
        replicas: processes with an engine each; with `max_replicas` the least there are.
        max_replicas: most there may be; None keeps their number.
        target_ongoing_requests: of a replica, on average; replicas are added above and removed below it. None takes the decoder's
            max_concurrent.
        max_ongoing_requests: a replica gets at a time; more wait in the proxy, up to settings.max_queue, and beyond that are refused
            with 503. None takes twice the decoder's max_concurrent, so that another is at hand when one ends.
        num_cpus: cores reserved for each replica, and its threads.
        num_gpus: GPUs of each replica.
        health_check_seconds: between two looks at a replica's health.

    Raises:
        ConfigError: a value lies outside what is allowed.
    """
    if not isinstance(settings, ServerSettings):
        raise ConfigError(f"settings is a {type(settings).__name__}; give ServerSettings(...)")
    require_whole("replicas", replicas, 1)
    if max_replicas is not None:
        require_whole("max_replicas", max_replicas, replicas)
    elif target_ongoing_requests is not None:
        raise ConfigError(
            "target_ongoing_requests is about adding and removing replicas: give max_replicas, or leave it out"
        )
    together = int(settings.loading.get("max_concurrent") or _MAX_CONCURRENT)
    ongoing = 2 * together if max_ongoing_requests is None else max_ongoing_requests
    target = float(together) if target_ongoing_requests is None else target_ongoing_requests
    require_whole("max_ongoing_requests", ongoing, 1)
    for name, number in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        require_finite(name, number)
        if number < 0:
            raise ConfigError(f"{name} is {number!r}; allowed: 0 or more")
    for name, number in (("target_ongoing_requests", target), ("health_check_seconds", health_check_seconds)):
        require_finite(name, number)
        if number <= 0:
            raise ConfigError(f"{name} is {number!r}; allowed: more than 0")
    device = "cuda" if num_gpus else "cpu"
    each = replace(settings, loading={"device": device, **settings.loading})
    threads = max(1, int(num_cpus))

    def build() -> FastAPI:  # on the replica
        torch.set_num_threads(threads)
        quiet_libraries()
        return create_app(each, Decoder.from_pretrained(each.model, **each.loading))

    number_of: dict[str, Any] = (
        {"num_replicas": replicas}
        if max_replicas is None
        else {
            "autoscaling_config": {
                "min_replicas": replicas,
                "initial_replicas": replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": target,
            }
        }
    )
    deployed = serve.deployment(
        name="raindecode",
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        max_ongoing_requests=ongoing,
        max_queued_requests=max(1, settings.max_queue),
        health_check_period_s=health_check_seconds,
        graceful_shutdown_timeout_s=settings.drain_seconds + 10,  # the server's own comes first
        **number_of,
    )(serve.ingress(build)(_Replica))
    return deployed.bind()


class _Arguments(BaseModel):
    """What `app` takes. Numbers may come as text, from the command line."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = "testbed"
    adapter: str | list[str] = []
    aligned: str | list[str] = []
    max_concurrent: int = _MAX_CONCURRENT
    kv_tokens: int | None = None
    dtype: str | None = None
    allowed_hosts: str | list[str] = []
    replicas: int = 2
    max_replicas: int | None = None
    target_ongoing_requests: float | None = None
    max_ongoing_requests: int | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    server: dict[str, Any] = {}


def app(args: dict[str, Any]) -> serve.Application:
    """For `serve run raindecode.integrations.ray:app model=testbed replicas=2`, and for the `args` of a Serve config file.

    Args:
        args: model, adapter, aligned, max_concurrent, kv_tokens, dtype (see Decoder.from_pretrained); replicas, max_replicas,
            target_ongoing_requests, max_ongoing_requests, num_cpus, num_gpus (see build_app); allowed_hosts; and `server`, a mapping with
            other fields of ServerSettings (config file only).

    Raises:
        ConfigError: a value lies outside what is allowed, or there is no such argument.
    """
    try:
        given = _Arguments.model_validate(args)
    except ValidationError as error:
        one = error.errors()[0]
        where = ".".join(str(part) for part in one["loc"])
        raise ConfigError(f"{where}: {one['msg']}; allowed: {', '.join(_Arguments.model_fields)}") from error
    server = {"allowed_hosts": given.allowed_hosts, **given.server}
    for name in ("allowed_hosts", "api_keys", "cors_origins"):
        if name in server:
            server[name] = as_strings(name, [server[name]] if isinstance(server[name], str) else server[name])
    loading = given.model_dump(include={"adapter", "aligned", "max_concurrent", "kv_tokens", "dtype"})
    try:
        settings = ServerSettings(given.model, loading, **server)
    except TypeError as error:
        raise ConfigError(f"server: {error}; allowed: fields of ServerSettings") from error
    scaling = given.model_dump(
        include={"replicas", "max_replicas", "target_ongoing_requests", "max_ongoing_requests", "num_cpus", "num_gpus"}
    )
    return build_app(settings, **scaling)
