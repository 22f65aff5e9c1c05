"""What the servers of other frameworks share: Pillow and the same ONNX file, in batches. Needs no visionloop."""

import io

import numpy as np
import onnxruntime
from PIL import Image


class Network:
    """The model, and its input size in pixels."""

    def __init__(self, path: str, size_px: int) -> None:
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._size_px = size_px

    def decode(self, data: bytes) -> np.ndarray:
        """Turn encoded bytes into pixels."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return np.asarray(image.resize((self._size_px, self._size_px), Image.Resampling.BILINEAR))

    def run(self, images: list[np.ndarray]) -> list[dict[str, object]]:
        """Answer for decoded images."""
        logits_nk = self._session.run(["logits"], {"images": np.stack(images)})[0]
        exps_nk = np.exp(logits_nk - logits_nk.max(axis=1, keepdims=True))
        probs_nk = exps_nk / exps_nk.sum(axis=1, keepdims=True)
        return [{"prediction": int(one.argmax()), "probabilities": one.tolist()} for one in probs_nk]
