"""Whether a bundle gives the same answers on every runtime that may serve it, over the whole test side.

The report says which runtimes are approved. The card cannot: it is sealed before any test image is seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from visionloop.data.images import UInt8Array
from visionloop.errors import BundleError
from visionloop.predictor import Outputs, Predictor, has_openvino

MOST_DIFFERENCE = 0.02  # of a probability
MOST_CHANGED = 0.002  # of the answers


@dataclass
class RuntimeCheck:
    """One runtime beside ONNX Runtime fp32: the largest difference of a probability, and the answers that differ."""

    name: str
    predictor: Predictor | None
    difference: float = 0.0
    num_changed: int = 0
    num_images: int = 0

    @property
    def is_approved(self) -> bool:
        close = self.difference <= MOST_DIFFERENCE and self.num_changed <= MOST_CHANGED * self.num_images
        return self.predictor is not None and close

    def compare(self, images_nhwc: UInt8Array, ours: Outputs, reference: Predictor) -> None:
        """Run some images, and compare the answers with those of ONNX Runtime."""
        if self.predictor is None:
            return
        theirs = self.predictor.run(images_nhwc)
        distance_nk = np.abs(theirs.probs_nk - ours.probs_nk)
        differs_n = reference.choose(theirs.probs_nk) != reference.choose(ours.probs_nk)
        self.difference = max(self.difference, float(np.nan_to_num(distance_nk, nan=1.0).max()))
        self.num_changed += int((differs_n.any(axis=1) if differs_n.ndim == 2 else differs_n).sum())
        self.num_images += len(images_nhwc)

    def to_json(self) -> dict[str, object]:
        """Return the result. The difference has one digit: its last ones are those of the machine."""
        return {
            "runtime": self.name,
            "approved": self.is_approved,
            "loads": self.predictor is not None,
            "largest_difference": float(f"{self.difference:.0e}"),
            "num_changed": self.num_changed,
        }


def open_runtimes(predictor: Predictor) -> list[RuntimeCheck]:
    """Open the other runtimes of this machine. One that cannot load the model is not approved."""
    if not has_openvino():
        return []
    try:
        return [RuntimeCheck("openvino fp32", Predictor(predictor.bundle, runtime="openvino"))]
    except BundleError:
        return [RuntimeCheck("openvino fp32", None)]


def describe_runtimes(checks: Sequence[RuntimeCheck]) -> list[str]:
    """Return a line for each runtime that is not approved."""
    return [
        f"LOOK: {check.name} is not approved for this model: "
        + (
            f"{check.num_changed:,} other answers, probabilities differ by up to {check.difference:.0e}"
            if check.predictor
            else "it does not load it"
        )
        for check in checks
        if not check.is_approved
    ]
