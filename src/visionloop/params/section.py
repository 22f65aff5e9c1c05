"""The base of every section of params.yaml, and the small types that sections share."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def to_tuple(value: Any) -> Any:
    """Let a YAML list stand for a tuple: sections are frozen through and through."""
    return tuple(value) if isinstance(value, list) else value


Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(to_tuple)]


Name = Annotated[str, Field(pattern=NAME_PATTERN)]
