"""What an encoder is: all that its embeddings depend on, and the digest that names it in the table. No torch."""

from dataclasses import dataclass, field
from typing import Any, Self

from visionloop.data.shards import Prepared
from visionloop.records import Record, compute_digest

# Raised when the same weights, preprocessing and runtime would give other vectors than before.
VERSION = 1


@dataclass(frozen=True)
class EncoderFacts(Record):
    """An encoder: a backbone with its weights, what is done to an image before it, and what computes it.

    `weights_digest` is that of the tensors. For the encoder of a bundle `source` is the bundle's digest, else "params".
    `crop` says how the training side was prepared where it was stored larger: its middle is embedded.
    """

    source: str
    backbone: str
    weights: str
    weights_digest: str
    image_size: tuple[int, int]
    resize: str
    runtime: str
    precision: str
    crop: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Build the facts from a decoded JSON object. Raises KeyError, TypeError when it is none."""
        return super().from_json({**value, "image_size": (int(value["image_size"][0]), int(value["image_size"][1]))})

    @property
    def digest(self) -> str:
        """The name of the encoder: equal digests mean embeddings that may stand side by side."""
        return compute_digest({name: value for name, value in self.to_json().items() if name != "weights"})

    def describe(self) -> str:
        """Return the encoder in words: `resnet18 at 224 x 224, onnxruntime fp32`."""
        height, width = self.image_size
        name = self.backbone if self.source == "params" else f"{self.backbone} of bundle {self.source[:12]}"
        return f"{name} at {height} x {width}, {self.runtime} {self.precision}"


def describe_crop(prepared: Prepared) -> dict[str, Any]:
    """Return what sets the embedding of a training image apart where that side is stored larger; else nothing.

    Which images are of the training side is decided by dataset, so its name belongs to it.
    """
    if prepared.train_shards is None:
        return {}
    return {"dataset": prepared.pin.name, "train_size": list(prepared.train_shards.size_hw)}
