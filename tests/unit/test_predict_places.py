"""Where batch prediction reads and writes: places that take nothing, folders that vanish, devices without frames."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from visionloop.errors import DiskError, SourceError
from visionloop.predict.connection import WatchPlan
from visionloop.predict.files import find_images
from visionloop.predict.lines import open_lines, write_line
from visionloop.predict.tables import Table


def test_a_place_that_takes_no_file_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*, dir: Path) -> None:
        assert dir == tmp_path
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    assert Table.plan(tmp_path / "x.csv", None) == Table(tmp_path / "x.csv", "csv")
    assert list(tmp_path.iterdir()) == [], "nothing is left"
    (tmp_path / "y.csv").mkdir()
    with pytest.raises(DiskError, match=r"--out .*y\.csv: cannot be written \(Is a directory\); expected a file"):
        Table.plan(tmp_path / "y.csv", None)
    monkeypatch.setattr("visionloop.workfolder.tempfile.TemporaryFile", fail)
    with pytest.raises(DiskError, match=r"--out .*x\.csv: cannot be written \(Read-only file system\)"):
        Table.plan(tmp_path / "x.csv", None)


def test_a_device_without_frames_is_not_asked_for_its_login() -> None:
    assert WatchPlan("/dev/null", {}).todo == "Name a camera: `ls /dev/video*` lists them."
    assert WatchPlan("rtsp://a/b", {}).todo == "Check the address and the login."


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_lines_on_a_full_disk_are_one_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(DiskError, match=r"--out .*x\.jsonl: cannot be written \(No space left on device\)"),
        open_lines(tmp_path / "x.jsonl") as file,
    ):
        write_line(file, {"kind": "end"})


def test_a_folder_that_vanishes_does_not_end_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    for name in ("a.png", "broken.jpg", "sub/b.png"):
        (photos / name).write_bytes(b"")
    (photos / "round").symlink_to(photos / "round")
    scandir, is_gone = os.scandir, [False]

    def vanish(folder: str) -> Any:
        if folder == str(photos / "sub") and not is_gone[0]:
            is_gone[0] = True
            shutil.rmtree(folder)
        return scandir(folder)

    monkeypatch.setattr("visionloop.ingest.paths.listing.os.scandir", vanish)
    assert find_images([str(photos)]) == [photos / "a.png", photos / "broken.jpg"]
    assert is_gone[0]


def test_paths_without_images(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist; expected an image, a folder or a glob"):
        find_images([str(tmp_path / "no.jpg")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no image there"):
        find_images([str(tmp_path / "empty")])
