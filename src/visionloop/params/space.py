"""The space that `tune` searches: keys of `train`, dotted where they are nested, and what they may be. Pure."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from visionloop.errors import shorten

# They change no result, or what a result is compared by.
NOT_TUNED = frozenset(
    (
        "on",
        "monitor",
        "weights_sha256",
        "accelerator",
        "strategy",
        "devices",
        "num_nodes",
        "tensorboard",
        "confusion_every",
    )
)


def list_keys(section: type[BaseModel]) -> list[str]:
    """Return the keys of a section that can be tuned, nested ones as `neighbours.k`."""
    keys = []
    for name, field in section.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            keys += [f"{name}.{inner}" for inner in nested.model_fields]
        elif name not in NOT_TUNED:
            keys.append(name)
    return keys


def check_key(section: type[BaseModel], key: str, values: Sequence[Any]) -> None:
    """Check one key of the space: that it is one, and that each of the values fits it by itself.

    Raises:
        ValueError: what was expected instead.
    """
    keys = list_keys(section)
    if key not in keys:
        near = difflib.get_close_matches(key, keys, cutoff=0.5)
        raise ValueError(f"keys of train; {key!r} is none that can be tuned, near: {shorten(near or keys)}")
    for value in values:
        try:
            section.model_validate(nest({key: value}))
        except ValidationError as exc:
            # Errors without a place are about keys that do not fit each other: other keys may vary as well.
            wrong = [error["msg"] for error in exc.errors(include_url=False) if error["loc"]]
            if wrong:
                raise ValueError(f"values of train.{key}; {value!r}: {wrong[0]}") from exc


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as mappings in each other: `{"a.b": 1}` is `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested
