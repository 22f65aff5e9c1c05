"""The server's figures for Prometheus, in a registry of their own."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from visionloop.serving.answers import Answer
from visionloop.serving.feedback import FeedbackBook
from visionloop.serving.log import PredictionLog
from visionloop.serving.shadow import Shadow
from visionloop.serving.swap import ModelSlot

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
NO_LABEL, OTHER_LABELS = "(none)", "(other)"
MAX_LABELS = 200  # a series each, for as long as the process lives
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Meters:
    """Counts what happens; `scrape` gives the text that Prometheus reads."""

    def __init__(
        self,
        slot: ModelSlot,
        queue_depth: Callable[[], int],
        keys_problem: Callable[[], bool] = lambda: False,
        *,
        log: PredictionLog | None = None,
        book: FeedbackBook | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        self._slot, self._queue_depth, self._keys_problem = slot, queue_depth, keys_problem
        self._log, self._book, self._shadow = log, book, shadow
        disable_created_metrics()  # type: ignore[no-untyped-call]  # half of all lines, and Prometheus needs none
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        told = "Requests for a prediction by outcome and HTTP status"
        self._requests = counter("visionloop_requests", told, ["outcome", "status"])
        self._seconds = histogram("visionloop_request_seconds", "Time to answer a prediction", buckets=SECONDS)
        self._batches = histogram("visionloop_batch_images", "Images in one run of the network", buckets=BATCH_SIZES)
        told = "Images by predicted class; with several labels, under each"
        self._images = counter("visionloop_predicted_images", told, ["prediction"])
        self._abstained = counter("visionloop_abstained_images", "Images of which the model did not know")
        told = "Time of an image that was not in the cache, by step: queue, decode, network"
        self._steps = histogram("visionloop_image_seconds", told, ["step"], buckets=SECONDS)
        told = "Images answered, by the network or from the cache"
        self._answered = counter("visionloop_answered_images", told, ["by"])
        self._labels: set[str] = set()
        self._start_at_zero()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def _start_at_zero(self) -> None:
        """Begin these figures at 0: Prometheus sees a rise only from a value that it has read before."""
        self._requests.labels("ok", "200")
        for by in ("network", "cache"):
            self._answered.labels(by)
        for step in ("queue", "decode", "network"):
            self._steps.labels(step)

    def count_request(self, outcome: str, seconds: float, status: int) -> None:
        """Count one request; `outcome` is `ok` or the code of its error, `status` 0 where no answer began."""
        if self._log:
            self._log.count(status)
        self._requests.labels(outcome, str(status)).inc()
        self._seconds.observe(seconds)

    def count_batch(self, size: int) -> None:
        """Count one run of the network."""
        self._batches.observe(size)

    def count_answer(self, answer: Answer) -> None:
        """Count one answered image under its class, or under each of its labels: there are too many sets of labels."""
        if answer.abstained:
            self._abstained.inc()
        names = (answer.prediction,) if answer.labels is None else answer.labels or (NO_LABEL,)
        for name in names:
            if len(self._labels) < MAX_LABELS:
                self._labels.add(name)
            self._images.labels(name if name in self._labels else OTHER_LABELS).inc()
        timing = answer.timing
        self._answered.labels("cache" if timing.is_cached else "network").inc()
        if not timing.is_cached:
            self._steps.labels("queue").observe(timing.queue_s)
            self._steps.labels("decode").observe(timing.decode_s)
            self._steps.labels("network").observe(timing.network_s)

    def scrape(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the figures that are read from other objects at each scrape (called by the registry)."""
        slot = self._slot
        yield GaugeMetricFamily(
            "visionloop_keys_problem", "1 while the file of keys is not usable", self._keys_problem()
        )
        yield GaugeMetricFamily("visionloop_queue_images", "Images without an answer yet", self._queue_depth())
        yield CounterMetricFamily("visionloop_swaps", "Models swapped in", slot.num_swaps)
        yield CounterMetricFamily("visionloop_swap_failures", "Polls that ended in a problem", slot.num_failures)
        yield CounterMetricFamily("visionloop_refused_bundles", "Bundles of the ledger not served", slot.num_refused)
        yield GaugeMetricFamily("visionloop_swap_problem", "1 while a newer model is not served", bool(slot.problem))
        info = GaugeMetricFamily(
            "visionloop_model_info", "The model that answers", labels=["name", "version", "digest"]
        )
        if model := slot.current:
            info.add_metric([model.name, model.version or "", model.digest], 1)
        yield info
        yield from _collect_ages(slot)
        if self._log:
            yield from _collect_log(self._log)
        if self._book:
            items = {"taken": self._book.num_taken, "refused": self._book.num_refused}
            yield _count_by("outcome", items, "visionloop_feedback_items", "Items of feedback")
        if self._shadow:
            yield from _collect_shadow(self._shadow)


def _count_by(label: str, counts: Mapping[str, int], name: str, told: str) -> Metric:
    family = CounterMetricFamily(name, told, labels=[label])
    for value, number in counts.items():
        family.add_metric([value], number)
    return family


def _collect_shadow(shadow: Shadow) -> Iterator[Metric]:
    """Yield whether there is a shadow, and what became of its images."""
    yield GaugeMetricFamily("visionloop_shadow", "1 while a second model answers some images too", shadow.is_on)
    yield GaugeMetricFamily("visionloop_shadow_problem", "1 while a shadow is wanted and refused", bool(shadow.problem))
    counts = {"answered": shadow.num_answered, "failed": shadow.num_failed, "dropped": shadow.num_dropped}
    yield _count_by("state", counts, "visionloop_shadow_images", "Images for the shadow")


def _collect_log(log: PredictionLog) -> Iterator[Metric]:
    """Yield what became of the answers that were to be written down."""
    counts = {"noted": log.num_noted, "sent": log.num_sent, "dropped": log.num_dropped}
    yield _count_by("state", counts, "visionloop_log_answers", "Answers for the prediction log")
    yield CounterMetricFamily("visionloop_kept_images", "Images that were kept", log.num_kept)
    yield GaugeMetricFamily("visionloop_log_spool_bytes", "On the local disk, for the store", log.num_spool_bytes)
    yield GaugeMetricFamily("visionloop_log_problem", "1 while answers cannot be written down", bool(log.problem))


def _collect_ages(slot: ModelSlot) -> Iterator[Metric]:
    """Yield how long ago the ledger was read, and the model promoted; nothing where there is no ledger."""
    now = time.time()
    if slot.looked_at is not None:
        yield GaugeMetricFamily(
            "visionloop_ledger_age_seconds", "Since the ledger was read last", max(0.0, now - slot.looked_at)
        )
    with contextlib.suppress(ValueError, TypeError):  # of an entry that somebody wrote by hand
        if slot.current and slot.current.promoted_at:
            promoted_at = datetime.fromisoformat(slot.current.promoted_at).timestamp()
            yield GaugeMetricFamily(
                "visionloop_model_age_seconds", "Since the model was promoted", max(0.0, now - promoted_at)
            )
