"""Video files as a source: the real decoder in its own process."""

import contextlib
import os
from pathlib import Path

import pytest

from source_runs import read_video
from videos import BLUE, GREEN, RED, Film, write_video
from visionloop.data.parts import load_version_records
from visionloop.errors import ImageError, SourceError
from visionloop.ingest.pull import pull
from visionloop.ingest.sources import SourceContext, read_source
from visionloop.ingest.video import clip as clip_module
from visionloop.ingest.video.clip import Spool
from visionloop.params import VideoSource, make_params
from visionloop.settings import load_settings
from visionloop.store import LocalStore
from visionloop.video import player as player_module
from visionloop.video.player import End, Frame, Player
from visionloop.video.sample import DecodeJob
from visionloop.workspace import connect

MB = 1_000_000


def test_a_folder_of_videos_becomes_a_version(tmp_path: Path) -> None:
    home = tmp_path / "ws"
    home.mkdir()
    (home / "params.yaml").write_text("name: pets\n")
    colors = [(30 * i, 255 - 30 * i, 120) for i in range(8)]
    write_video(home / "clips/cat/a.mp4", Film(colors, size_hw=(64, 64)), created="2026-01-01T12:00:00Z")
    write_video(home / "clips/dog/b.mkv", Film([(r, g, 20) for r, g, _ in colors], size_hw=(64, 64)))
    settings, store = load_settings({}, home), LocalStore(tmp_path / "store")
    params = make_params({"name": "pets", "ingest": {"sources": [{"kind": "video", "path": "clips"}]}})

    report = pull(
        connect(settings, params, store=store), sources=params.ingest.sources, now="2026-01-01T00:00:00+00:00"
    )

    records = load_version_records(store, report.version)
    assert (len(records), report.rejected) == (16, ())
    for group in ("video:cat/a.mp4", "video:dog/b.mkv"):
        assert len({r.side for r in records if r.group == group}) == 1
    cat = [r for r in records if r.labels == ("cat",)]
    assert sorted(r.captured_at or "" for r in cat)[1] == "2026-01-01T12:00:01.000+00:00"
    assert sorted(r.origins[0] for r in cat)[7] == "video:cat/a.mp4#t=7.000"
    assert {(r.width, r.height, r.format) for r in records} == {(64, 64, "JPEG")}


def test_an_unchanged_video_is_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "v/cat/a.mp4")
    write_video(tmp_path / "v/cat/b.mp4")
    (tmp_path / "v/cat/broken.mp4").write_bytes(b"nonsense")
    first, rejected, _ = read_video(tmp_path, path="v")
    jobs: list[DecodeJob] = []
    play = Player.play
    monkeypatch.setattr(Player, "play", lambda self, job: jobs.append(job) or play(self, job))

    again, rejected_again, _ = read_video(tmp_path, path="v")
    known = [(i.origin, i.stamp, i.labels, i.group, i.captured_at) for i in first]
    assert [(i.origin, i.stamp, i.labels, i.group, i.captured_at) for i in again] == known
    assert rejected_again == rejected
    assert [r.code for r in rejected] == ["not_a_video"]
    assert jobs == []

    # Asked for all the same, a frame is decoded, and those after it are there at once.
    assert again[1].read(MB) == first[1].read(MB)
    assert again[2].read(MB) == first[2].read(MB)
    assert len(jobs) == 1
    with pytest.raises(ImageError, match="is too large"):
        again[0].read(10)

    jobs.clear()
    write_video(path, Film([GREEN]))
    changed, _, _ = read_video(tmp_path, path="v")
    assert [Path(job.file or "").name for job in jobs] == ["a.mp4"]
    assert [i.origin for i in changed if "a.mp4" in i.origin] == ["cam:cat/a.mp4#t=0.000"]
    assert changed[0].stamp != first[0].stamp
    with pytest.raises(ImageError, match="has changed"):
        again[1].read(MB)
    # Other wishes find other frames, but the same frame keeps its stamp.
    closer, _, _ = read_video(tmp_path, path="v", every_s=0.5)
    stamps = {i.origin: i.stamp for i in changed}
    assert {o: s for o, s in ((i.origin, i.stamp) for i in closer) if o in stamps} == stamps
    assert len(list((tmp_path / ".visionloop/ingest/video/index-cam").iterdir())) == 3


