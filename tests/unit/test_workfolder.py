"""Work folders: kept for the same inputs, dropped for others, one process at a time, whole results."""

import threading
from pathlib import Path

import pytest

from visionloop import workfolder
from visionloop.errors import BusyError


def test_same_key_goes_on_and_another_starts_anew(tmp_path: Path) -> None:
    with workfolder.lock_work(tmp_path / "train", "a" * 64) as work:
        (work / "done").write_text("1")
    with workfolder.lock_work(tmp_path / "train", "a" * 64) as work:
        assert (work / "done").read_text() == "1"
    with workfolder.lock_work(tmp_path / "train", "b" * 64) as work:
        assert list(work.iterdir()) == []
    assert not (tmp_path / "train" / ("a" * 16)).exists()


def test_second_process_is_told_who_is_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workfolder, "LOCK_WAIT_S", 0.1)
    with workfolder.lock_work(tmp_path / "train", "a"):
        caught: list[BaseException] = []

        def second() -> None:
            try:
                with workfolder.lock_work(tmp_path / "train", "a"):
                    pass
            except BusyError as exc:
                caught.append(exc)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert str(caught[0]).startswith("stage train: is running in another process")


def test_result_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "models" / "candidate"
    for text in ("old", "new"):
        work = tmp_path / "work"
        work.mkdir()
        (work / "model").write_text(text)
        (work / "shard.staged").write_text("cut off")
        workfolder.replace_folder(work, target)
        assert not work.exists()
    assert [(p.name, p.read_text()) for p in target.iterdir()] == [("model", "new")]
    assert [p.name for p in tmp_path.iterdir()] == ["models"]
