"""Checkpoints: whole or absent, found by digest, the one before a damaged one, only what is needed is kept."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from visionloop.errors import TrainingError
from visionloop.training import checkpoints
from visionloop.training.checkpoints import (
    CheckpointFiles,
    SavedEpoch,
    find_checkpoint,
    get_best,
    list_checkpoints,
    load_checkpoint,
    load_saved,
    parse_name,
    write_checkpoint,
)
from visionloop.training.watch import EpochReport


def make_reports(number: int) -> tuple[EpochReport, ...]:
    return tuple(
        EpochReport(
            epoch=epoch,
            max_epochs=9,
            metrics={"val/loss": 1.0 / epoch},
            images_per_s=10.0,
            seconds=1.0,
            monitor="val/loss",
            best=1.0,
            wait=0,
            patience=5,
            eta_s=1.0,
        )
        for epoch in range(1, number + 1)
    )


def make_saved(epoch: int, *, best: int | None = None, ended: str | None = None) -> SavedEpoch:
    return SavedEpoch(epoch, best or epoch, ended, make_reports(epoch))


def write(folder: Path, epoch: int, *, ended: str | None = None, **content: Any) -> SavedEpoch:
    content = content or {"state_dict": {"w": torch.full((4,), float(epoch))}, "epoch": epoch - 1}
    saved = make_saved(epoch, ended=ended)
    write_checkpoint(folder, content, saved)
    return saved


def get_path(folder: Path, epoch: int) -> Path:
    (path,) = folder.glob(f"epoch-{epoch:05d}-*.ckpt")
    return path


def list_epochs(folder: Path) -> list[int]:
    return [parse_name(path.name)[0] for path in list_checkpoints(folder)]


def test_what_is_written_is_found_with_its_history(tmp_path: Path) -> None:
    written = write(tmp_path / "checkpoints", 3, ended="early stopping")
    path = find_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    assert path.name == f"epoch-00003-{hashlib.sha256(path.read_bytes()).hexdigest()}.ckpt"
    found = load_saved(path)
    assert found == written
    assert found.best.metrics == {"val/loss": 1 / 3}
    assert [report.epoch for report in found.history] == [1, 2, 3]
    content = load_checkpoint(path)
    assert torch.equal(content["state_dict"]["w"], torch.full((4,), 3.0))
    assert os.listdir(tmp_path / "checkpoints") == [path.name]


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "checkpoints") is None


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        write(tmp_path, epoch)
    assert list_epochs(tmp_path) == [3, 2]


def test_a_checkpoint_has_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    weights = {epoch: {"w": torch.full((2,), float(epoch))} for epoch in range(1, 5)}
    files = CheckpointFiles(tmp_path)
    with files.closing():
        for epoch, best in ((1, 1), (2, 2), (3, 2)):
            files.save_checkpoint({"state_dict": weights[epoch]}, "", make_saved(epoch, best=best))
    third = load_checkpoint(get_path(tmp_path, 3))
    assert torch.equal(third["state_dict"]["w"], weights[3]["w"])
    assert torch.equal(get_best(third)["w"], weights[2]["w"])
    assert torch.equal(get_best(load_checkpoint(get_path(tmp_path, 2)))["w"], weights[2]["w"])
    again = CheckpointFiles(tmp_path)
    with again.closing():
        again.load_checkpoint(get_path(tmp_path, 3))
        again.save_checkpoint({"state_dict": weights[4]}, "", make_saved(4, best=2))
    assert torch.equal(get_best(load_checkpoint(get_path(tmp_path, 4)))["w"], weights[2]["w"]), "also after a resume"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_one_is_told_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 3)
    write(tmp_path, 4)
    path = get_path(tmp_path, 4)
    data = path.read_bytes()
    middle = len(data) // 2
    changed = {
        "cut": data[:-1],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
    }
    path.write_bytes(changed[damage])
    told: list[str] = []
    found = find_checkpoint(tmp_path, told.append)
    assert found == get_path(tmp_path, 3)
    assert told == ["the checkpoint of epoch 4 is damaged: the one before is used"]
    assert list_epochs(tmp_path) == [3], "a damaged one is not found again"
    assert find_checkpoint(tmp_path, told.append) == found
    assert len(told) == 1


def test_when_all_are_damaged_training_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, 1)
    get_path(tmp_path, 1).write_bytes(b"PK\x03\x04 cut off")
    told: list[str] = []
    assert find_checkpoint(tmp_path, told.append) is None
    assert told[-1] == "no checkpoint is whole: the training begins anew"


def test_what_a_kill_left_half_written_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".next.ckpt.999999999.new", "next.ckpt", "epoch-00002.ckpt", "epoch-00002-abc.ckpt"):
        (tmp_path / name).write_bytes(b"half")
    told: list[str] = []
    found = find_checkpoint(tmp_path, told.append)
    assert found == get_path(tmp_path, 1)
    assert told == [], "a kill while writing is no damage"
    write(tmp_path, 2)
    assert list_epochs(tmp_path) == [2, 1]
    assert not list(tmp_path.glob("*next*"))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    write(tmp_path, 1, state_dict=Hostile())
    for load in (load_checkpoint, load_saved):
        with pytest.raises(TrainingError, match=r"epoch-00001-\w{64}\.ckpt: cannot be read"):
            load(get_path(tmp_path, 1))
    assert not (tmp_path / "owned").exists()


class FullFile(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_in_the_middle_of_a_file_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "write_through", lambda path, write: write(FullFile()))
    with pytest.raises(TrainingError, match=r"epoch 1 in .*: cannot be written \(No space left on device\)"):
        write(tmp_path, 1)


def test_a_full_disk_is_one_line_and_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(TrainingError, match=r"cannot be written \(No space left on device\); .*goes on from the epoch"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path) == get_path(tmp_path, 1)
    assert list(tmp_path.glob("*.new")) == []