def test_a_full_spool_costs_time_and_no_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v/cat/a.mp4", Film([RED, GREEN, BLUE] * 2))
    whole = [item.read(MB) for item in read_video(tmp_path, path="v")[0]]
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(Spool.__init__, "__defaults__", (2 * len(whole[0]),))
    items, _, _ = read_video(tmp_path / "other", path=str(tmp_path / "v"))
    left = list((tmp_path / "other/.visionloop/ingest/video/spool" / str(os.getpid())).iterdir())
    assert len(left) <= 2
    assert [item.read(MB) for item in items] == whole
    assert len(whole) == 6


def test_splits_labels_and_tables(tmp_path: Path) -> None:
    for name in ("train/cat/a.mp4", "train/dog/b.mp4", "test/cat/c.mp4"):
        write_video(tmp_path / "split" / name, Film([RED]))
    items, _, _ = read_video(tmp_path, path="split")
    assert [(i.labels, i.side, i.test_is_given) for i in items] == [
        (("cat",), "test", False),
        (("cat",), None, True),
        (("dog",), None, True),
    ]
    write_video(tmp_path / "flat/a.mp4", Film([RED, GREEN, BLUE]))
    items, _, told = read_video(tmp_path, path="flat")
    assert {i.labels for i in items} == {()}
    assert "1 videos come in for prediction only" in told[0]
    items, _, _ = read_video(tmp_path, path="flat/a.mp4", label="cat")
    assert [(i.origin, i.labels) for i in items][:1] == [("cam:a.mp4#t=0.000", ("cat",))]

    write_video(tmp_path / "flat/unnamed.mp4", Film([RED]))
    (tmp_path / "t.csv").write_text(
        "video,label,start,end,time\na.mp4,cat,0.5,1.2,2026-03-01T08:00:00Z\na.mp4,dog,2.0,,\nnone.mp4,cat,0,1,\n"
    )
    items, rejected, _ = read_video(tmp_path, path="flat", table="t.csv")
    assert [(i.origin, i.labels, i.group, i.captured_at) for i in items] == [
        ("cam:a.mp4#t=0.500", ("cat",), "cam:a.mp4", "2026-03-01T08:00:00.000+00:00"),
        ("cam:a.mp4#t=2.000", ("dog",), "cam:a.mp4", None),
    ]
    assert {(r.origin, r.code) for r in rejected} == {
        ("cam:t.csv row 3", "row_without_image"),
        ("cam:unnamed.mp4", "image_without_row"),
    }


