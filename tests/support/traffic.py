"""Traffic for tests of monitoring: small photos made by rule, and a fixed network that embeds and names them. No torch.

A photo shows one of CLASSES as a pattern, by a camera: those of one block have its light and its tint. `NEW` is a class
that the network does not know. Dimensions: n images, h height, w width, k classes, d embedding size.
"""

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from visionloop.monitoring.drift import Basis, Sample

CLASSES = ("stripes", "bars", "dots", "ramp")
NEW = len(CLASSES)
SIZE = 24
Numbers = NDArray[np.int64]
Change = Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]]


def make_photos(
    rng: np.random.Generator, class_n: NDArray[np.int64], block_n: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return photos (n, h, w, 3) from 0 to 1."""
    number, blocks = len(class_n), int(block_n.max()) + 1
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    phase, pitch = rng.uniform(0, 2 * np.pi, (2, number, 1, 1)), rng.uniform(2.5, 3.5, (number, 1, 1)) * 2 * np.pi
    patterns = np.stack(
        [
            np.sin(pitch * x + phase[0]),
            np.sin(pitch * y + phase[0]),
            np.sin(pitch * x + phase[0]) * np.sin(pitch * y + phase[1]),
            np.cos(phase[0]) * (x - 0.5) * 2 + np.sin(phase[0]) * (y - 0.5) * 2,
            np.sin(pitch * np.hypot(x - 0.5, y - 0.5) * 1.5 + phase[1]),
        ]
    )
    grey_nhw = 0.5 + 0.22 * patterns[class_n, np.arange(number)]
    tint_n3 = 1 + rng.normal(0, 0.04, (blocks, 3))[block_n] + rng.normal(0, 0.05, (number, 3))
    light_n = rng.normal(0, 0.02, blocks)[block_n] + rng.normal(0, 0.04, number)
    noise = rng.normal(0, 0.02, (number, SIZE, SIZE, 3))
    return np.clip(grey_nhw[..., None] * tint_n3[:, None, None] + light_n[:, None, None, None] + noise, 0, 1)


def blur(photos: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A lens out of focus: the mean of 3 x 3 pixels, half of it."""
    wide = np.pad(photos, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return 0.5 * photos + 0.5 * sliding_window_view(wide, (3, 3), axis=(1, 2)).mean(axis=(-1, -2))


def cast(photos: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A wrong white balance: 12 % more red, 12 % less blue."""
    return np.clip(photos * np.array([1.12, 1.0, 0.88]), 0, 1)


def change_camera(photos: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Another camera: other gamma, dark corners, more noise."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    corners = 1 - 0.15 * np.clip(np.hypot(x, y), 0, 1.4)[..., None] ** 2
    return np.clip(photos**1.1 * corners + rng.normal(0, 0.03, photos.shape), 0, 1)


class Network:
    """A fixed network: random filters, averaged, and the nearest mean of a class."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._filters = rng.normal(size=(5 * 5 * 3, 24)) / 8
        class_n = np.repeat(np.arange(len(CLASSES)), 60)
        embedding_nd = self.embed(make_photos(rng, class_n, np.arange(len(class_n))))
        self._mean_kd = np.stack([embedding_nd[class_n == k].mean(axis=0) for k in range(len(CLASSES))])
        self._spread = float(embedding_nd.var(axis=0).sum()) / 40
        self.basis = Basis.fit(embedding_nd)

    def embed(self, photos: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return embeddings (n, d)."""
        windows = sliding_window_view(photos - 0.5, (5, 5), axis=(1, 2))[:, ::2, ::2]
        maps = np.maximum(windows.reshape(*windows.shape[:3], -1) @ self._filters, 0)
        half = maps.shape[1] // 2
        parts = [
            maps[:, a, b].mean(axis=(1, 2))
            for a in (slice(half), slice(half, None))
            for b in (slice(half), slice(half, None))
        ]
        return np.concatenate([*parts, maps.std(axis=(1, 2))], axis=1)

    def observe(self, photos: NDArray[np.float64], block_n: NDArray[np.int64]) -> Sample:
        """Return photos as the log knows them."""
        embedding_nd = self.embed(photos)
        logits_nk = -((embedding_nd[:, None] - self._mean_kd) ** 2).sum(axis=2) / self._spread
        probs_nk = np.exp(logits_nk - logits_nk.max(axis=1, keepdims=True))
        probs_nk /= probs_nk.sum(axis=1, keepdims=True)
        grey = photos.mean(axis=-1)
        edges = (
            4 * grey[:, 1:-1, 1:-1] - grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1] - grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
        )
        return Sample(
            block_n=block_n,
            chosen_nk=np.eye(len(CLASSES), dtype=bool)[probs_nk.argmax(axis=1)],
            confidence_n=probs_nk.max(axis=1),
            abstained_n=probs_nk.max(axis=1) < 0.6,
            embedding_nd=embedding_nd,
            quality={
                "brightness": grey.mean(axis=(1, 2)),
                "contrast": grey.std(axis=(1, 2)),
                "sharpness": edges.var(axis=(1, 2)),
            },
        )


def make_window(
    network: Network,
    rng: np.random.Generator,
    number: int,
    block: int,
    *,
    change: Change | None = None,
    new_share: float = 0.0,
) -> Sample:
    """Return a window of photos in blocks of so many; those of a block are mostly of one class, as in a film."""
    block_n = np.arange(number) // block
    first_n = rng.integers(0, len(CLASSES), block_n.max() + 1)[block_n]
    class_n = np.where(rng.random(number) < (0.5 if block > 1 else 0.0), first_n, rng.integers(0, len(CLASSES), number))
    class_n = np.where(rng.random(number) < new_share, NEW, class_n)
    photos = make_photos(rng, class_n, block_n)
    return network.observe(photos if change is None else change(photos, rng), block_n)
