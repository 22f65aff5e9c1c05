"""A workspace, photos beside it, and what `visionloop ingest` says there, pull after pull."""

from pathlib import Path
from typing import Any

import pytest

from fakes import run_here
from visionloop.data.manifest import latest_version
from visionloop.data.parts import load_version_records
from visionloop.records import ImageRecord
from visionloop.store import LocalStore

PARAMS = "name: pets\nprepare:\n  image_size: 32\ningest:\n  max_rejected_ratio: {ratio}\n"


class PullDesk:
    """A workspace, photos beside it, and what `visionloop` says there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self.patch, self.capsys = folder / "ws", monkeypatch, capsys
        self.home.mkdir()
        self.photos = folder / "photos"
        self.what: tuple[Any, ...] = (self.photos, "--name", "photos")
        self.write()
        monkeypatch.chdir(self.home)

    def write(self, more: str = "", *, ratio: float = 0.3) -> None:
        (self.home / "params.yaml").write_text(PARAMS.format(ratio=ratio) + more)

    def run(self, *argv: Any, code: int = 0) -> str:
        assert run_here(self.patch, *map(str, argv)) == code
        told = self.capsys.readouterr()
        return told.err if code else told.out

    def pull(self, *more: str, code: int = 0) -> str:
        return self.run("ingest", *self.what, *more, code=code)

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.home / ".visionloop" / "store")

    def rows(self) -> dict[str, ImageRecord]:
        """The rows of the newest version, by the first place of each."""
        version = latest_version(self.store, "pets")
        assert version is not None
        return {row.origins[0]: row for row in load_version_records(self.store, version)}

    def labels(self) -> dict[str, str]:
        return {place.partition(":")[2]: ",".join(row.labels) for place, row in self.rows().items()}


def find_files(folder: Path, number: int) -> list[Path]:
    return sorted(folder.iterdir())[:number]


def move(files: list[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in files:
        path.rename(folder / f"moved-{path.name}")
