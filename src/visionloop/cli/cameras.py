"""`visionloop predict` on a stream: lines as they come, for people or as JSON, to a file and to a webhook."""

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from visionloop.params.loop import Webhook
    from visionloop.predict.files import FilePrediction
    from visionloop.predict.lines import Line
    from visionloop.predict.live import Watch, WatchPlan
    from visionloop.predictor import Predictor
    from visionloop.workspace import Workspace

LIVE_EVERY_S = 0.5
WIDTH = 78
_HOST = re.compile(r"://(?:.*@)?([\w.-]+(?::\d+)?|\[[0-9A-Fa-f:]+\](?::\d+)?)(?=[/?#]|$)")


@dataclass(frozen=True)
class Telling:
    """Where the lines go. `quiet`: no live line and no word about the beginning; `as_json`: JSON lines on stdout."""

    out: Path | None = None
    quiet: bool = False
    as_json: bool = False


def allow_typed_host(path: str, env: Mapping[str, str]) -> dict[str, str]:
    """Let the host that a person has typed be a private one, as cameras are. Addresses of metadata never are."""
    from visionloop.web.download import PRIVATE_HOSTS

    typed = _HOST.search(path)
    return {**env, PRIVATE_HOSTS: f"{env.get(PRIVATE_HOSTS, '')} {typed[1] if typed else ''}".strip()}


def watch_camera(
    workspace: "Workspace", predictor: "Predictor", plan: "WatchPlan", telling: Telling, webhook: "Webhook | None"
) -> "FilePrediction | None":
    """Watch a stream until a limit, Ctrl-C or SIGTERM. An address that is a video file gives its answer instead.

    Raises:
        SourceError: the address is wrong, or gives no frame. DiskError: `out` cannot be written.
    """
    from visionloop.predict.files import predict_video
    from visionloop.predict.lines import open_lines, write_line
    from visionloop.predict.live import Watch
    from visionloop.predict.outbox import Outbox
    from visionloop.predict.tables import make_line
    from visionloop.video.player import Player

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_lines(telling.out)) if telling.out else None
        show = Shower(telling, file)
        watch = Watch(plan, predictor)
        stream = watch.connect()
        if stream.file:
            folder, player = stack.enter_context(tempfile.TemporaryDirectory()), stack.enter_context(Player())
            found = predict_video(predictor, stream.file.download(Path(folder) / "video"), plan.sampling, player)
            found = replace(found, path=plan.shown)
            if file:
                write_line(file, make_line(found, predictor.digest))
            return found
        box = Outbox.open(workspace.settings.hidden_dir, plan.shown, webhook, os.environ) if webhook else None
        show.send = partial(box.tell, workspace.name) if box else None
        try:
            with stop_on_signals(watch):
                for line in watch.run(stream):
                    show.take(line, watch)
                    show.warn(box.problem if box else "")
        finally:
            lines = watch.end()  # whatever has happened, the camera is let go
        for line in lines:
            show.take(line, watch)
        for told in box.close() if box else ():
            print(told, file=sys.stderr, flush=True)
    return None


@contextlib.contextmanager
def stop_on_signals(watch: "Watch") -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end a watch in order, between two lines. The second one ends it where it is."""

    def stop(number: int, frame: object) -> None:
        watch.stop("stopped" if number == signal.SIGINT else "terminated")
        for each, old in before.items():
            signal.signal(each, old)

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)


class Shower:
    """Tells each line where it is wanted, and what goes on in a line of its own on a terminal."""

    def __init__(self, telling: Telling, file: IO[str] | None) -> None:
        self._telling, self._file = telling, file
        self.send: Callable[[Line], None] | None = None
        self._is_live = sys.stdout.isatty() and not telling.quiet and not telling.as_json
        self._has_begun = telling.quiet or telling.as_json
        self._shown_at, self._is_drawn, self._problem = 0.0, False, ""

    def take(self, line: "Line | None", watch: "Watch") -> None:
        """Tell a line; None: show how it goes. Raises DiskError."""
        from visionloop.predict.lines import describe_line, write_line

        if not self._has_begun and watch.num_answered:
            self._has_begun = True
            self._print(describe_begin(watch))
        if line is None:
            self._draw(watch)
            return
        if self._file:
            write_line(self._file, line)
        self._print(json.dumps(line, ensure_ascii=False) if self._telling.as_json else describe_line(line))
        if self.send:
            self.send(line)

    def warn(self, problem: str) -> None:
        """Tell a problem of the webhook, on stderr; again only after it has passed. "": there is none."""
        if problem and problem != self._problem:
            self._print(f"note: {problem}", sys.stderr)
        self._problem = problem

    def _print(self, line: str, to: TextIO | None = None) -> None:
        if self._is_drawn:
            print(f"\r{'':<{WIDTH}}\r", end="", flush=True)
        self._is_drawn = False
        print(line, file=to, flush=True)

    def _draw(self, watch: "Watch") -> None:
        now = time.monotonic()
        if self._is_live and now - self._shown_at >= LIVE_EVERY_S:
            self._shown_at, self._is_drawn = now, True
            print(f"\r{describe_state(watch)[:WIDTH]:<{WIDTH}}", end="", flush=True)


def describe_begin(watch: "Watch") -> str:
    """Say what is watched."""
    every = f"a frame every {watch.plan.sampling.every_s:g} s"
    return f"watching {watch.plan.shown}: {every}, by bundle {watch.digest[:12]}; Ctrl-C stops"


def describe_state(watch: "Watch") -> str:
    """Return what is seen now, and how many frames were answered and passed over."""
    from visionloop.predict.lines import format_length

    last = watch.last
    said = "no frame"
    if last:
        answer = last.prediction or "no label"
        said = f"don't know (at best {answer})" if last.abstained else f"{answer} {last.confidence:.0%}"
    passed = f", {watch.num_passed_over:,} passed over" if watch.num_passed_over else ""
    return f"{said}  {watch.num_answered:,} frames{passed}  {format_length(watch.took_s)}"
