"""The base of every section of params.yaml, and the small types that sections share."""

from datetime import date
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def to_tuple(value: Any) -> Any:
    """Let a YAML list stand for a tuple: sections are frozen through and through."""
    return tuple(value) if isinstance(value, list) else value


def to_text(value: Any) -> Any:
    """Let a number or a day stand for the text that it is written as: classes are called 0 and 1 too."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_plain = isinstance(value, int | float | date) and not isinstance(value, bool)
    return str(value) if is_plain else value


Text = Annotated[str, BeforeValidator(to_text), Field(min_length=1)]
Words = Annotated[tuple[Text, ...], BeforeValidator(to_tuple)]


Name = Annotated[str, Field(pattern=NAME_PATTERN)]
