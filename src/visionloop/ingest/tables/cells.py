"""The cells of a row: look-up, and conversion to text, to a time, or to 0 or 1 of a one-hot column. Pure."""

import json
import re
import unicodedata
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from visionloop.errors import ImageError

Row = Mapping[str, Any]

ON_OFF = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": False}
# What programs and people write into a cell that says nothing, in lower case (the words are those of pandas, too).
NOTHING = frozenset(
    (
        *("", "nan", "none", "null", "na", "n/a", "-", "--", "\u2013", "\u2014", "n.a.", "<na>", "nil", "(null)"),
        *("#n/a", "#na", "#n/a n/a", "-nan", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan", "<null>", "(none)", "<none>"),
    )
)
CHOICES = "choices"  # the key of several answers, as Label Studio writes them into one cell
WHOLE = re.compile(r"([+-]?[0-9]+)\.0+")
PYTHON_LIST = re.compile(r"\[\s*'[^']*'(?:\s*,\s*'[^']*')*\s*\]")
MILLISECONDS_FROM = 1e11  # as seconds that would be the year 5138


def get_cell(row: Row, key: str) -> Any:
    """Return a cell; `a.b` is the key b inside a, unless a column is named so. None when there is none."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def to_text(value: object) -> str:
    """Return a cell as text: whole numbers without a point, true and false as words, nothing as "".

    Raises:
        ImageError: `bad_row`: the cell is a list, an object or bytes.
    """
    if value is None or value != value:  # noqa: PLR0124  (NaN is what pandas writes for nothing)
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | Decimal) and -(2**53) < value < 2**53 and value == int(value):
        return str(int(value))
    if isinstance(value, dict | list | tuple | set | bytes | bytearray | memoryview):
        raise ImageError("row", f"a cell holds a {type(value).__name__}", "text or a number", reason_code="bad_row")
    return str(value).strip()


def split_label_cell(value: object) -> list[object]:
    """Return the labels of a cell: one, those of a list, also of a list written as text, or Label Studio's choices."""
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = re.findall(r"'([^']*)'", text) if PYTHON_LIST.fullmatch(text) else value
    if isinstance(value, Mapping) and isinstance(value.get(CHOICES), list):
        value = value[CHOICES]
    return list(value) if isinstance(value, list | tuple) else [value]


def clean_label(text: str) -> str:
    """Return a label as the same class is written everywhere: in NFC, `1.0` as `1`, `True` as `true`."""
    text = unicodedata.normalize("NFC", text.strip())
    if found := WHOLE.fullmatch(text):
        return found[1]
    return text.lower() if text in ("True", "TRUE", "False", "FALSE") else text


def parse_time(value: object) -> str | None:
    """Return a time as ISO 8601 in UTC: of ISO or EXIF text, seconds or milliseconds since 1970, or a datetime."""
    try:
        if isinstance(value, bool):
            return None
        if isinstance(value, int | float):
            seconds = value / 1000 if abs(value) > MILLISECONDS_FROM else value
            return datetime.fromtimestamp(seconds, UTC).isoformat()
        if isinstance(value, str):
            text = value.strip()
            if text[4:5] == ":" and text[7:8] == ":":  # EXIF: 2024:05:01 12:00:00
                text = f"{text[:4]}-{text[5:7]}-{text[8:]}"
            if not text[:4].isdecimal() or text.isdecimal():
                return None
            value = datetime.fromisoformat(text)
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        if not isinstance(value, datetime):
            return None
        return (value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)).isoformat()
    except (ValueError, OverflowError, OSError):
        return None


def is_on(value: object, name: str) -> bool:
    on = ON_OFF.get(to_text(value).lower())
    if on is None:
        raise ImageError(f"column {name}", f"holds {str(value)[:60]!r}", "1 or 0", reason_code="bad_label")
    return on
