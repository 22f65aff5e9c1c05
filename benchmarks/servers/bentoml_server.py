"""The model behind BentoML, with its adaptive batching. Started by `bentoml serve bentoml_server:Classifier`."""

import os
from pathlib import Path

import bentoml
from onnx_images import Network


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 256})
class Classifier:
    """One image a request; the framework makes batches of them."""

    def __init__(self) -> None:
        self.network = Network(os.environ["BENCH_MODEL"], int(os.environ["BENCH_PX"]))

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def predict(self, file: list[Path]) -> list[dict]:
        """Answer for the images of one batch."""
        return self.network.run([self.network.decode(path.read_bytes()) for path in file])