@pytest.mark.parametrize("path", ["no", "empty", "pipe.mp4"])
def test_a_source_without_a_video_is_an_error(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(SourceError, match=r"source cam .*(does not exist|holds no video|is no file and no folder)"):
        read_video(tmp_path, path=path)


def test_a_decoder_that_dies_or_hangs_costs_one_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is replaced by one that dies at a file's name, hangs at another's, and babbles at a third's."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "from visionloop.video.worker import write_message\n"
        "for line in sys.stdin:\n"
        "    name = os.path.basename(json.loads(line)['file'])\n"
        "    if 'dies' in name: os.abort()\n"
        "    if 'hangs' in name: time.sleep(60)\n"
        "    if 'babbles' in name: sys.stdout.buffer.write(b'\\xff' * 100); sys.stdout.flush(); time.sleep(60)\n"
        "    if 'lies' in name: write_message(sys.stdout.buffer, {'kind': 'frame', 't_ms': 'x'}, b'')\n"
        "    write_message(sys.stdout.buffer, {'kind': 'frame', 't_ms': 0, 'clock': None}, b'jpeg')\n"
        "    end = {'kind': 'end', 'code': None, 'text': None, 'told': [], 'end_s': 0}\n"
        "    write_message(sys.stdout.buffer, end, b'')\n"
    )
    real = player_module.subprocess.Popen
    monkeypatch.setattr(
        player_module.subprocess, "Popen", lambda argv, **keys: real([argv[0], str(script)], **{**keys, "cwd": None})
    )
    monkeypatch.setattr(player_module, "SILENCE_S", 1.0)
    for name in ("a", "b-dies", "c-hangs", "d-babbles", "e-lies", "f"):
        (tmp_path / "v").mkdir(exist_ok=True)
        (tmp_path / "v" / f"{name}.mp4").write_bytes(b"x")
    items, rejected, _ = read_video(tmp_path, path="v", label="cat")
    assert [i.origin for i in items] == ["cam:a.mp4#t=0.000", "cam:f.mp4#t=0.000"]
    assert [(r.origin, r.code) for r in rejected] == [
        ("cam:b-dies.mp4", "crashed"),
        ("cam:c-hangs.mp4", "too_slow"),
        ("cam:d-babbles.mp4", "crashed"),
        ("cam:e-lies.mp4", "crashed"),
    ]
    # Another day they may go well: not remembered.
    assert len(list((tmp_path / ".visionloop/ingest/video/index-cam").iterdir())) == 2


def test_the_worker_may_write_no_file_and_ends_with_its_parent(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    job = DecodeJob(1.0, None, [(0.0, None)], 10, 100.0, MB, file=str(path))
    with Player() as player:
        answers = list(player.play(job))
        assert [a.t_ms for a in answers if isinstance(a, Frame)] == [0, 1000, 2000]
        process = player._process
        assert process and process.stdin
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max file size")] == [["0", "0"]]
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert b"AWS" not in environment
        assert b"PYTEST" not in environment
        process.stdin.close()  # as when its parent is gone
        assert process.wait(timeout=60) == 0


def test_a_pull_that_is_left_in_the_middle_leaves_no_worker(tmp_path: Path) -> None:
    write_video(tmp_path / "v/cat/a.mp4", Film([RED, GREEN] * 20))
    source = VideoSource(kind="video", path="v", name="cam")
    offered = iter(read_source(source, SourceContext(tmp_path, tmp_path / ".visionloop", {})))
    next(offered)
    offered.close()  # type: ignore[attr-defined]
    assert not [p for p in _children() if b"visionloop.video.worker" in p]
    assert not (tmp_path / ".visionloop/ingest/video/index-cam").exists()  # half of it is not the whole


def _children() -> list[bytes]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if entry.name.isdecimal() and (entry / "stat").read_text().rsplit(")")[-1].split()[1] == str(os.getpid()):
                found.append((entry / "cmdline").read_bytes())
    return found


def test_an_end_says_why(tmp_path: Path) -> None:
    with Player() as player:
        job = DecodeJob(1.0, None, [(0.0, None)], 10, 100.0, MB, file=str(tmp_path / "gone.mp4"))
        assert list(player.play(job)) == [End("not_a_video", "is not a video we read (No such file or directory)")]
    assert clip_module.make_stamp(tmp_path / "gone.mp4") is None


def test_folders_of_films_that_can_be_read_in_two_ways_are_asked_about(tmp_path: Path) -> None:
    for name in ("cat", "dog", "test"):
        write_video(tmp_path / f"v/{name}/a.mp4", Film([RED], size_hw=(64, 64)))
    with pytest.raises(SourceError, match=r"test/ may be a class beside cat, dog"):
        read_video(tmp_path, path="v")
    as_class, _, _ = read_video(tmp_path, path="v", pattern="{label}/")
    assert {item.labels for item in as_class} == {("cat",), ("dog",), ("test",)}
    without, _, _ = read_video(tmp_path, path="v", unlabelled=["test"])
    assert {item.labels for item in without} == {("cat",), ("dog",), ()}
