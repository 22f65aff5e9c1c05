"""`visionloop predict` on a stream: lines as they come, for people or as JSON, to a file and to a webhook."""

import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO

from visionloop.records import encode_line, measure_width

if TYPE_CHECKING:
    from visionloop.ingest.video.webstream import WebStream
    from visionloop.params.loop import Predict, Webhook
    from visionloop.predict.connection import WatchPlan
    from visionloop.predict.files import FilePrediction, Sampling
    from visionloop.predict.lines import Line
    from visionloop.predict.live import Watch
    from visionloop.predict.several import Followed
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


@dataclass(frozen=True)
class StreamWishes:
    """What is asked of streams alone. `of_params`: those of params.yaml are watched."""

    seconds: float | None
    frames: int | None
    each_frame: bool
    webhook: str | None
    of_params: bool = False
    hosts: Sequence[str] = ()


def find_streams(
    paths: Sequence[str], wishes: StreamWishes, section: "Predict", of_files: Mapping[str, object]
) -> list[tuple[str, str]]:
    """Return (name, address) of the streams that are asked about; none: files are.

    Raises:
        SourceError: with files beside them, or with what is for the other; one is named twice.
    """
    from visionloop.errors import SourceError
    from visionloop.predict.several import is_stream, name_streams

    if wishes.of_params:
        if paths:
            raise SourceError("--streams", "is there, and PATHS too", "one of them")
        if not section.streams:
            raise SourceError("--streams", "params.yaml `predict.streams` names none", "a stream", "Edit the file.")
    streams = section.streams if wishes.of_params else [path for path in paths if is_stream(path)]
    if not streams:
        names: dict[str, object] = {"--seconds": wishes.seconds, "--frames": wishes.frames, "--webhook": wishes.webhook}
        names |= {"--each-frame": wishes.each_frame or None, "--host": wishes.hosts or None}
        if name := next((name for name, value in names.items() if value is not None), None):
            raise SourceError(name, "is for a stream", "rtsp://, http://, https:// or /dev/video0 as the path")
        return []
    named = name_streams(streams)
    if len(paths) > len(streams):
        found = "is a stream, and a path beside it is none"
        raise SourceError(named[0][0], found, "streams alone, or files alone", "Start one command for each.")
    if name := next((name for name, value in of_files.items() if value), None):
        raise SourceError(name, "is for files", "--out FILE.jsonl, --json or --webhook with a stream")
    return named


def make_plans(named: Sequence[tuple[str, str]], sampling: "Sampling", wishes: StreamWishes) -> "list[WatchPlan]":
    """Return how streams are watched. Of those that were typed the hosts may be private."""
    from visionloop.predict.connection import WatchPlan

    return [
        WatchPlan(
            path,
            os.environ if wishes.of_params else allow_typed_host(path, os.environ),
            sampling,
            wishes.seconds,
            wishes.frames,
            wishes.each_frame,
            name=name,
            is_one_of_several=len(named) > 1,
            hosts=wishes.hosts,
        )
        for name, path in named
    ]


def choose_webhook(typed: str | None, section: "Webhook | None") -> "Webhook | None":
    """Return where events go. The headers of params.yaml, which may be secret, go to its own address alone.

    Raises:
        SourceError: what was typed is no address.
    """
    from pydantic import ValidationError

    from visionloop.errors import SourceError
    from visionloop.params.loop import Webhook
    from visionloop.secrets import mask

    if typed is None or (section and section.url == typed):
        return section
    try:
        return Webhook(url=typed)
    except ValidationError:
        raise SourceError("--webhook", f"got {mask(typed)[:20]!r}", "a URL, http:// or https://") from None


def allow_typed_host(path: str, env: Mapping[str, str]) -> dict[str, str]:
    """Let the host that a person has typed be a private one, as cameras are. Addresses of metadata never are."""
    from visionloop.web.download import PRIVATE_HOSTS

    typed = _HOST.search(path)
    return {**env, PRIVATE_HOSTS: f"{env.get(PRIVATE_HOSTS, '')} {typed[1] if typed else ''}".strip()}


def watch_cameras(
    workspace: "Workspace",
    predictor: "Predictor",
    plans: Sequence["WatchPlan"],
    telling: Telling,
    webhook: "Webhook | None",
) -> "FilePrediction | None":
    """Watch streams until a limit, Ctrl-C or SIGTERM. The address of a video file alone gives its answer instead.

    Raises:
        SourceError: an address is wrong, or none gives a frame. DiskError: `out` cannot be written.
    """
    from visionloop.ingest.video.cameras import Reach, read_address
    from visionloop.predict.lines import Outbox, open_lines
    from visionloop.predict.several import follow_all, watch_all

    for plan in plans:
        read_address(plan.path, Reach(plan.env, plan.shown))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_lines(telling.out)) if telling.out else None
        hidden_dir = workspace.settings.hidden_dir
        open_box = partial(Outbox.open, hidden_dir, webhook=webhook, env=os.environ) if webhook else None
        streams = follow_all(plans, predictor, workspace.name, open_box)
        opened = streams[0].watch.connect() if len(streams) == 1 else None
        if opened and opened.file:
            return _answer_film(predictor, plans[0], opened.file, file)
        show = Shower(telling, file, streams)
        with stop_on_signals([one.watch for one in streams]):
            for found in watch_all(streams, opened):
                show.take(found)
        show.close()
    return None


