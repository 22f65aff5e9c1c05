"""The events of a camera on their way to a webhook: each at least once, in order, also after a kill.

An event is a file in the outbox from the moment it is taken until the webhook has answered 2xx. A thread sends them, so
that a slow webhook holds no camera up. When so many wait that the outbox is full, a new one is not taken, and counted.
"""

import contextlib
import fcntl
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from visionloop.errors import BusyError, DiskError
from visionloop.monitoring.alert import KEPT_FOR, Failure, post_alert
from visionloop.params.loop import Webhook
from visionloop.predict.lines import Line, describe_line
from visionloop.records import compute_digest
from visionloop.workfolder import write_file

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
