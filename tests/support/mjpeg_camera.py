"""A camera over HTTP (multipart JPEG) on loopback, that does what a test wants: goes on, breaks off, hangs, lies.

`plan` and `read` watch it.
"""

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simplejpeg

from http_server import Answer, Handler, WebServer, serve
from videos import RED, Color
from visionloop.cli.cameras import allow_typed_host
from visionloop.predict.connection import WatchPlan
from visionloop.predict.files import Sampling
from visionloop.predict.lines import Line
from visionloop.predict.live import Watch

PATH = "/live"
STEP_S = 0.04
LIMIT_S = 120.0  # no test waits for it: it ends one that would wait for ever


@dataclass(frozen=True)
class Plan:
    """One connection: so many frames (None: without end), then it ends, hangs, or sends noise."""

    frames: int | None = None
    then: str = "end"


@dataclass
class Camera:
    """What it shows now, and what its connections do; the last plan holds for all later ones."""

    plans: Sequence[Plan] = (Plan(),)
    color: Color = RED
    size_hw: tuple[int, int] = (48, 64)
    login: str = ""
    num_connections: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)

    def answer(self, handler: Handler) -> Answer | None:
        """Answer a request."""
        if self.login and handler.headers["Authorization"] != self.login:
            return Answer(status=401)
        plan = self.plans[min(self.num_connections, len(self.plans) - 1)]
        self.num_connections += 1
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace;boundary=frame")
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            self._film(handler, plan)
        return None

    def _film(self, handler: Handler, plan: Plan) -> None:
        for number in itertools.count():
            if self.is_over.is_set() or number == plan.frames:
                break
            jpeg = simplejpeg.encode_jpeg(np.full((*self.size_hw, 3), self.color, np.uint8), quality=95)
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            handler.wfile.write(head.encode() + jpeg + b"\r\n")
            time.sleep(STEP_S)
        if plan.then == "hang":
            self.is_over.wait(60)
        if plan.then == "noise":
            for _ in range(100):
                handler.wfile.write(random.Random(0).randbytes(10_000))


@contextlib.contextmanager
def film(camera: Camera) -> Iterator[WebServer]:
    """Serve a camera at PATH."""
    with serve({PATH: camera.answer}) as site:
        try:
            yield site
        finally:
            camera.is_over.set()


def plan(path: str, **keys: Any) -> WatchPlan:
    """How a test watches: often, and never for long after a camera is lost."""
    wishes = {"sampling": Sampling(0.05, 0.2), "seconds": LIMIT_S, "wait_s": 0.05, **keys}
    return WatchPlan(path, allow_typed_host(path, {}), **wishes)


def read(watch: Watch, until: Callable[[Line], bool]) -> Iterator[Line]:
    """The lines of a camera, up to and with the one that is waited for; then it is let go."""
    stream = watch.connect()
    assert stream.file is None
    try:
        for line in watch.run(stream):
            if line is not None:
                yield line
                if until(line):
                    return
    finally:
        watch.end()
