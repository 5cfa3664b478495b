"""What the server on Ray Serve is made of: arguments, scaling, health. No process is started here; test_ray.py does that."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from raindecode.errors import ConfigError

pytest.importorskip("ray", reason="ray is not installed: pip install 'rainkernels[ray,server]'")
ray_serve = pytest.importorskip(
    "raindecode.integrations.ray_serve", reason="Ray Serve or the server's packages are not installed"
)

from ray import serve  # noqa: E402

from raindecode.integrations import ray as integration  # noqa: E402
from raindecode.server.settings import ServerSettings  # noqa: E402


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Deployments that were made, as Ray took them."""
    made: list[Any] = []
    real = serve.deployment

    def noting(**options: Any) -> Any:
        def decorate(cls: type) -> Any:
            made.append(real(**options)(cls))
            return made[-1]

        return decorate

    monkeypatch.setattr(serve, "deployment", noting)
    return made


def test_a_fixed_number_of_replicas(deployed: list[Any]) -> None:
    app = integration.build_app(
        ServerSettings("testbed", {"max_concurrent": 8}, max_queue=100, drain_seconds=7),
        replicas=3,
        num_cpus=2,
        num_gpus=0.5,
    )
    assert isinstance(app, serve.Application)
    (made,) = deployed
    assert (made.name, made.num_replicas, made.max_ongoing_requests, made.max_queued_requests) == (
        "raindecode",
        3,
        16,
        100,
    )
    assert made.ray_actor_options["num_cpus"] == 2
    assert made.ray_actor_options["num_gpus"] == 0.5


def test_replicas_are_added_up_to_the_most(deployed: list[Any]) -> None:
    ray_serve.app({"replicas": "2", "max_replicas": "6", "target_ongoing_requests": "5", "max_ongoing_requests": "9"})
    (made,) = deployed
    scaling = made._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 6, 5)
    assert made.max_ongoing_requests == 9


def test_arguments_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(ray_serve, "build_app", lambda settings, **scaling: given.append((settings, scaling)))
    ray_serve.app(
        {
            "model": "m",
            "adapter": "a",
            "kv_tokens": "4096",
            "allowed_hosts": "*",
            "server": {"api_keys": "secret", "max_queue": 3},
        }
    )
    settings, scaling = given[0]
    assert settings.model == "m"
    assert settings.loading == {"adapter": "a", "aligned": [], "max_concurrent": 32, "kv_tokens": 4096, "dtype": None}
    assert (settings.hosts, settings.api_keys, settings.max_queue) == (("*",), ("secret",), 3)
    assert scaling["replicas"] == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"modle": "x"}, "modle: Extra inputs are not permitted; allowed: model, adapter"),
        ({"replicas": "many"}, "replicas: Input should be a valid integer"),
        ({"server": {"nonsense": 1}}, "nonsense"),
        ({"replicas": "0"}, "replicas is 0; allowed: a whole number, 1 or more"),
        ({"replicas": "3", "max_replicas": "2"}, "max_replicas is 2; allowed: a whole number, 3 or more"),
        ({"target_ongoing_requests": "4"}, "give max_replicas"),
        ({"max_replicas": "4", "target_ongoing_requests": "0"}, "target_ongoing_requests is 0.0; allowed: more than 0"),
        ({"num_gpus": "-1"}, "num_gpus is -1.0; allowed: 0 or more"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ray_serve.app(args)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("healthy", "draining", "ill"), [(True, False, False), (False, True, False), (False, False, True)]
)
def test_a_replica_whose_engine_failed_calls_itself_ill(healthy: bool, draining: bool, ill: bool) -> None:
    replica = ray_serve._Replica()
    service = SimpleNamespace(is_healthy=healthy, is_draining=draining)
    replica.app = SimpleNamespace(state=SimpleNamespace(service=service))
    if ill:
        with pytest.raises(RuntimeError, match="the engine has failed"):
            asyncio.run(replica.check_health())
    else:
        assert asyncio.run(replica.check_health()) is None
