"""The section `monitor` of params.yaml: what a window is, and what is worth an alert. See docs/monitoring.md."""

from math import floor
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from visionloop.params.section import Section

LEAST_LEVEL = 0.0005  # less would want more deals of the blocks than a minute has time for

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Webhook(Section):
    """Where alerts go, as JSON by POST. `${NAME}` in the address and in a header comes from the environment."""

    url: str = Field(max_length=2000)
    headers: dict[str, str] = Field(default_factory=dict)
    timeout_s: float = Field(default=5.0, gt=0, le=60)
    tries: int = Field(default=3, ge=1, le=10)

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if not url.startswith(("https://", "http://", "${")) or url in ("https://", "http://"):
            raise ValueError("an address that begins with https:// or http://")
        return url


class Monitor(Section):
    """What is watched, window by window. With `false_alarm_days: 100` one false alarm of drift is due in 100 days.

    For windows of 1 hour its default is 83, the most that is possible.
    `block_hours`: images of one client in so many hours are taken for alike; 0: each image is by itself.
    `reference_windows`: so many of the first windows of a model that were accepted are what later ones are compared
    with, and as many of the newest. Of each window `max_images` are looked at for drift.
    `accuracy_drop`: how far below that of the validation side the accuracy by labels may be for sure; `min_accuracy`
    sets that line itself.
    """

    window_hours: int = Field(default=24, ge=1, le=24 * 31)
    false_alarm_days: float = Field(default=100, gt=0, allow_inf_nan=False)
    block_hours: int = Field(default=1, ge=0, le=24 * 7)
    min_images: int = Field(default=50, ge=10)
    max_images: int = Field(default=1000, ge=50, le=20_000)
    reference_windows: int = Field(default=7, ge=1, le=100)
    quality_days: int = Field(default=30, ge=1, le=366)
    accuracy_drop: float = Field(default=0.05, ge=0, lt=1)
    min_accuracy: Share | None = None
    max_client_share: Share = 0.5
    max_same_share: Share = 0.2
    max_volume_ratio: float = Field(default=5, gt=1, allow_inf_nan=False)
    max_latency_ms: Positive | None = None
    max_model_age_days: Positive | None = None
    max_refused_share: Share = 0.05
    max_error_share: Share = 0.01
    webhook: Webhook | None = None

    @model_validator(mode="before")
    @classmethod
    def _fit_default(cls, value: Any) -> Any:
        hours = value.get("window_hours") if isinstance(value, dict) and "false_alarm_days" not in value else None
        if type(hours) is not int or hours < 1:
            return value
        return {**value, "false_alarm_days": min(100, floor(hours / 24 / LEAST_LEVEL))}

    @property
    def level(self) -> float:
        """How often a window that is like the reference may give a false alarm."""
        return min(0.25, self.window_hours / 24 / self.false_alarm_days)

    @model_validator(mode="after")
    def _check_level(self) -> Self:
        most = self.window_hours / 24 / LEAST_LEVEL
        if self.false_alarm_days > most:
            hours = "1 hour" if self.window_hours == 1 else f"{self.window_hours} hours"
            raise ValueError(f"`false_alarm_days` of at most {most:g} for windows of {hours} (`window_hours`)")
        return self
