"""The server's figures for Prometheus, in a registry of their own."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from visionloop.records import Prediction
from visionloop.serving.swap import ModelSlot

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
NO_LABEL = "(none)"
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Meters:
    """Counts what happens; `scrape` gives the text that Prometheus reads."""

    def __init__(self, slot: ModelSlot, queue_depth: Callable[[], int]) -> None:
        self._slot, self._queue_depth = slot, queue_depth
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "visionloop_requests", "Requests for a prediction by outcome", ["outcome"], registry=self._registry
        )
        self._seconds = Histogram(
            "visionloop_request_seconds", "Time to answer a prediction", buckets=SECONDS, registry=self._registry
        )
        self._batches = Histogram(
            "visionloop_batch_images", "Images in one run of the network", buckets=BATCH_SIZES, registry=self._registry
        )
        self._images = Counter(
            "visionloop_predicted_images",
            "Images by predicted class; with several labels, under each",
            ["prediction"],
            registry=self._registry,
        )
        self._abstained = Counter(
            "visionloop_abstained_images", "Images of which the model did not know", registry=self._registry
        )
        self._answered = Counter(
            "visionloop_answered_images",
            "Images answered, by the network or from the cache",
            ["by"],
            registry=self._registry,
        )
        self._registry.register(self)

    def count_request(self, outcome: str, seconds: float) -> None:
        """Count one request; `outcome` is `ok` or the code of its error."""
        self._requests.labels(outcome).inc()
        self._seconds.observe(seconds)

    def count_batch(self, size: int) -> None:
        """Count one run of the network."""
        self._batches.observe(size)

    def count_prediction(self, prediction: Prediction) -> None:
        """Count one answered image under its class, or under each of its labels: there are too many sets of labels."""
        if prediction.abstained:
            self._abstained.inc()
        names = (prediction.prediction,) if prediction.labels is None else prediction.labels or (NO_LABEL,)
        for name in names:
            self._images.labels(name).inc()

    def count_answer(self, *, from_cache: bool) -> None:
        """Count one answered image."""
        self._answered.labels("cache" if from_cache else "network").inc()

    def scrape(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the figures that are read from other objects at each scrape (called by the registry)."""
        slot = self._slot
        yield GaugeMetricFamily("visionloop_queue_images", "Images without an answer yet", self._queue_depth())
        yield CounterMetricFamily("visionloop_swaps", "Models swapped in", slot.num_swaps)
        yield CounterMetricFamily("visionloop_swap_failures", "Polls that ended in a problem", slot.num_failures)
        yield GaugeMetricFamily("visionloop_swap_problem", "1 while a newer model is not served", bool(slot.problem))
        info = GaugeMetricFamily(
            "visionloop_model_info", "The model that answers", labels=["name", "version", "digest"]
        )
        if model := slot.current:
            info.add_metric([model.name, model.version or "", model.digest], 1)
        yield info
