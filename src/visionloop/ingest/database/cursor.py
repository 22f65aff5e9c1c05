"""How far an incremental query has come: the last value of its cursor column, as text that comes back as it was. Pure.

The value belongs to one query: with another query, or other columns, the reading begins anew. What was guessed of the
columns is kept with it, so that a later pull of few rows guesses nothing else.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from visionloop.errors import SourceError
from visionloop.ingest.tables.rows import RowPlan
from visionloop.params import SqlSource
from visionloop.records import compute_digest

_KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    # name: (type, to JSON, from JSON); a datetime is a date too, so it comes first
    "int": (int, int, int),
    "float": (float, float, float),
    "str": (str, str, str),
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "decimal": (Decimal, str, Decimal),
}


@dataclass(frozen=True)
class Progress:
    """The last value seen, and what the columns mean."""

    value: object
    plan: RowPlan


def compute_query_digest(source: SqlSource) -> str:
    """Return the digest of what rows a source asks for and what they mean."""
    return compute_digest(source.model_dump(mode="json", include={"query", "columns", "cursor", "images"}))


def write_progress(progress: Progress, digest: str, where: str) -> str:
    """Return progress as text. Raises SourceError when the cursor column holds what has no order that lasts."""
    value = progress.value
    for kind, (of_type, to_json, _) in _KINDS.items():
        if isinstance(value, of_type) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                break
            state = {"digest": digest, "kind": kind, "value": to_json(value), "plan": asdict(progress.plan)}
            return json.dumps(state, sort_keys=True)
    found = f"the cursor column holds {type(value).__name__} ({str(value)[:40]})"
    raise SourceError(f"{where} cursor", found, "a number, text, a date or a time", "Choose another column.")


def read_progress(text: str | None, digest: str) -> Progress | None:
    """Return what `write_progress` wrote for the same query; None for anything else."""
    try:
        state = json.loads(text or "")
        if state["digest"] != digest:
            return None
        plan = RowPlan(**{**state["plan"], "labels": tuple(state["plan"]["labels"])})
        return Progress(_KINDS[state["kind"]][2](state["value"]), plan)
    except (ValueError, KeyError, TypeError, ArithmeticError):
        return None
