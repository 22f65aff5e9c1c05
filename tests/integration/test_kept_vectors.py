"""What `similar` keeps of a large dataset: the same answers as without it, damage, a full disk, from Python."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fakes import run_here
from shapes import PARAMS, make_environment, make_workspace
from visionloop.api import open_workspace as open_tables
from visionloop.data.prepare import prepare
from visionloop.data.shards import load_prepared
from visionloop.errors import DatasetError, SettingsError
from visionloop.features import album
from visionloop.features.embed import embed
from visionloop.features.table import EmbeddingTable
from visionloop.params import load_params
from visionloop.settings import load_settings
from visionloop.store import open_store
from visionloop.workfolder import lock_work
from visionloop.workspace import Workspace, connect

FROZEN = PARAMS.replace("EPOCHS", "1").replace("max_epochs", "way: frozen, max_epochs")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of forty shapes, embedded with random weights."""
    home = make_workspace(tmp_path_factory.mktemp("kept") / "ws", number=20)
    (home / "params.yaml").write_text(FROZEN)
    for stage in (prepare, embed):
        stage(open_at(home))
    return home


def open_at(home: Path) -> Workspace:
    settings = load_settings({}, home)
    return connect(settings, load_params(settings.params_path), store=open_store(settings.store_url))


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True)
    home = tmp_path / "ws"
    for name, value in make_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(home)
    return home


def test_a_large_dataset_keeps_its_vectors_for_the_next_question(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same answers: without the file, the question that makes it, the next ones, after damage, from Python."""
    photo, path = sorted((home.parent / "photos" / "disc").iterdir())[0], home / ".visionloop" / "features" / "vectors"

    def ask(*more: str) -> Any:
        assert run_here(monkeypatch, "similar", str(photo), digits, "--k", "5", "--json", *more) == 0
        return json.loads(capsys.readouterr().out)["queries"]

    digits = load_prepared(home / "data" / "prepared").sha256_n[7][:12]
    plain = ask()
    assert not path.exists(), "of 40 images nothing is kept"
    monkeypatch.setattr(album, "KEPT_FROM", 30)
    assert run_here(monkeypatch, "similar", digits, "--out", "like.png") == 0
    assert f"kept for the next question: {path} (0 MB)" in capsys.readouterr().out
    with monkeypatch.context() as without_table:
        without_table.delattr(EmbeddingTable, "lookup")
        assert ask() == plain
    whole = path.read_bytes()
    for broken in (whole[:-5000], whole[:-200] + bytes(200), whole[:4100] + b"x" + whole[4101:]):
        path.write_bytes(broken)
        assert ask() == plain
        assert path.read_bytes() == whole, "it was made anew"
    rows = open_tables(home).similar([photo, digits], 5)
    assert rows.sha256.tolist() == [match["sha256"] for one in plain for match in one["matches"]]
    assert rows.columns.tolist() == ["image", "distance", "same", "sha256", "label", "side", "origin"]
    assert (rows.image[5], rows.same[0], rows.origin[0]) == (digits, True, f"photos:disc/{photo.name}")
    assert rows.distance.tolist() == pytest.approx([m["distance"] for one in plain for m in one["matches"]], abs=1e-6)
    assert len(open_tables(home).similar([])) == 0
    for wrong, words in (({"k": 0}, "got k = 0"), ({"encoder": "mine"}, "got 'mine'; expected one of auto, candidate")):
        with pytest.raises(SettingsError, match=words):
            open_tables(home).similar(photo, **wrong)


def test_a_question_is_answered_where_nothing_can_be_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits, folder = load_prepared(home / "data" / "prepared").sha256_n[7][:12], home / ".visionloop" / "features"
    monkeypatch.setattr(album, "KEPT_FROM", 30)
    full = type("Full", (), {"free": 1_000_000})
    monkeypatch.setattr(album.shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(album, "compute_num_bytes", lambda *shape: 3_000_000)
    assert run_here(monkeypatch, "similar", digits, "--out", "like.png") == 0
    assert "the vectors are not kept, so the next question will take as long: they need 3 MB, and 1 MB are free" in (
        capsys.readouterr().out
    )
    with lock_work(home / ".visionloop" / "work" / "similar", "another"):
        assert run_here(monkeypatch, "similar", digits, "--out", "like.png") == 0
    assert "the vectors" not in capsys.readouterr().out, "another process is keeping them"
    assert not folder.exists()


def test_a_row_of_prepared_data_is_read_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.data.rows.GROUP_ROWS", 16)
    prepare(open_at(home))
    prepared = load_prepared(home / "data" / "prepared")
    rows = range(len(prepared.sha256_n))
    whole = prepared.load_records(prepared.rows("train")) + prepared.load_records(prepared.rows("test"))
    assert {r.sha256: r for r in whole}.items() <= {r.sha256: r for r in map(prepared.read_record, rows)}.items()
    assert [prepared.read_record(row).sha256 for row in rows] == list(prepared.sha256_n)
    path = home / "data" / "prepared" / "manifest.parquet"
    data = path.read_bytes()
    for broken, words in ((None, "no manifest.parquet"), (data[:-50], "damaged"), (b"", "damaged")):
        path.unlink()
        if broken is not None:
            path.write_bytes(broken)
        with pytest.raises(DatasetError, match=words):
            prepared.read_record(3)
        path.write_bytes(data)
