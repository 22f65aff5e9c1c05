"""Run one source of a params.yaml by itself, without an engine behind it, and keep what it yields."""

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionloop.cli.ingest import make_source
from visionloop.errors import SourceError
from visionloop.ingest.sources import Cursor, Item, PassedOver, SourceContext, read_source
from visionloop.ingest.sources.guess import guess_source
from visionloop.params import Source, make_params
from visionloop.records import Rejected


@dataclass
class Run:
    """What a source has yielded, and told."""

    items: list[Item] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    cursors: list[Cursor] = field(default_factory=list)
    passed: list[PassedOver] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    error: SourceError | None = None

    def take(self, source: Source, context: SourceContext) -> None:
        """Read a source to its end, or until it cannot be used."""
        try:
            for one in read_source(source, context):
                kept = {Item: self.items, Rejected: self.rejected, Cursor: self.cursors, PassedOver: self.passed}
                kept[type(one)].append(one)
        except SourceError as exc:
            self.error = exc

    def facts(self) -> list[tuple[Any, ...]]:
        """Origin (without the source's name), labels and side of each item."""
        return [(item.origin.partition(":")[2], item.labels, item.side) for item in self.items]

    def codes(self) -> list[tuple[str, str]]:
        """Origin (without the source's name) and code of each that was rejected."""
        return [(one.origin.partition(":")[2], one.code) for one in self.rejected]


def run_source(
    home: Path, cursor: str | None = None, env: dict[str, str] | None = None, several: bool = False, **section: Any
) -> Run:
    """Read a source to its end. `section` is what stands under `ingest.sources`; paths are relative to `home`."""
    source = make_params({"name": "pets", "ingest": {"sources": [section]}}).ingest.sources[0]
    run = Run()
    context = SourceContext(home, home / ".visionloop", env or {}, cursor=cursor, tell=run.told.append, several=several)
    run.take(source, context)
    if run.error:
        raise run.error
    return run


def type_advice(home: Path, place: Path) -> Run:
    """Ask for a place, type the commands of the refusal, and read what the last one names."""
    run = Run()
    try:
        run.take(guess_source(str(place)), SourceContext(home, home, {}))
    except SourceError as exc:
        run.error = exc
    unpack, ingest = re.findall(r"`([^`]+)`", str(run.error))
    subprocess.run(["bash", "-euc", unpack], check=True, cwd=home)
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {ingest}"], check=True, capture_output=True, text=True)
    _, _, path, *option = words.stdout.splitlines()
    run = Run()
    given = {"no_label": option[1:]} if option else {}
    run.take(make_source(path, given, home), SourceContext(home, home, {}, tell=run.told.append))
    return run


def read_video(
    home: Path, env: dict[str, str] | None = None, **keys: Any
) -> tuple[list[Item], list[Rejected], list[str]]:
    """Read a source of kind video; return its frames, what it rejects, and what it tells."""
    run = run_source(home, env=env, kind="video", name="cam", **keys)
    return run.items, run.rejected, run.told


def touch(home: Path, paths: Iterable[str], data: bytes = b"x") -> Path:
    """Write small files that hold no image: a source does not look inside."""
    for path in paths:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(data)
    return home


# What COCO and Label Studio write for a cat and a dog.
COCO = {
    "info": {"year": 2024},
    "licenses": [],
    "images": [
        {"id": 1, "file_name": "1.jpg", "height": 4, "coco_url": "http://x.org/1.jpg"},
        {"id": 2, "file_name": "2.jpg", "height": 4, "coco_url": "http://x.org/2.jpg"},
        {"id": 3, "file_name": "3.jpg", "height": 4, "coco_url": "http://x.org/3.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 7},
        {"id": 2, "image_id": 1, "category_id": 7},
        {"id": 3, "image_id": 2, "category_id": 9},
        {"id": 4, "image_id": 1, "category_id": 9},
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
}
TASKS = [
    {"id": 1, "data": {"image": "/data/upload/1.jpg"}, "annotations": [{"result": [
        {"from_name": "choice", "type": "choices", "value": {"choices": ["cat"]}}]}]},
    {"id": 2, "data": {"image": "/data/local-files/?d=2.jpg"}, "annotations": [
        {"was_cancelled": True, "result": [{"from_name": "choice", "type": "choices", "value": {"choices": ["cat"]}}]},
        {"result": [{"from_name": "choice", "type": "choices", "value": {"choices": ["dog"]}}]}]},
    {"id": 3, "data": {"image": "/data/upload/3.jpg"}, "annotations": []},
]  # fmt: skip
