"""A shadow: a second model that answers a share of the same requests for itself alone. What the store holds of it.

shadow/NAME/current.json              which model is the shadow, since when (Order): all servers of the name follow it
shadow/NAME/date=.../*.parquet        one row for each image that it answered (SHADOW), joined by `request_id`
"""

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from visionloop.data.day_table import DayReader, DayTable
from visionloop.errors import DatasetError, ObjectMissing

if TYPE_CHECKING:
    import pyarrow as pa

    from visionloop.store import ObjectStore

SHADOW = DayTable(
    "shadow",
    {
        "request_id": "text",  # of the answer that the client got
        "time": "time",  # of that answer
        "model_digest": "text",  # of the shadow
        "prediction": "text",  # null: it failed
        "confidence": "double",
        "network_ms": "double",  # for this image alone
        "problem": "text",  # why it failed
    },
)


@dataclass(frozen=True)
class Order:
    """What somebody asked for: the bundle, the share of the answered images, when, who, and the address they typed."""

    bundle: str
    share: float
    started_at: str
    by: str
    model: str
    stopped_at: str | None = None


def read_order(store: "ObjectStore", name: str) -> Order | None:
    """Return the newest order, also a stopped one; None: there was none. Raises DatasetError, StoreError."""
    key = _make_key(name)
    try:
        order = Order(**json.loads(store.get(key)))
        datetime.fromisoformat(order.started_at)
        if not isinstance(order.bundle, str) or not 0 < order.share <= 1:
            raise ValueError(f"share {order.share}")
    except ObjectMissing:
        return None
    except (ValueError, TypeError) as exc:
        raise DatasetError(key, "is damaged", "an order for a shadow", "Run `visionloop shadow start` anew.") from exc
    return order


def write_order(store: "ObjectStore", name: str, order: Order) -> None:
    """Put an order in the place of the one before. Raises StoreError."""
    store.put(_make_key(name), json.dumps(asdict(order), sort_keys=True).encode())


def read_shadow(store: "ObjectStore", name: str, order: Order) -> "pa.Table":
    """Return what the shadow of an order answered since its start. Raises StoreError."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = DayReader(SHADOW, store, name).read(datetime.fromisoformat(order.started_at))
    rows = pa.concat_tables([SHADOW.make_schema().empty_table(), *parts])
    return rows.filter(pc.equal(rows["model_digest"], order.bundle))


def _make_key(name: str) -> str:
    return f"{SHADOW.kind}/{name}/current.json"