def _answer_film(
    predictor: "Predictor", plan: "WatchPlan", film: "WebStream", file: IO[str] | None
) -> "FilePrediction":
    from visionloop.predict.files import predict_video
    from visionloop.predict.lines import write_line
    from visionloop.predict.tables import make_line
    from visionloop.video.player import Player

    with tempfile.TemporaryDirectory() as folder, Player() as player:
        found = predict_video(predictor, film.download(Path(folder) / "video"), plan.sampling, player)
    found = replace(found, path=plan.shown)
    if file:
        write_line(file, make_line(found, predictor.digest))
    return found


@contextlib.contextmanager
def stop_on_signals(watches: Sequence["Watch"]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end watches in order, between two lines. The second one ends them where they are."""

    def stop(number: int, frame: object) -> None:
        for watch in watches:
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
    """Tells each line where it is wanted, and what goes on in a line of its own on a terminal.

    Of several streams each line begins with the name of its stream.
    """

    def __init__(self, telling: Telling, file: IO[str] | None, streams: Sequence["Followed"]) -> None:
        self._telling, self._file, self._streams = telling, file, streams
        self._is_live = sys.stdout.isatty() and not telling.quiet and not telling.as_json
        self._has_begun = telling.quiet or telling.as_json
        self._width = max(measure_width(one.shown) for one in streams)
        self._shown_at, self._is_drawn = 0.0, False
        self._problems = dict.fromkeys((one.shown for one in streams), "")

    def take(self, found: "tuple[Followed, Line] | None") -> None:
        """Tell a line of a stream; None: show how it goes. Raises DiskError."""
        from visionloop.predict.lines import describe_line, write_line

        if not self._has_begun and (found or len(self._streams) > 1 or self._streams[0].watch.num_answered):
            self._has_begun = True
            self._print(describe_begin([one.watch for one in self._streams]))
        for one in self._streams:
            self.warn(one, one.box.problem if one.box else "")
        if found is None:
            self._draw()
            return
        stream, line = found
        if self._file:
            write_line(self._file, line)
        self._print(encode_line(line) if self._telling.as_json else self._name(stream, describe_line(line), "  "))

    def warn(self, stream: "Followed", problem: str) -> None:
        """Tell a problem of a stream's webhook, on stderr; again only after it has passed. "": there is none."""
        if problem and problem != self._problems[stream.shown]:
            self._print(f"note: {self._name(stream, problem, ': ')}", sys.stderr)
        self._problems[stream.shown] = problem

    def close(self) -> None:
        """Tell, on stderr, what is to be known beyond the lines: of the webhook, and of streams that ended early."""
        for one in self._streams:
            for told in one.told:
                self._print(self._name(one, told, ": "), sys.stderr)
            if one.failure:
                self._print(f"note: {one.failure}", sys.stderr)

    def _name(self, stream: "Followed", text: str, divider: str) -> str:
        if len(self._streams) == 1:
            return text
        width = self._width - measure_width(stream.shown) if divider == "  " else 0
        return f"{stream.shown}{' ' * width}{divider}{text}"

    def _print(self, line: str, to: TextIO | None = None) -> None:
        if self._is_drawn:
            print(f"\r{'':<{WIDTH}}\r", end="", flush=True)
        self._is_drawn = False
        print(line, file=to, flush=True)

    def _draw(self) -> None:
        now = time.monotonic()
        if self._is_live and now - self._shown_at >= LIVE_EVERY_S:
            self._shown_at, self._is_drawn = now, True
            print(f"\r{describe_state([one.watch for one in self._streams])[:WIDTH]:<{WIDTH}}", end="", flush=True)


def describe_begin(watches: Sequence["Watch"]) -> str:
    """Say what is watched."""
    first = watches[0]
    what = first.plan.shown if len(watches) == 1 else f"{len(watches)} streams"
    every = f"a frame every {first.plan.sampling.every_s:g} s"
    return f"watching {what}: {every}, by bundle {first.digest[:12]}; Ctrl-C stops"


def describe_state(watches: Sequence["Watch"]) -> str:
    """Return what is seen now, and how many frames were answered and passed over."""
    from visionloop.predict.lines import format_length

    said = _describe_last(watches[0])
    if len(watches) > 1:
        said = f"{sum(each.last is not None for each in watches)} of {len(watches)} streams"
    num_passed_over = sum(each.num_passed_over for each in watches)
    passed = f", {num_passed_over:,} passed over" if num_passed_over else ""
    num_answered = sum(each.num_answered for each in watches)
    return f"{said}  {num_answered:,} frames{passed}  {format_length(watches[0].took_s)}"


def _describe_last(watch: "Watch") -> str:
    last = watch.last
    if not last:
        return "no frame"
    answer = last.prediction or "no label"
    return f"don't know (at best {answer})" if last.abstained else f"{answer} {last.confidence:.0%}"
