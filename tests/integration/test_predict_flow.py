"""The flow `predict` on a real champion: each image once, into a table for each run. Prefect is stood in for."""

import importlib
import json
import os
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fakes import make_image
from mjpeg_camera import PATH, Camera, film
from shapes import ROOT
from videos import write_video
from visionloop.errors import ParamsError, SourceError
from visionloop.params import Predict
from visionloop.params.loop import Webhook
from visionloop.predict.connection import WatchPlan
from visionloop.predict.files import find_new
from visionloop.predict.lines import Outbox
from visionloop.workspace import Workspace, connect
from watched import make_watched


class Told:
    """The flow, and what it has told Prefect."""

    def __init__(self, place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(ROOT / "flows"))
        self.module = importlib.import_module("predict")
        self.place, self.lines, self.pages = place, list[str](), list[tuple[str, str]]()
        monkeypatch.setattr(self.module, "open_workspace", lambda home: self.place)
        monkeypatch.setattr(self.module.steps, "say", self.lines.append)
        monkeypatch.setattr(self.module.steps, "run_step", lambda name, work: work())
        monkeypatch.setattr(self.module.told, "create_markdown_artifact", self.keep)

    def keep(self, text: str, *, key: str, description: str) -> None:
        self.pages.append((key, text))

    def set(self, *paths: str, **section: Any) -> None:
        predict = Predict(paths=paths, **section)
        params = self.place.params.model_copy(update={"predict": predict})
        self.place = connect(self.place.settings, params, store=self.place.store, tracking=self.place.tracking)

    def run(self) -> tuple[str, str]:
        state = self.module.predict.fn("/anywhere")
        return state.name, state.message


def read(table: Path) -> list[tuple[str, bool]]:
    """The images of a table, and whether each has an answer."""
    return [(Path(row["path"]).name, row["error"] is None) for row in pq.read_table(table).to_pylist()]


def test_each_image_is_answered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(make_watched(tmp_path).place, monkeypatch)
    home = told.place.settings.home
    with pytest.raises(
        ParamsError, match=r"params.yaml predict.paths: names none; expected images, videos, folders, globs or streams"
    ):
        told.run()
    told.set("inbox", str(tmp_path / "cameras" / "*.png"), out="answers")
    with pytest.raises(SourceError, match="inbox: does not exist"):
        told.run()
    inbox, answers = home / "inbox", home / "answers"
    inbox.mkdir()
    assert told.run() == ("NothingNew", f"no new file in inbox, {tmp_path}/cameras/*.png")
    assert not answers.exists()

    (inbox / "a.png").write_bytes(make_image(1))
    (inbox / "`b`\n.png").write_bytes(make_image(2))
    (inbox / "half.png").write_bytes(make_image(3)[:200])
    assert told.run() == ("Answered", f"3 rows, 1 of them with the reason in {answers / '000001.parquet'}")
    assert [(name[:2], is_good) for name, is_good in read(answers / "000001.parquet")] == [
        ("`b", True),
        ("a.", True),
        ("ha", False),
    ]
    assert told.run()[0] == "NothingNew"

    time.sleep(0.01)
    (inbox / "half.png").write_bytes(make_image(3))
    (tmp_path / "cameras").mkdir()
    (tmp_path / "cameras" / "c.png").write_bytes(make_image(4))
    for late in (inbox / "half.png", tmp_path / "cameras" / "c.png"):
        os.utime(late, (1, 1))  # copied with the time of long ago
    assert told.run()[0] == "Answered"
    assert read(answers / "000002.parquet") == [("half.png", True), ("c.png", True)]
    assert told.run()[0] == "NothingNew"
    assert all(text.count("`") == 6 for _, text in told.pages), "a name of a file ends no block"

    (answers / "000002.parquet").write_text("no table")
    with pytest.raises(SourceError, match=r"000002.parquet: is damaged; expected a table of answers. Remove it"):
        told.run()
    (answers / "000002.parquet").unlink()
    assert told.run()[0] == "Answered"
    assert read(answers / "000002.parquet") == [("half.png", True), ("c.png", True)]


