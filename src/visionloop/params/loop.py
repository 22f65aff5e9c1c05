"""The sections of params.yaml about the loop: monitor, review, triggers, schedule, predict. See docs/loop.md.

Cron expressions have five fields and a time zone, and are checked when params.yaml is read.
"""

import re
from datetime import date, timedelta
from math import floor
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from visionloop.params.section import Section, Words

LEAST_LEVEL = 0.0005  # less would want more deals of the blocks than a minute has time for
LOOKED_AT = ("max_age_days", "new_images", "drift_windows", "quality_windows", "webhook")
MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec"
DAYS = "sun mon tue wed thu fri sat"
# Each field: what it is, its lowest and highest number, and the names that stand for numbers from the lowest on.
FIELDS = (
    ("minute", 0, 59, ""),
    ("hour", 0, 23, ""),
    ("day", 1, 31, ""),
    ("month", 1, 12, MONTHS),
    ("weekday", 0, 7, DAYS),
)
PART = re.compile(r"^(?:\*|([0-9a-z]+)(?:-([0-9a-z]+))?)(?:/([0-9]+))?$")

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Days = Annotated[float, Field(gt=0, le=36_600)]
Hours = Annotated[float, Field(ge=0, le=24 * 366)]
Windows = Annotated[int, Field(ge=1, le=366)]


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


class Review(Section):
    """What `visionloop review` asks, and what of the answers may enter the dataset.

    A batch has `count` images of the last `days` of the log. The share `random` of it is drawn by lot: only these may
    come into test. Answers wait until somebody accepts them, but those of the people in `accept_at_once`, who were
    asked on the page or by a CSV. Of one client at most `client_quota` labels a day are accepted of its feedback.
    """

    count: int = Field(default=50, ge=1, le=10_000)
    days: int = Field(default=14, ge=1, le=366)
    random: Annotated[float, Field(ge=0, le=1)] = 0.2
    seed: int = Field(default=0, ge=0)
    accept_at_once: Words = ()
    client_quota: int = Field(default=100, ge=0, le=1_000_000)


class Triggers(Section):
    """When a retrain is due. A trigger that is not set is not looked at; a person's word needs no trigger.

    `max_age_days` after the last retrain; `new_images` with labels; drift, or an accuracy too low, in so many windows
    in a row; a `webhook`, which somebody has called since. `needs`: one of those set, all, or at least so many.

    `own_sources`: their labels are answers of a model, so nothing is learned from them. In the first `warmup_hours` of
    a champion drift and quality do not count; `cooldown_hours` after a retrain, and beyond `max_per_week`, none starts.
    """

    max_age_days: Days | None = None
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


def check_cron(text: str | None) -> str | None:
    """Return a cron expression. Raises ValueError naming the field that is wrong, or that no day fits."""
    if text is None:
        return None
    words = text.split()
    if len(words) != len(FIELDS):
        raise ValueError('a cron expression of five fields, like "0 3 * * *"')
    numbers = [_read_field(word.lower(), *field) for word, field in zip(words, FIELDS, strict=True)]
    if words[4] == "*" and not any(day.month in numbers[3] and day.day in numbers[2] for day in _list_days()):
        raise ValueError(f"a day that there is: no month of {words[3]!r} has a day {words[2]!r}")
    return text


def _read_field(word: str, what: str, low: int, high: int, names: str) -> set[int]:
    numbers: set[int] = set()
    for part in word.split(","):
        match = PART.match(part)
        first, last, step = match.groups() if match else (None, None, None)
        ends = [_read_number(end, low, names) for end in (first, last) if end is not None]
        if not match or None in ends or any(end < low or end > high for end in ends if end is not None) or step == "0":
            raise ValueError(f"cron with a {what} of {low} to {high} as field {_place(what)}, not {word!r}")
        start = ends[0] if ends and ends[0] is not None else low
        stop = ends[-1] if ends and ends[-1] is not None and not (step and last is None) else high
        if stop < start:
            raise ValueError(f"cron with a {what} that goes upwards as field {_place(what)}, not {word!r}")
        numbers.update(range(start, stop + 1, int(step or 1)))
    return numbers


def _read_number(text: str, low: int, names: str) -> int | None:
    if text.isdigit():
        return int(text)
    return names.split().index(text) + low if text in names.split() else None


def _place(what: str) -> int:
    return [field[0] for field in FIELDS].index(what) + 1


def _list_days() -> list[date]:
    return [date(2024, 1, 1) + timedelta(days=n) for n in range(366)]  # a leap year


def check_timezone(name: str) -> str:
    """Return the name of a time zone. Raises ValueError."""
    try:
        ZoneInfo(name)
    except (ValueError, OSError, LookupError) as exc:
        raise ValueError("the name of a time zone, like Europe/Berlin or UTC") from exc
    return name


Cron = Annotated[str | None, AfterValidator(check_cron)]


class Schedule(Section):
    """When flows run, as cron expressions (five fields), by the clock of `timezone` (a name like Europe/Berlin).

    `retrain` always; `triggers`: whether one is due; `ingest`: new images alone; `monitor`: the last window; `review`:
    the next images that are worth a label; `predict`: the new images of the section of this name.
    """

    retrain: Cron = None
    triggers: Cron = None
    ingest: Cron = None
    monitor: Cron = None
    review: Cron = None
    predict: Cron = None
    timezone: Annotated[str, AfterValidator(check_timezone)] = "UTC"


class Predict(Section):
    """What `schedule.predict` answers: images, videos, folders and globs in `paths`, each new file once, and `streams`.

    A path that is not absolute is below the workspace; tables go to `out`. Of a video or a stream a frame is taken
    every `every_s`, and a change for less than `smooth_s` is taken for a flicker. A stream (rtsp://, http://, a device,
    or NAME=ADDRESS) is watched for `seconds` in each run; `webhook` gets its events, as from `visionloop predict`. Its
    playlist, and what it redirects to, may be on its own host and on `hosts`.
    """

    paths: Words = ()
    streams: Words = ()
    hosts: Words = ()
    out: str = Field(default="predictions", min_length=1)
    every_s: float = Field(default=0.5, ge=0.04, le=3600)
    smooth_s: float = Field(default=1.0, ge=0, le=3600)
    seconds: float = Field(default=60.0, gt=0, le=86_400)
    webhook: Webhook | None = None
