"""The section `triggers` of params.yaml: what makes a retrain due, and what holds it back. See docs/loop.md."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from visionloop.params.section import Section, Words

Positive = Annotated[float, Field(gt=0, le=36_600)]
Hours = Annotated[float, Field(ge=0, le=24 * 366)]
Windows = Annotated[int, Field(ge=1, le=366)]
LOOKED_AT = ("max_age_days", "new_images", "drift_windows", "quality_windows", "webhook")


class Triggers(Section):
    """When a retrain is due. A trigger that is not set is not looked at; a person's word needs no trigger.

    `max_age_days` after the last retrain; `new_images` with labels; drift, or an accuracy too low, in so many windows
    in a row; a `webhook`, which somebody has called since. `needs`: one of those set, all, or at least so many.

    `own_sources`: their labels are answers of a model, so nothing is learned from them. In the first `warmup_hours` of
    a champion drift and quality do not count; `cooldown_hours` after a retrain, and beyond `max_per_week`, none starts.
    """

    max_age_days: Positive | None = None
    new_images: int | None = Field(default=None, ge=1)
    drift_windows: Windows | None = None
    quality_windows: Windows | None = None
    webhook: bool = False
    needs: Literal["any", "all"] | Annotated[int, Field(ge=1)] = "any"
    own_sources: Words = ()
    warmup_hours: Hours = 24.0
    cooldown_hours: Hours = 24.0
    max_per_week: int = Field(default=3, ge=1, le=1000)

    @field_validator("needs")
    @classmethod
    def _check_needs(cls, needs: str | int, info: ValidationInfo) -> str | int:
        most = sum(bool(info.data.get(name)) for name in LOOKED_AT)
        if isinstance(needs, int) and needs > most:
            raise ValueError(f"any, all, or at most {most}: so many triggers are set")
        return needs

    @property
    def names(self) -> tuple[str, ...]:
        """The triggers that are set."""
        return tuple(name for name in LOOKED_AT if getattr(self, name))

    @property
    def num_needed(self) -> int:
        """How many of them make a retrain due; 0 if none is set."""
        return self.needs if isinstance(self.needs, int) else len(self.names) if self.needs == "all" else 1
