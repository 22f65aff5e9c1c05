"""What `datasets export` wrote, taken in again: the labels and sides that it was made from, from a folder and a zip."""

import shutil
from pathlib import Path

import pytest

from fakes import write_photos
from source_runs import Run, type_advice
from visionloop.data.export import FORMATS, export_version
from visionloop.data.parts import load_version_records
from visionloop.ingest.pull import pull
from visionloop.ingest.sources import SourceContext
from visionloop.ingest.sources.guess import guess_source
from visionloop.params import FolderSource, make_params
from visionloop.settings import Settings
from visionloop.store import LocalStore
from visionloop.workspace import connect
from workspaces import NOW

LABELS = ("test", "NA", "café", "train set", "con", "100%", "猫", "a_b")


@pytest.fixture
def exported(settings: Settings, store: LocalStore, tmp_path: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    """Export a version in each form; return label and side of each image by its sha256."""
    write_photos(tmp_path / "photos", 6, classes=LABELS)
    write_photos(tmp_path / "photos", 1, first=900, classes=("unlabelled",))
    source = FolderSource(
        kind="folder", path=str(tmp_path / "photos"), name="photos", pattern="{label}/", unlabelled=("unlabelled",)
    )
    report = pull(connect(settings, make_params({"name": "pets"}), store=store), sources=[source], now=NOW)
    records = load_version_records(store, report.version)
    for form in FORMATS:
        export_version(store, report.version, records, tmp_path / form, form=form)
    return {record.sha256[:16]: (record.labels, record.side) for record in records}


@pytest.mark.parametrize("form", ["folder", "zip", "zip of the folder"])
def test_an_export_gives_the_labels_and_sides_it_was_made_from(
    tmp_path: Path, exported: dict[str, tuple[tuple[str, ...], str]], form: str
) -> None:
    place = tmp_path / "folders"
    if form != "folder":
        inside = {"root_dir": place} if form == "zip" else {"root_dir": tmp_path, "base_dir": "folders"}
        place = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", **inside))
    run = Run()
    run.take(guess_source(str(place)), SourceContext(tmp_path, tmp_path, {}, tell=run.told.append))
    assert run.error is None
    found = {item.origin.rsplit("/", 1)[1][:16]: (item.labels, item.side) for item in run.items}
    sides = {sha: labels_side if labels_side[0] else ((), None) for sha, labels_side in exported.items()}
    assert found == sides
    assert {labels for labels, _ in found.values()} == {(), *((label,) for label in LABELS)}
    assert run.rejected == []


def test_the_advice_for_an_export_of_shards_is_typed_and_gives_what_it_was_made_from(
    tmp_path: Path, exported: dict[str, tuple[tuple[str, ...], str]]
) -> None:
    run = type_advice(tmp_path, tmp_path / "webdataset")
    assert run.error is None
    found = {item.origin.rsplit("/", 1)[1][:16]: (item.labels, item.side) for item in run.items}
    assert found == {sha: (labels, side if labels else None) for sha, (labels, side) in exported.items()}
    assert run.rejected == []
