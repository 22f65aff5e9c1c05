"""The lines of a watched camera: for people, appended to a file as JSON, and its events on their way to a webhook.

An event is sent at least once, in order, also after a kill: it is a file in the outbox from the moment it is taken
until the webhook has answered 2xx. A thread sends them, so that a slow webhook holds no camera up. When so many wait
that the outbox is full, a new one is not taken, and counted.
"""

import contextlib
import fcntl
import json
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from visionloop.errors import BusyError, DiskError, SourceError
from visionloop.monitoring.alert import KEPT_FOR, Failure, post_alert
from visionloop.params.loop import Webhook
from visionloop.records import compute_digest, encode_line
from visionloop.workfolder import write_file

Line = dict[str, Any]  # see `live.py`


def format_time(seconds: float) -> str:
    """Return seconds since 1970 as a line has them: `2026-11-29T10:00:00.250Z`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe_line(line: Line) -> str:
    """Return a line of a camera for people, by the clock of this machine."""
    kind = line["kind"]
    at = f"{datetime.fromisoformat(line.get('since') or line.get('at') or line['time']).astimezone():%H:%M:%S}"
    if kind == "lost":
        return f"{at}  lost: {line['why']}; trying again"
    if kind == "back":
        return f"{at}  back after {format_length(line['after_s'])}"
    if kind == "waiting":
        why = ": it sends nothing" if line["bytes"] == 0 else ""
        return f"{at}  connected, no picture yet after {line['after_s']:.0f} s{why}"
    if kind == "end":
        return describe_end(line)
    said = _say(line["prediction"], line["abstained"])
    if kind == "frame":
        return f"{at}  {said} {line['confidence']:.0%}"
    before = line["before_s"]
    after = f" (after {format_length(before)} of {_say(line['before'], line['before_abstained'])})" if before else ""
    doubt = f": {line['abstained']}" if line["abstained"] else f" {line['confidence']:.0%}"
    return f"{at}  {said}{doubt}{after}"


def describe_end(line: Line) -> str:
    """Return what a watch came to."""
    frames, passed, lost = line["frames"], line["passed_over"], line["lost"]
    parts = [f"{frames:,} frame{'s' * (frames != 1)} in {format_length(line['duration_s'])}"]
    if passed:
        parts.append(f"{passed:,} passed over: an answer took {line['network_ms']:.0f} ms")
    parts += [f"{line['changes']:,} change{'s' * (line['changes'] != 1)}"]
    parts += [f"lost {lost:,} time{'s' * (lost != 1)}"] if lost else []
    seen = ", ".join(f"{name} {format_length(seconds)}" for name, seconds in list(line["seconds"].items())[:8])
    return f"{'; '.join(parts)}" + (f"; seen: {seen}" if seen else "")


def _say(prediction: str, abstained: str | None) -> str:
    return "don't know" if abstained else prediction or "no label"


@contextlib.contextmanager
def open_lines(path: Path) -> Iterator[IO[str]]:
    """Open a file that lines are appended to. Raises SourceError, DiskError."""
    if path.suffix.lower() != ".jsonl":
        raise SourceError("--out", f"got {path.name!r}", "a file that ends in .jsonl, as a stream has no last row")
    try:
        file = path.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise DiskError(
            f"--out {path}", f"cannot be written ({exc.strerror})", "a file in a folder that is there"
        ) from exc
    try:
        yield file
    finally:
        try:
            file.close()
        except OSError as exc:  # it tries once more to write the line that has failed
            raise _make_error(file, exc) from exc


def write_line(file: IO[str], line: Line) -> None:
    """Append a line, so that whoever follows the file has it at once. Raises DiskError."""
    try:
        file.write(encode_line(line) + "\n")
        file.flush()
    except OSError as exc:
        raise _make_error(file, exc) from exc


def _make_error(file: IO[str], exc: OSError) -> DiskError:
    return DiskError(f"--out {file.name}", f"cannot be written ({exc.strerror})", "free space", "Make room.")


def format_length(seconds: float) -> str:
    """Return a length of time for people: 12.3 s, 0:02:31."""
    return f"{seconds:.1f} s" if seconds < 59.95 else str(timedelta(seconds=round(seconds)))


EVENTS = ("change", "lost", "back")
MOST = 1000
AGAIN_S = 15.0  # after a webhook that did not answer, beyond its own tries
CLOSE_S = 10.0


class Outbox:
    """Take events and send them. What `close` leaves is sent when the same camera is watched again."""

    def __init__(
        self, folder: Path, source: str, webhook: Webhook, env: Mapping[str, str], *, most: int = MOST
    ) -> None:
        """Raises BusyError: another process sends this camera's events to this webhook."""
        self._webhook, self._env, self._most = webhook, env, most
        self.num_refused = self.num_not_taken = 0
        self.problem = ""
        self._folder = folder / compute_digest([source, webhook.url])[:16]
        self._lock = self._lock_folder(source)
        self._skipped: set[str] = set()  # those that the webhook does not want; the next run asks it again
        self._news, self._closing = threading.Event(), threading.Event()
        self._last = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="webhook")
        self._thread.start()

    @classmethod
    def open(cls, hidden_dir: Path, source: str, webhook: Webhook, env: Mapping[str, str]) -> "Outbox":
        """Open the one of a workspace. Raises BusyError."""
        return cls(hidden_dir / "predict" / "webhook", source, webhook, env)

    def tell(self, name: str, line: Line) -> None:
        """Take a line of a camera, if it is an event. Raises DiskError."""
        if line["kind"] in EVENTS:
            text = f"{name}: {line['source']}: {describe_line(line)}"
            self.put({"event": f"visionloop.predict.{line['kind']}", "name": name, "text": text, **line})

    def put(self, event: Mapping[str, Any]) -> bool:
        """Take an event; False: the outbox is full. Raises DiskError."""
        if len(self._list()) >= self._most:
            self.num_not_taken += 1
            return False
        self._last = max(self._last + 1, time.time_ns())
        name = f"{self._last:020d}.json"
        try:
            write_file(self._folder / name, json.dumps({"id": name[:-5], **event}, ensure_ascii=False).encode())
        except OSError as exc:
            raise DiskError(f"outbox {self._folder}", f"cannot be written ({exc.strerror})", "free space") from exc
        self._news.set()
        return True

    def close(self, limit_s: float = CLOSE_S) -> list[str]:
        """Send what waits, for so long at most; return what people should know, a line each."""
        self._closing.set()
        self._news.set()
        self._thread.join(limit_s)
        self._lock.close()
        num_waiting, told = len(self._list()), []
        if num_waiting:
            why = f" ({self.problem})" if self.problem else ""
            events = "1 event waits" if num_waiting == 1 else f"{num_waiting:,} events wait"
            told.append(f"{events} for the webhook{why}: watch this camera again, and what waits is sent")
        if self.num_not_taken:
            told.append(f"{self.num_not_taken:,} events were not taken for the webhook: {self._most:,} waited already")
        return told

    def _run(self) -> None:
        while True:
            self._news.clear()
            is_closing = self._closing.is_set()  # asked first: what was taken until then is sent
            is_through = self._send_all()
            if is_closing:
                return
            if is_through:
                self._news.wait()
            else:
                self._closing.wait(AGAIN_S)

    def _send_all(self) -> bool:
        """Send what waits, the oldest first; False: the webhook did not answer, and the others wait behind."""
        while waiting := [path for path in self._list() if path.name not in self._skipped]:
            path = waiting[0]
            failure = self._send(path)
            self.problem = failure.problem if failure else ""
            if failure is None:
                path.unlink(missing_ok=True)
            elif failure.is_refusal:
                self._skipped.add(path.name)
                self.num_refused += 1
            else:
                return False
        return True

    def _send(self, path: Path) -> Failure | None:
        """Send one; None: it is done with."""
        with contextlib.suppress(OSError, ValueError):
            event = json.loads(path.read_bytes())
            if time.time_ns() - int(path.stem) < KEPT_FOR.total_seconds() * 1e9:
                return post_alert(self._webhook, event, self._env, where="webhook", sleep=self._closing.wait)
        return None  # older than KEPT_FOR: it helps nobody; or a file that is none of ours

    def _list(self) -> list[Path]:
        return sorted(self._folder.glob("*.json"))

    def _lock_folder(self, source: str) -> IO[str]:
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = (self._folder / "lock").open("a")
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.close()
            found = "another process watches it, for the same webhook"
            raise BusyError(source, found, "one", "Stop that one, or leave --webhook out.") from exc
        return lock
