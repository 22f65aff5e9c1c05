"""Checkpoints: whole or absent, found by digest, the one before a damaged one, only what is needed is kept."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from visionloop.errors import TrainingError
from visionloop.training.checkpoints import (
    Entry,
    find_checkpoint,
    list_entries,
    load_checkpoint,
    name_checkpoint,
    write_checkpoint,
)
from visionloop.training.watch import EpochReport


def make_reports(number: int) -> list[EpochReport]:
    return [
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
    ]


def write(folder: Path, epoch: int, *, best: int | None = None, ended: str | None = None, **content: Any) -> Entry:
    content = content or {"state_dict": {"w": torch.full((4,), float(epoch))}, "epoch": epoch - 1}
    return write_checkpoint(folder, content, history=make_reports(epoch), best_epoch=best or epoch, ended=ended)


def list_epochs(folder: Path) -> list[int]:
    return sorted(int(path.stem.partition("-")[2]) for path in folder.glob("*.ckpt"))


def test_what_is_written_is_found_with_its_history(tmp_path: Path) -> None:
    written = write(tmp_path / "checkpoints", 3, ended="early stopping")
    found = find_checkpoint(tmp_path / "checkpoints")
    assert found == written
    assert found is not None
    assert (found.epoch, found.best_epoch, found.ended) == (3, 3, "early stopping")
    assert found.best.metrics == {"val/loss": 1 / 3}
    assert [report.epoch for report in found.history] == [1, 2, 3]
    content = load_checkpoint(tmp_path / "checkpoints" / name_checkpoint(3))
    assert torch.equal(content["state_dict"]["w"], torch.full((4,), 3.0))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["epoch-0003.ckpt", "epoch-0003.json"]


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "checkpoints") is None


def test_the_last_two_and_the_best_of_each_are_kept(tmp_path: Path) -> None:
    for epoch, best in enumerate((1, 2, 2, 2, 5, 5), start=1):
        write(tmp_path, epoch, best=best)
    assert list_epochs(tmp_path) == [5, 6]
    for epoch in (7, 8):
        write(tmp_path, epoch, best=5)
    assert list_epochs(tmp_path) == [5, 7, 8]
    write(tmp_path, 9)
    assert list_epochs(tmp_path) == [5, 8, 9], "5 is the best as of 8, which is gone on with if 9 is damaged"


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_one_is_told_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 3)
    write(tmp_path, 4, best=3)
    path = tmp_path / name_checkpoint(4)
    data = path.read_bytes()
    middle = len(data) // 2
    changed = {
        "cut": data[:-1],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
    }
    path.unlink() if damage == "gone" else path.write_bytes(changed[damage])
    told: list[str] = []
    found = find_checkpoint(tmp_path, told.append)
    assert found is not None
    assert found.epoch == 3
    assert told == ["the checkpoint of epoch 4 is damaged: the one before is used"]
    assert list_epochs(tmp_path) == [3], "a damaged one is not found again"
    assert find_checkpoint(tmp_path, told.append) == found
    assert len(told) == 1


def test_one_whose_best_is_damaged_is_not_used(tmp_path: Path) -> None:
    for epoch, best in ((1, 1), (2, 1), (3, 1)):
        write(tmp_path, epoch, best=best)
    (tmp_path / name_checkpoint(1)).write_bytes(b"PK\x03\x04 cut off")
    told: list[str] = []
    assert find_checkpoint(tmp_path, told.append) is None, "else the best epoch of all could not be had at the end"
    assert told[0] == "the checkpoint of epoch 1, the best as of epoch 3, is damaged: the one before is used"
    assert told[-1] == "no checkpoint is whole: the training begins anew"


def test_a_file_without_its_entry_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2, best=1)
    (tmp_path / "epoch-0002.json").unlink()
    (tmp_path / "epoch-0003.ckpt.new").write_bytes(b"half")
    told: list[str] = []
    found = find_checkpoint(tmp_path, told.append)
    assert found is not None
    assert found.epoch == 1
    assert told == [], "a kill while writing is no damage"
    write(tmp_path, 2, best=1)
    assert sorted(os.listdir(tmp_path)) == [f"epoch-000{n}.{kind}" for n in (1, 2) for kind in ("ckpt", "json")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"epoch": 2}',
        '{"epoch":"x","best_epoch":1,"sha256":"","num_bytes":1,"ended":null,"history":[]}',
        "\x00" * 90,
        '{"epoch":2,"best_epoch":9,"sha256":"' + "0" * 64 + '","num_bytes":1,"ended":null,"history":[]}',
    ],
    ids=["empty", "list", "short", "types", "zeros", "epochs"],
)
def test_a_damaged_entry_is_passed_over(tmp_path: Path, text: str) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "epoch-0002.json").write_text(text)
    told: list[str] = []
    found = find_checkpoint(tmp_path, told.append)
    assert found is not None
    assert found.epoch == 1
    assert told == ["the checkpoint epoch-0002 is damaged: it is passed over"]


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    write(tmp_path, 1, state_dict=Hostile())
    with pytest.raises(TrainingError, match=r"epoch-0001\.ckpt: cannot be read"):
        load_checkpoint(tmp_path / name_checkpoint(1))
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_is_one_line_and_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(TrainingError, match=r"cannot be written \(No space left on device\); .*goes on from the epoch"):
        write(tmp_path, 2)
    monkeypatch.undo()
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.epoch == 1
    assert list(tmp_path.glob("*.new")) == []


def test_entries_are_read_from_newest_to_oldest_beyond_four_digits(tmp_path: Path) -> None:
    entry = write(tmp_path, 1)
    big = {**entry.to_json(), "epoch": 10_001, "history": [entry.to_json()["history"][0]] * 10_001}
    (tmp_path / "epoch-10001.json").write_text(json.dumps(big))
    assert [found.epoch for found in list_entries(tmp_path)] == [10_001, 1]
