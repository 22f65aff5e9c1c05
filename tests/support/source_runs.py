"""Run one source of a params.yaml by itself, without an engine behind it, and keep what it yields."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionloop.ingest.sources import Cursor, Item, SourceContext, read_source
from visionloop.params import make_params
from visionloop.records import Rejected


@dataclass
class Run:
    """What a source has yielded, and told."""

    items: list[Item] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def facts(self) -> list[tuple[Any, ...]]:
        """Origin (without the source's name), labels and side of each item."""
        return [(item.origin.partition(":")[2], item.labels, item.side) for item in self.items]

    def codes(self) -> list[tuple[str, str]]:
        """Origin (without the source's name) and code of each that was rejected."""
        return [(one.origin.partition(":")[2], one.code) for one in self.rejected]


def run_source(home: Path, cursor: str | None = None, env: dict[str, str] | None = None, **section: Any) -> Run:
    """Read a source to its end. `section` is what stands under `ingest.sources`; paths are relative to `home`."""
    source = make_params({"name": "pets", "ingest": {"sources": [section]}}).ingest.sources[0]
    run = Run()
    context = SourceContext(home, home / ".visionloop", env or {}, cursor=cursor, tell=run.told.append)
    for one in read_source(source, context):
        if isinstance(one, Item):
            run.items.append(one)
        elif isinstance(one, Rejected):
            run.rejected.append(one)
        else:
            assert isinstance(one, Cursor)
            run.cursors.append(one.value)
    return run


def touch(home: Path, paths: Iterable[str], data: bytes = b"x") -> Path:
    """Write small files that hold no image: a source does not look inside."""
    for path in paths:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(data)
    return home
