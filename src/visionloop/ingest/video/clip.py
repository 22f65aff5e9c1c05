"""One video file: its frames, found by decoding, in later pulls from an index in the workspace's hidden folder.

What is decoded waits in the spool until it is read. A frame that is not there (the index knew it, or the spool was
full) is decoded on demand, with all that follow it.
"""

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from visionloop.errors import ImageError
from visionloop.records import canonical_json
from visionloop.video.player import End, Frame, Player, Start
from visionloop.video.sample import DecodeJob

MAX_BYTES = 4_000_000_000
# Raised by one when the same video would give other frames: the index is then made again.
DECODING = 1


class Spool:
    """A folder of frames that were decoded and not read yet. Safe for threads."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._folder = folder / str(os.getpid())
        self._max_bytes, self._num_bytes, self._count = max_bytes, 0, 0
        self._lock = threading.Lock()
        _sweep(folder)

    def put(self, data: bytes) -> Path | None:
        """Keep a frame and return where; None when there is no room."""
        with self._lock:
            if self._num_bytes + len(data) > self._max_bytes:
                return None
            path = self._name(".jpg")
            self._num_bytes += len(data)
        path.write_bytes(data)
        return path

    def reserve(self, suffix: str) -> Path:
        """Return a path for a file that lasts as long as this process."""
        with self._lock:
            return self._name(suffix)

    def _name(self, suffix: str) -> Path:
        if not self._count:
            self._folder.mkdir(parents=True, exist_ok=True)
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        self._count += 1
        return self._folder / f"{id(self):x}-{self._count}{suffix}"

    def take(self, path: Path) -> bytes:
        """Return a frame and forget it."""
        data = path.read_bytes()
        path.unlink()
        with self._lock:
            self._num_bytes -= len(data)
        return data


def _sweep(folder: Path) -> None:
    """Remove what processes left that are gone."""
    if not folder.is_dir():
        return
    for left in folder.iterdir():
        if left.name.isdecimal() and not _is_alive(int(left.name)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        return True
    return False


@dataclass
class Contents:
    """What decoding a video gave: times of its frames, when it was recorded, and how it ended."""

    times_ms: list[int] = field(default_factory=list)
    created: str | None = None
    code: str | None = None
    text: str | None = None
    told: list[str] = field(default_factory=list)


@dataclass
class Clip:
    """A video file as it was found: `stamp` is its size, mtime and inode then."""

    where: str
    path: Path
    stamp: str
    job: DecodeJob
    spool: Spool
    contents: Contents = field(default_factory=Contents)
    _spooled: dict[int, Path] = field(default_factory=dict)
    _taken: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def find_frames(self, player: Player) -> Iterator[int]:
        """Decode the video; yield the time of each frame in ms as soon as `read` can have it."""
        for answer in player.play(self.job):
            if isinstance(answer, Start):
                self.contents.created = answer.created
            elif isinstance(answer, Frame):
                self._keep(answer)
                self.contents.times_ms.append(answer.t_ms)
                yield answer.t_ms
            else:
                self._note_end(answer)

    def read(self, t_ms: int, max_bytes: int) -> bytes:
        """Return a frame. Raises ImageError: `unreadable` when the video no longer has it, or `too_large`."""
        with self._lock:
            data = self._take(t_ms)
            if data is None:
                data = self._decode_again(t_ms)
            self._taken.add(t_ms)
        if len(data) > max_bytes:
            raise ImageError(self.where, "is too large", f"at most {max_bytes} bytes", reason_code="too_large")
        return data

    def _keep(self, frame: Frame) -> None:
        if path := self.spool.put(frame.jpeg):
            self._spooled[frame.t_ms] = path

    def _take(self, t_ms: int) -> bytes | None:
        path = self._spooled.pop(t_ms, None)
        with contextlib.suppress(OSError):
            return self.spool.take(path) if path else None
        return None

    def _decode_again(self, t_ms: int) -> bytes:
        """Return a frame by decoding; what was not read yet goes to the spool, as far as there is room."""
        found = None
        if make_stamp(self.path) == self.stamp:
            with Player() as player:
                for answer in player.play(self.job):
                    if isinstance(answer, Frame) and answer.t_ms == t_ms:
                        found = answer.jpeg
                    elif isinstance(answer, Frame) and answer.t_ms not in self._taken | self._spooled.keys():
                        self._keep(answer)
        if found is None:
            expected = "the video as it was when the pull began"
            raise ImageError(self.where, "has changed", expected, "Run it again.", reason_code="unreadable")
        return found

    def _note_end(self, end: End) -> None:
        self.contents.code, self.contents.text, self.contents.told = end.code, end.text, list(end.told)


class Index:
    """Remembers the contents of videos, a file each, in `folder`. What cannot be read or written is not remembered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._used: set[str] = set()

    def load(self, clip: Clip) -> Contents | None:
        """Return what decoding an unchanged video with the same settings gave; None when that is not known."""
        try:
            value = json.loads(self._path(clip).read_bytes())
            if value.pop("key") != _make_key(clip):
                return None
            return Contents(**value)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def save(self, clip: Clip) -> None:
        """Remember the contents of a video that was decoded to its end."""
        path = self._path(clip)
        staged = path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(canonical_json({"key": _make_key(clip), **asdict(clip.contents)}))
            staged.replace(path)

    def forget_others(self) -> None:
        """Remove what was not asked for: videos that are gone."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name not in self._used:
                    path.unlink(missing_ok=True)

    def _path(self, clip: Clip) -> Path:
        name = hashlib.sha256(os.fsencode(clip.where)).hexdigest()[:32] + ".json"
        self._used.add(name)
        return self._folder / name


def make_stamp(path: Path) -> str | None:
    """Return what changes when a file does: size, mtime and inode."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return f"{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}"


def _make_key(clip: Clip) -> dict[str, Any]:
    wishes = {key: value for key, value in asdict(clip.job).items() if key not in ("file", "pipe", "url", "by_arrival")}
    key: dict[str, Any] = json.loads(json.dumps({"stamp": clip.stamp, "decoding": DECODING, **wishes}))
    return key