def test_a_run_that_was_stopped_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(make_watched(tmp_path).place, monkeypatch)
    told.set("inbox")
    inbox = told.place.settings.home / "inbox"
    inbox.mkdir()
    for number in range(3):
        (inbox / f"{number}.png").write_bytes(make_image(number))
    monkeypatch.setattr("visionloop.predict.chunks.CHUNK_IMAGES", 2)
    write = told.module.Table.write

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(told.module.Table, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        told.run()
    monkeypatch.setattr(told.module.Table, "write", write)
    assert told.run()[0] == "Answered"
    assert "3 of 3 were answered by a run that stopped" in told.lines
    assert [name for name, _ in read(told.place.settings.home / "predictions" / "000001.parquet")] == [
        "0.png",
        "1.png",
        "2.png",
    ]


def test_a_table_of_another_run_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends just after this one has looked what is new has taken its name."""
    told = Told(make_watched(tmp_path).place, monkeypatch)
    told.set("inbox")
    inbox, table = (told.place.settings.home / name for name in ("inbox", "predictions/000001.parquet"))
    inbox.mkdir()
    (inbox / "a.png").write_bytes(make_image(1))

    def be_late(*args: Any) -> Any:
        found = find_new(*args)
        table.parent.mkdir()
        table.write_text("of another one")
        return found

    monkeypatch.setattr(told.module, "find_new", be_late)
    name, message = told.run()
    assert (name, "was written just now by another run" in message) == ("Skipped", True)
    assert table.read_text() == "of another one"


def test_a_file_that_changes_while_it_is_answered_is_answered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera that is still writing: half an image, and the whole one before the table is there."""
    told = Told(make_watched(tmp_path).place, monkeypatch)
    told.set("inbox")
    inbox, write = told.place.settings.home / "inbox", told.module.Table.write
    inbox.mkdir()
    (inbox / "a.png").write_bytes(make_image(1)[:200])

    def change_first(*args: Any) -> None:
        (inbox / "a.png").write_bytes(make_image(1))
        write(*args)

    monkeypatch.setattr(told.module.Table, "write", change_first)
    assert told.run()[0] == "Answered"
    monkeypatch.setattr(told.module.Table, "write", write)
    assert told.run()[0] == "Answered"
    assert read(told.place.settings.home / "predictions" / "000002.parquet") == [("a.png", True)]
    assert told.run()[0] == "NothingNew"


def test_a_file_that_is_gone_again_is_not_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(make_image(1))
    (tmp_path / "b.png").write_bytes(make_image(2))
    found = find_new([str(tmp_path)], tmp_path / "none")
    assert ([one.name for one in found[0]], found[1].name) == (["a.png", "b.png"], "000001.parquet")
    monkeypatch.setattr("visionloop.predict.files.find_images", lambda paths, may_be_none: [tmp_path / "gone.png"])
    assert find_new([str(tmp_path)], tmp_path / "none")[0] == []


def test_videos_wait_where_nothing_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(make_watched(tmp_path).place, monkeypatch)
    told.set("inbox")
    inbox, out = (told.place.settings.home / name for name in ("inbox", "predictions"))
    write_video(inbox / "a.mp4")
    (inbox / "b.png").write_bytes(make_image(1))
    with monkeypatch.context() as away:
        away.setattr("importlib.util.find_spec", lambda name: None if name == "av" else find_spec(name))
        assert told.run()[0] == "Answered"
    assert read(out / "000001.parquet") == [("b.png", True)]
    assert any(line.startswith("1 video waits: av is not installed. Run `") for line in told.lines)
    assert told.run()[0] == "Answered"
    assert read(out / "000002.parquet") == [("a.mp4", True)]


def test_videos_are_new_files_too_and_cameras_are_watched_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISIONLOOP_PRIVATE_HOSTS", "127.0.0.1")
    told = Told(make_watched(tmp_path).place, monkeypatch)
    monkeypatch.setattr(told.module, "WatchPlan", partial(WatchPlan, frames=20))
    inbox, out = (told.place.settings.home / name for name in ("inbox", "predictions"))
    write_video(inbox / "a.mp4")
    with film(Camera()) as site:
        away = "http://127.0.0.1:1/live"
        told.set("inbox", streams=(f"{site.url}{PATH}", away), seconds=120.0, every_s=0.05, smooth_s=0.2)
        assert told.run()[0] == "Answered"
        assert read(out / "000001.parquet") == [("a.mp4", True)]
        lines = [json.loads(line) for line in (out / "streams.jsonl").read_text().splitlines()]
        ends = [one for one in lines if one["kind"] == "end"]
        assert {one["source"]: one["frames"] > 0 for one in ends} == {f"{site.url}{PATH}": True, away: False}
        (change, *_) = [one for one in lines if one["kind"] == "change"]
        assert change["source"] == f"{site.url}{PATH}"
        assert any(f"{away}: the connection failed" in line for line in told.lines)
        hook = Webhook(url="http://127.0.0.1:1/hook", tries=1)
        (inbox / "b.png").write_bytes(make_image(1))
        told.set("inbox", streams=(f"{site.url}{PATH}", away), seconds=120.0, every_s=0.05, webhook=hook)
        hidden_dir = told.place.settings.hidden_dir
        by_hand = Outbox.open(hidden_dir, away, hook, {})
        assert told.run()[0] == "Answered"
        by_hand.close()
        assert any(f"{away}: another process watches it" in line for line in told.lines)
        told.set(streams=(away,), seconds=1.0)
        with pytest.raises(SourceError, match="the connection failed"):
            told.run()
