"""`visionloop store` on a local store, and what it says of an address that is none."""

from pathlib import Path

import pytest

from fakes import run_here
from visionloop.store.setup import Fact


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_local_store_is_described_and_made(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "elsewhere" / "store"
    monkeypatch.setenv("VISIONLOOP_STORE", str(folder))
    assert run_here(monkeypatch, "store") == 0
    assert capsys.readouterr().out == (
        f"ok  store                {folder.as_uri()} (a folder that is made when it is needed)\n"
        "next: `visionloop doctor` looks at all the rest\n"
    )
    assert not folder.exists()
    assert run_here(monkeypatch, "store", "init") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ok  folder               {folder} made",
        "to keep DVC's cache there too:",
        f"  dvc remote add --default store {folder / 'dvc'}",
        "next: `visionloop ingest PHOTOS`",
    ]
    assert folder.is_dir()
    assert run_here(monkeypatch, "store") == 0
    assert capsys.readouterr().out.startswith(f"ok  store                {folder.as_uri()} (a folder)\nnext: ")


def test_what_a_store_cannot_do_is_not_promised(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`store init` set all that it could, and the next line still said that it sets what is missing."""
    facts = [Fact("public access", "cannot be read or set here (NotImplemented)", ok=False)]
    monkeypatch.setattr("visionloop.store.setup.describe_store", lambda store: iter(facts))
    assert run_here(monkeypatch, "store") == 0
    assert capsys.readouterr().out.splitlines() == [
        "--  public access        cannot be read or set here (NotImplemented)",
        "next: `visionloop store init` sets what is missing, as far as this store can",
    ]


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("s3://Pets/a", "error: VISIONLOOP_STORE: got 's3://Pets/a'; expected s3://bucket/prefix: the bucket of 3"),
        ("ftp://pets", "error: VISIONLOOP_STORE: got 'ftp://pets'; expected file:///folder, a path, or s3://bucket"),
    ],
)
def test_an_address_that_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, line: str
) -> None:
    monkeypatch.setenv("VISIONLOOP_STORE", url)
    assert run_here(monkeypatch, "store", "init") == 2
    assert capsys.readouterr().err.startswith(line)
