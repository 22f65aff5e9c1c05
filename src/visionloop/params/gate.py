"""The section `gate` of params.yaml: when a candidate may replace the champion. docs/judging.md tells each rule."""

from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from visionloop.params.section import Section

Mode = Literal["on", "dry_run", "off"]
Share = Annotated[float, Field(ge=0, le=1)]
Metric = Literal[
    "accuracy", "answered", "answered_accuracy", "auc", "balanced_accuracy", "brier", "ece", "log_loss", "macro_f1",
    "map", "micro_f1", "pr_auc", "precision", "recall", "top_3", "top_5", "weighted_f1",
]  # fmt: skip
LOWER_IS_BETTER = frozenset({"brier", "ece", "log_loss"})


class MinImages(Section):
    """How many test images a comparison with the champion needs: in all, and of each class in it."""

    all: int = Field(default=100, ge=1)
    per_class: int = Field(default=10, ge=0)


class Floor(Section):
    """A limit of one figure. `bound: interval` holds the worse end of its 95 % interval against the line."""

    line: float = Field(ge=0, allow_inf_nan=False)
    bound: Literal["value", "interval"] = "value"
    mode: Mode = "on"


class Drop(Section):
    """The rule about parts of the test side: none may have lost more than `most` of its right answers."""

    most: float = Field(default=0.0, ge=0, lt=1)
    mode: Mode = "on"


class Baseline(Section):
    """The rule that a candidate beats the best constant answer.

    `heads`: the mode of another one, that no simple head on its own embeddings is shown to be better.
    """

    mode: Mode = "on"
    heads: Mode = "dry_run"


class Answered(Section):
    """The rule of a candidate that may say "don't know": it answers at least so many images.

    `least` is a share of the test images; `margin` how much less than the champion it may answer.
    """

    least: Share = 0.5
    margin: Share = 0.2
    mode: Mode = "on"


class NewClass(Section):
    """The rule about classes that the champion does not know: the candidate finds at least this share of them."""

    recall: Share = 0.5
    mode: Mode = "on"


class LogLoss(Section):
    """The rule that the probabilities are not worse than the champion's by more than `margin`."""

    margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    mode: Mode = "dry_run"


class Leaks(Section):
    """The rule that at most so many test images have a near duplicate on another side."""

    most: int = Field(default=0, ge=0)
    mode: Mode = "dry_run"


class Size(Section):
    """The rule about the size of model.onnx."""

    mb: float = Field(gt=0, allow_inf_nan=False)
    mode: Mode = "on"


class Latency(Section):
    """The rule about the time for one image: at most `ms`, and at most `ratio` times the champion's."""

    ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    mode: Mode = "dry_run"

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.ms is None and self.ratio is None:
            raise ValueError("`ms`, `ratio`, or both")
        return self


def to_floor(value: Any) -> Any:
    """Take a bare number for a floor's line."""
    return {"line": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


def to_min_images(value: Any) -> Any:
    """Take a bare number for how many there are in all."""
    return {"all": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Gate(Section):
    """When a candidate may replace the champion. Each rule has a `mode` of its own; `dry_run` only shows it."""

    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    rule: Literal["better", "no_worse"] = "better"
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    margin: float = Field(default=0.02, ge=0, lt=1)
    looks: Literal["tell", "spend"] = "tell"
    approval: Literal["none", "required"] = "none"
    min_images: Annotated[MinImages, BeforeValidator(to_min_images)] = MinImages()
    floors: dict[Metric, Annotated[Floor, BeforeValidator(to_floor)]] = Field(default_factory=dict)
    baseline: Baseline = Baseline()
    answered: Answered = Answered()
    class_drop: Drop = Drop()
    slice_drop: Drop = Drop()
    new_class: NewClass = NewClass()
    log_loss: LogLoss = LogLoss()
    leaks: Leaks = Leaks()
    model_size: Size | None = None
    latency: Latency | None = None

    @field_validator("floors")
    @classmethod
    def _check_floors(cls, floors: dict[Metric, Floor]) -> dict[Metric, Floor]:
        for name, floor in floors.items():
            if name not in LOWER_IS_BETTER and floor.line > 1:
                raise ValueError(f"a floor of {name} from 0 to 1")
            if name == "ece" and floor.bound == "interval":
                raise ValueError("`bound: value`: the calibration error has no interval")
        return floors

    def count_resamples(self) -> int:
        """Return how many bootstrap resamples the comparison needs: 20 beyond its tail. 0 if it draws none."""
        return ceil(20 / self.alpha - 1e-9) if self.metric == "macro_f1" else 0
