"""Check and store all that the sources offer, on all cores; what comes of it, in the order of the sources."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from visionloop.ingest.inspect import Inspected, store_item
from visionloop.ingest.sources import Cursor, Item
from visionloop.parallel import map_parallel
from visionloop.params import Ingest
from visionloop.records import Rejected
from visionloop.store import ObjectStore


@dataclass(frozen=True)
class Checked:
    """What a pull has found: usable images, what cannot be used, and how far each incremental source has come."""

    inspected: list[Inspected] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    cursors: dict[str, str] = field(default_factory=dict)
    num_seen: int = 0


def check_all(
    offered: Iterable[Item | Rejected | Cursor],
    store: ObjectStore,
    limits: Ingest,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Read, check and store every item. Raises StoreError, and what a source raises."""
    items: list[Item] = []
    rejected: list[Rejected] = []
    cursors: dict[str, str] = {}
    for one in offered:
        if isinstance(one, Item):
            items.append(one)
        elif isinstance(one, Cursor):
            cursors[one.source] = one.value
        else:
            rejected.append(one)

    def check(numbered: tuple[int, Item]) -> Inspected | Rejected:
        return store_item(numbered[1], numbered[0], store, limits)

    inspected: list[Inspected] = []
    for done, result in enumerate(map_parallel(check, enumerate(items)), start=1):
        if isinstance(result, Rejected):
            rejected.append(result)
        else:
            inspected.append(result)
        on_progress(done, len(items))
    return Checked(inspected, rejected, cursors, len(items))
