"""When something is due: five cron fields and a time zone, checked when params.yaml is read. See docs/loop.md."""

import re
from datetime import date, timedelta
from typing import Annotated
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field

from visionloop.params.monitor import Webhook
from visionloop.params.section import Section, Words

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


class Schedule(Section):
    """When flows run, as cron expressions (five fields), by the clock of `timezone` (a name like Europe/Berlin).

    `retrain` always; `triggers`: whether one is due; `ingest`: new images alone; `monitor`: the last window; `review`:
    the next images that are worth a label; `predict`: the new images of the section of this name.
    """

    retrain: Annotated[str | None, AfterValidator(check_cron)] = None
    triggers: Annotated[str | None, AfterValidator(check_cron)] = None
    ingest: Annotated[str | None, AfterValidator(check_cron)] = None
    monitor: Annotated[str | None, AfterValidator(check_cron)] = None
    review: Annotated[str | None, AfterValidator(check_cron)] = None
    predict: Annotated[str | None, AfterValidator(check_cron)] = None
    timezone: Annotated[str, AfterValidator(check_timezone)] = "UTC"


class Predict(Section):
    """What `schedule.predict` answers: images, videos, folders and globs in `paths`, each new file once, and `streams`.

    A path that is not absolute is below the workspace; tables go to `out`. Of a video or a stream a frame is taken
    every `every_s`, and a change for less than `smooth_s` is taken for a flicker. A stream (rtsp://, http://, a device,
    or NAME=ADDRESS) is watched for `seconds` in each run; `webhook` gets its events, as from `visionloop predict`.
    """

    paths: Words = ()
    streams: Words = ()
    out: str = Field(default="predictions", min_length=1)
    every_s: float = Field(default=0.5, ge=0.04, le=3600)
    smooth_s: float = Field(default=1.0, ge=0, le=3600)
    seconds: float = Field(default=60.0, gt=0, le=86_400)
    webhook: Webhook | None = None
