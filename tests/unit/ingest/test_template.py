"""The template of a new source, whole: a section of params and a reader, in 50 lines, run through a real pull.

In the repository the section stands in `params/sources.py`, the reader in `ingest/sources/sidecar.py`, and its name in
`READERS`; here they are one text, so that it can be seen and counted at once.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from fakes import make_image
from visionloop.data.parts import load_version_records
from visionloop.ingest import sources
from visionloop.ingest.pull import PullReport, pull
from visionloop.params import make_params
from visionloop.settings import load_settings
from visionloop.store import LocalStore
from visionloop.workspace import connect

TEMPLATE = '''\
"""Images with a sidecar: beside `1.png` lies `1.json`, with its `label`, and if known its `taken_at`."""

import json
from collections.abc import Iterator
from typing import Literal

from visionloop.errors import SourceError
from visionloop.ingest.tables.cells import parse_time
from visionloop.ingest.item import Cursor, Item, SourceContext, make_file_reader
from visionloop.ingest.paths.listing import list_files
from visionloop.ingest.paths.listing import escape_name, is_image_name
from visionloop.params.section import Name, Section
from visionloop.records import Rejected


class SidecarSource(Section):
    """Images, each with a JSON file of the same name beside it."""

    kind: Literal["sidecar"]
    path: str
    name: Name = "sidecar"


def read_sidecar(source: SidecarSource, context: SourceContext) -> Iterator[Item | Rejected | Cursor]:
    """Yield the images of a folder; incremental by name. Raises SourceError when it holds none."""
    folder = context.resolve(source.path)
    where = f"source {source.name} {folder}"
    images = [file for file in list_files(folder, where) if is_image_name(file.relative)]
    if not images:
        raise SourceError(where, "holds no image", "images with a JSON file beside each", "Check the path.")
    for file in images:
        if context.cursor and file.relative <= context.cursor:
            continue
        origin = f"{source.name}:{escape_name(file.relative)}"
        try:
            facts = json.loads((folder / file.relative).with_suffix(".json").read_bytes())
            labels, time = (str(facts["label"]),), parse_time(facts.get("taken_at"))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
            yield Rejected(origin, "no_label", f"its JSON file says no label ({type(exc).__name__})")
            continue
        yield Item(origin, source.name, labels, make_file_reader(file.path), file.stamp, captured_at=time)
    yield Cursor(source.name, images[-1].relative)
'''


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The template as the module that a contributor would have written."""
    name = f"{sources.__name__}.sidecar"
    module = ModuleType(name)
    exec(compile(TEMPLATE, "sidecar.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sources.READERS, "sidecar", "sidecar:read_sidecar")
    return module


def run(template: ModuleType, home: Path) -> PullReport:
    source = template.SidecarSource(kind="sidecar", path="photos")
    settings = load_settings({}, home)
    params = make_params({"name": "pets", "ingest": {"max_rejected_ratio": 1.0}})
    return pull(
        connect(settings, params, store=LocalStore(home / "store")), sources=[source], now="2026-01-01T00:00:00+00:00"
    )


def add(home: Path, number: int, sidecar: str) -> None:
    (home / "photos").mkdir(exist_ok=True)
    (home / "photos" / f"{number}.png").write_bytes(make_image(number))
    (home / "photos" / f"{number}.json").write_text(sidecar)


def test_a_new_source_takes_fifty_lines() -> None:
    assert len(TEMPLATE.splitlines()) <= 50
    assert max(map(len, TEMPLATE.splitlines())) <= 120


def test_the_template_is_a_whole_source(template: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    for number in range(1, 9):
        add(tmp_path, number, f'{{"label": "{"cat" if number % 2 else "dog"}", "taken_at": "2024-05-01T10:00:00"}}')
    add(tmp_path, 9, "{}")
    first = run(template, tmp_path)
    assert (first.num_added, first.version.classes) == (8, ("cat", "dog"))
    assert [(one.origin, one.code) for one in first.rejected] == [("sidecar:9.png", "no_label")]
    assert first.version.cursors == {"sidecar": "9.png"}
    records = load_version_records(LocalStore(tmp_path / "store"), first.version)
    assert {record.captured_at for record in records} == {"2024-05-01T10:00:00+00:00"}
    assert sorted(record.origins[0] for record in records) == [f"sidecar:{number}.png" for number in range(1, 9)]
    add(tmp_path, 91, '{"label": "cat"}')
    second = run(template, tmp_path)
    assert (second.num_seen, second.num_added, second.version.version) == (1, 1, 2)
