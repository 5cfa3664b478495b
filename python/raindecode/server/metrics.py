"""Metrics of a server, for Prometheus. Names follow vLLM's, with this project's prefix."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from raindecode.engine.engine import Engine
from raindecode.server.jobs import Job
from raindecode.server.plans import Plan
from raindecode.types import Completion

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_REMEMBERED = 10_000  # scheduling delays
_PREFIX = "raindecode_"


class Metrics:
    """Counters of one server in a registry of its own.

    Args:
        num_waiting, num_running: answers, read when the metrics are asked for.
    """

    def __init__(self, engine: Engine, num_waiting: Callable[[], int], num_running: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._gauge("num_requests_running", "Answers under way", num_running)
        self._gauge("num_requests_waiting", "Answers waiting for a place", num_waiting)
        self._gauge("kv_cache_usage_perc", "Share of KV slots in use, cached prefixes included", lambda: _share(engine))
        self._gauge("kv_pinned_tokens", "Tokens of constant prompts kept", lambda: engine.pins.num_tokens)
        self._gauge("model_steps", "Forwards of the models since the start", lambda: engine.model_steps)
        self.requests = self._counter("request_success_total", "Answers that ended", ["method", "finished_reason"])
        self.failures = self._counter("request_failure_total", "Requests that ended otherwise", ["status"])
        self.refused = self._counter("request_refused_total", "Requests refused because the queue was full", [])
        self.responses = self._counter("http_responses_total", "HTTP responses", ["path", "status"])
        self.prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens", [])
        self.generated = self._counter("generation_tokens_total", "Tokens of answers", ["method"])
        self.processed = self._counter("tokens_processed_total", "Distinct token prefixes evaluated", ["method"])
        self.charged = self._counter("tokens_charged_total", "Rows run, speculation included", ["method"])
        self.iterations = self._counter("rain_iterations_total", "RAIN search iterations", [])
        self.evaluations = self._counter("rain_evaluations_total", "Verdicts of RAIN's judge", [])
        self.queued = self._histogram(
            "request_queue_time_seconds", "From a request's arrival at the engine to its first step"
        )
        self._delays: deque[float] = deque(maxlen=_REMEMBERED)
        for share in (0.5, 0.99):
            name = f"scheduling_delay_p{share * 100:g}_seconds"
            self._gauge(
                name, "Of the last requests: from arrival at the engine to the first step", partial(self.delay, share)
            )
        self.first = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first committed token"
        )
        self.between = self._histogram("time_per_output_token_seconds", "Mean time per token behind the first")
        self.whole = self._histogram("e2e_request_latency_seconds", "From a request's arrival to its last token")

    def ended(self, plan: Plan, job: Job) -> None:
        """Note a job that is over."""
        end = job.ended or job.submitted
        if job.started is not None:
            self.queued.observe(job.started - job.submitted)
            self._delays.append(job.started - job.submitted)
        if job.fault is not None:
            self.failures.labels(str(job.fault.status)).inc()
            return
        self.prompt_tokens.inc(sum(len(request.prompt_ids) for request in plan.prompts))
        if job.first_token is not None:
            self.first.observe(job.first_token - plan.started)
            if job.tokens > 1:
                self.between.observe((end - job.first_token) / (job.tokens - 1))
        self.whole.observe(end - plan.started)
        for outcome in job.results:
            reason = outcome.finish_reason if isinstance(outcome, Completion) else "scored"
            self.requests.labels(plan.label, reason).inc()
            if isinstance(outcome, Completion):
                self.generated.labels(plan.label).inc(len(outcome.token_ids))
            self.processed.labels(plan.label).inc(outcome.stats.tokens_processed)
            self.charged.labels(plan.label).inc(outcome.stats.tokens_charged)
            self.iterations.inc(outcome.stats.iterations)
            self.evaluations.inc(outcome.stats.evaluations)

    def delay(self, share: float) -> float:
        """The scheduling delay that `share` of the last requests stayed below, in seconds."""
        found = sorted(self._delays)
        return found[min(len(found) - 1, int(share * len(found)))] if found else 0.0

    def text(self) -> bytes:
        """All of them in Prometheus' text form."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        Gauge(_PREFIX + name, what, registry=self._registry).set_function(read)

    def _counter(self, name: str, what: str, labels: list[str]) -> Counter:
        return Counter(_PREFIX + name, what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(_PREFIX + name, what, registry=self._registry, buckets=_SECONDS)


def _share(engine: Engine) -> float:
    return engine.tree.num_used / engine.tree.num_slots
