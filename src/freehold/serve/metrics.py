"""GET /metrics for Prometheus: what the engine has, and how long answers take.

The most common ones go under vLLM's names too, which dashboards know. Labels are of fixed sets, never what a client
sends: the model's own name, how an answer ended, the route, the status.
"""

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, cast

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from freehold.engine.engine import Engine, EngineStats
from freehold.serve.answers import Answers, Delta, Options, Prompt
from freehold.serve.caller import Caller
from freehold.serve.shapes import ERRORS

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150)
BETWEEN_DELTAS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
ANSWER_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
MODEL_LABEL = "model_name"


class Meters:
    """What is counted of one server, in a registry of its own."""

    def __init__(self, engine: Engine, model_name: str):
        self.registry = CollectorRegistry()
        self.model_name = model_name
        self.registry.register(_EngineCollector(engine, model_name))
        self._first_token = self._histogram(
            "freehold_time_to_first_token_seconds", "To the first delta.", FIRST_TOKEN_S
        )
        self._first_token_vllm = self._histogram("vllm:time_to_first_token_seconds", "The same.", FIRST_TOKEN_S)
        self._between = self._histogram(
            "freehold_time_between_deltas_seconds", "From one to the next.", BETWEEN_DELTAS_S
        )
        self._answer = self._histogram("freehold_answer_seconds", "From the request to the last delta.", ANSWER_S)
        labels = (MODEL_LABEL, "finished_reason")
        self._ended = Counter("freehold_answers", "Answers by how they ended.", labels, registry=self.registry)
        self._ended_vllm = Counter("vllm:request_success", "Answers that were done.", labels, registry=self.registry)
        self._requests = Counter("freehold_http_requests", "By route.", ("route", "status"), registry=self.registry)

    def count_request(self, route: str, status: int) -> None:
        """Count a request. route: as it was declared, not as it was asked for."""
        self._requests.labels(route, str(status)).inc()

    async def measured(
        self, deltas: AsyncGenerator[tuple[int, Delta], None], num_answers: int
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield the deltas of some answers as they come, and count and time them. Those that are closed early count as
        cancelled."""
        start_s = time.perf_counter()
        last_s: dict[int, float] = {}
        num_open, ended = num_answers, "cancelled"
        try:
            async with aclosing(deltas):
                async for place, delta in deltas:
                    now_s = time.perf_counter()
                    if place in last_s:
                        self._between.observe(now_s - last_s[place])
                    else:
                        self._observe_first(now_s - start_s)
                    last_s[place] = now_s
                    if delta.finish_reason:
                        self._count_end(delta.finish_reason, now_s - start_s)
                        num_open -= 1
                    yield place, delta
        except Exception:
            ended = "failed"
            raise
        finally:
            for _ in range(num_open):
                self._count_end(ended, time.perf_counter() - start_s)

    def _observe_first(self, first_s: float) -> None:
        self._first_token.observe(first_s)
        self._first_token_vllm.observe(first_s)

    def _count_end(self, ended: str, answer_s: float) -> None:
        self._ended.labels(self.model_name, ended).inc()
        if ended not in ("cancelled", "failed"):
            self._ended_vllm.labels(self.model_name, ended).inc()
            self._answer.observe(answer_s)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, text, (MODEL_LABEL,), buckets=buckets, registry=self.registry)
        return made.labels(self.model_name)  # looked up here, not for each token


class MeteredAnswers:
    """Stands before Answers and measures what they stream; everything else is theirs."""

    def __init__(self, answers: Answers, meters: Meters):
        self._answers, self._meters = answers, meters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._answers, name)

    def stream(
        self, asked: Sequence[tuple[Prompt, Options]], caller: Caller
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """Return answers as they come."""
        return self._meters.measured(self._answers.stream(asked, caller), len(asked))


def metered(answers: Answers, meters: Meters) -> Answers:
    """Return answers whose streams are measured."""
    return cast(Answers, MeteredAnswers(answers, meters))


def routes(meters: Meters) -> APIRouter:
    """Return the route of metrics."""
    router = APIRouter()

    @router.get("/metrics", responses={**ERRORS, 200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router


class _EngineCollector:
    """Reads the engine's counts when they are asked for."""

    def __init__(self, engine: Engine, model_name: str):
        self._engine, self._model_name = engine, model_name

    def collect(self) -> Iterator[Metric]:
        """Yield every count of the engine; prometheus-client calls it."""
        stats = self._engine.stats()
        for name, text, value in _gauges(stats):
            gauge = GaugeMetricFamily(name, text, labels=[MODEL_LABEL])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, text, value in _counters(stats):
            counter = CounterMetricFamily(name, text, labels=[MODEL_LABEL])
            counter.add_metric([self._model_name], value)
            yield counter


def _gauges(stats: EngineStats) -> list[tuple[str, str, float]]:
    used = (stats.num_pages - stats.num_free_pages) / max(1, stats.num_pages)
    return [
        ("freehold_requests_running", "Requests that the engine is working on.", stats.num_running),
        ("freehold_requests_waiting", "Requests that wait for the engine.", stats.num_waiting),
        ("freehold_kv_pages", "Pages of keys and values.", stats.num_pages),
        ("freehold_kv_pages_free", "Pages that nobody owns.", stats.num_free_pages),
        ("freehold_state_slots", "Slots of sequences.", stats.num_slots),
        ("freehold_state_slots_free", "Slots that nobody owns.", stats.num_free_slots),
        ("vllm:num_requests_running", "As freehold_requests_running.", stats.num_running),
        ("vllm:num_requests_waiting", "As freehold_requests_waiting.", stats.num_waiting),
        ("vllm:kv_cache_usage_perc", "Share of the pages that are owned, 1 is all.", used),
    ]


def _counters(stats: EngineStats) -> list[tuple[str, str, float]]:
    return [
        ("freehold_prompt_tokens", "Tokens of prompts that were read.", stats.prompt_tokens),
        ("freehold_generated_tokens", "Tokens that were written.", stats.generated_tokens),
        ("freehold_steps", "Steps of the engine.", stats.num_steps),
        ("freehold_step_seconds", "Spent in the model's forward.", stats.step_s),
        ("freehold_busy_seconds", "Spent in the step loop, the forward included.", stats.busy_s),
        ("freehold_preemptions", "Sequences that had to give back what they owned.", stats.num_preemptions),
        ("vllm:prompt_tokens", "As freehold_prompt_tokens.", stats.prompt_tokens),
        ("vllm:generation_tokens", "As freehold_generated_tokens.", stats.generated_tokens),
    ]
