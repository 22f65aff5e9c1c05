"""A bundle, running: images in, probabilities and embeddings out. The same code judges and serves. No torch.

Dimensions: n images, h height, w width, k classes, d embedding size.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionloop.bundle import Bundle, check_onnx, load_bundle
from visionloop.data.images import MAX_PIXELS, UInt8Array, load_array
from visionloop.errors import BundleError
from visionloop.records import Card, Prediction

GOLDEN_TOLERANCE = 2e-2
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Outputs:
    """What the network says of n images: logits and probabilities (n, k), embeddings (n, d)."""

    logits_nk: FloatArray
    probs_nk: FloatArray
    embedding_nd: FloatArray


class Predictor:
    """One loaded model. Thread-safe; make it after any fork."""

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        """Load the model of a checked bundle; `threads` 0 means all cores. Raises BundleError."""
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import: it writes to the home otherwise
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        model_bytes = (bundle.folder / "model.onnx").read_bytes()
        check_onnx(model_bytes, f"bundle {bundle.digest[:12]}")
        try:
            self._session = ort.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime raises classes of its own, from C++
            raise BundleError(f"bundle {bundle.digest[:12]}", f"model.onnx does not load ({exc})"[:300]) from exc
        self.bundle = bundle

    @classmethod
    def load(cls, folder: Path, *, threads: int = 0, expected_digest: str | None = None) -> "Predictor":
        """Open the bundle in a folder: digests first, then the golden answers. Raises BundleError."""
        predictor = cls(load_bundle(folder, expected_digest=expected_digest), threads=threads)
        predictor.check_golden()
        return predictor

    @property
    def card(self) -> Card:
        return self.bundle.card

    @property
    def digest(self) -> str:
        return self.bundle.digest

    def decode(self, data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> UInt8Array:
        """Turn encoded bytes into this model's input (h, w, 3). Raises ImageError."""
        height, width = self.card.image_size
        return load_array(data, where, size_hw=(height, width), resize=self.card.resize, max_pixels=max_pixels)

    def run(self, images_nhwc: UInt8Array) -> Outputs:
        """Run the network on n decoded images."""
        logits_nk, embedding_nd = self._session.run(["logits", "embedding"], {"images": images_nhwc})
        return Outputs(logits_nk, softmax(logits_nk / self.card.temperature), embedding_nd)

    def run_batches(self, images_nhwc: UInt8Array, *, batch_size: int = 64) -> Outputs:
        """Run the network on any number of images, a batch at a time."""
        parts = [self.run(images_nhwc[i : i + batch_size]) for i in range(0, len(images_nhwc), batch_size)]
        if not parts:
            empty = np.zeros((0, len(self.card.classes)), np.float32)
            return Outputs(empty, empty, np.zeros((0, 0), np.float32))
        return Outputs(
            np.concatenate([p.logits_nk for p in parts]),
            np.concatenate([p.probs_nk for p in parts]),
            np.concatenate([p.embedding_nd for p in parts]),
        )

    def answer(self, outputs: Outputs) -> list[Prediction]:
        """Put the network's outputs into words: one prediction an image."""
        chosen_n = choose_classes(outputs.probs_nk, self.card.threshold)
        return [
            Prediction(
                prediction=self.card.classes[k],
                probabilities={c: float(p) for c, p in zip(self.card.classes, probs_k, strict=True)},
                confidence=float(probs_k[k]),
            )
            for k, probs_k in zip(chosen_n, outputs.probs_nk, strict=True)
        ]

    def predict(self, images: Sequence[bytes]) -> list[Prediction]:
        """Answer for encoded images. Raises ImageError on the first that cannot be used."""
        arrays = [self.decode(data, f"image {i}") for i, data in enumerate(images)]
        return self.answer(self.run_batches(np.stack(arrays))) if arrays else []

    def check_golden(self) -> float:
        """Answer the golden images again and compare; return the largest logit difference.

        Raises:
            BundleError: it is above the tolerance: this machine would not answer as the model was judged.
        """
        arrays = [self.decode(data, "golden image") for data in self.bundle.golden_images()]
        logits_nk = self.run_batches(np.stack(arrays)).logits_nk
        difference = float(np.abs(logits_nk - self.bundle.golden_logits()).max())
        if not difference <= GOLDEN_TOLERANCE:
            raise BundleError(
                f"bundle {self.digest[:12]}",
                f"golden answers differ by {difference:.3g}",
                f"at most {GOLDEN_TOLERANCE}",
                "Do not serve it here: check the versions of onnxruntime and Pillow.",
            )
        return difference


def softmax(logits_nk: FloatArray) -> FloatArray:
    """Softmax over the last axis, in float64 inside."""
    shifted = logits_nk.astype(np.float64) - logits_nk.max(axis=-1, keepdims=True)
    exp = np.exp(shifted)
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True), dtype=np.float32)


def choose_classes(probs_nk: FloatArray, threshold: float | None) -> NDArray[np.int64]:
    """Return the index of the answer for each image: the likeliest, or for two classes by the threshold."""
    if threshold is not None:
        return (probs_nk[:, 1] >= threshold).astype(np.int64)
    return np.asarray(probs_nk.argmax(axis=1), dtype=np.int64)
