"""Tries a model in the real server, before anyone relies on it: a process of its own, HTTP on loopback, golden images.

Needs no more than the extra `serve` brings: the requests are made with the standard library.
"""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visionloop.errors import ServingError
from visionloop.lifetime import stop_process
from visionloop.pipeline import make_stage_environment
from visionloop.predictor import Predictor
from visionloop.promotion.models import load_model
from visionloop.records import Prediction
from visionloop.workspace import Workspace

LIMIT_S, ANSWER_S = 120.0, 30.0
CLOSE = 1e-3  # of a probability: the same code on the same machine, in batches of another size
OVER_LIMITS = ("too_large", "request_entity_too_large")
WHERE = "server, tried before it is needed"


def check_serving(workspace: Workspace, address: str, *, limit_s: float = LIMIT_S) -> int:
    """Serve a model in a process of its own and ask it about its golden images; return how many it answered.

    The answers must be those that the bundle gives here in the engine that the server chose, which must be its golden
    ones. An image above the limits of the section `serve` is left out, if there are others.

    Raises:
        ServingError: the server does not start or answer in time, or answers differently.
        VisionLoopError: the bundle cannot be had, or is refused.
    """
    address = str(Path(address).resolve()) if Path(address).is_dir() else address
    predictor = load_model(address, lambda: workspace)
    images = predictor.bundle.golden_images()
    answered, refused = 0, ""
    with run_own_server(workspace.settings.home, ["--bundle", address], limit_s=limit_s) as url:
        engine = _ask(url, "GET", "/model").get("runtime", {}).get("engine")
        if engine != predictor.engine:
            predictor = Predictor(predictor.bundle, engine=str(engine))
            predictor.check_golden()
        expected = predictor.answer(predictor.run_batches(predictor.decode_golden(images)))
        for number, (data, want) in enumerate(zip(images, expected, strict=True)):
            body = _ask(url, "POST", "/predict", data)
            if code := body.get("code"):
                refused = f"golden image {number} is refused: {body.get('detail', code)}"
                if code not in OVER_LIMITS:
                    raise ServingError(WHERE, refused, "an answer")
                continue
            _compare(number, body, want)
            answered += 1
    if not answered:
        todo = "Raise the limits in the section `serve` of params.yaml."
        raise ServingError(WHERE, refused or "the bundle has no golden image", "one answer at least", todo)
    return answered


@contextlib.contextmanager
def run_own_server(home: Path, options: Sequence[str] = (), *, limit_s: float = LIMIT_S) -> Iterator[str]:
    """Run `visionloop serve` of a workspace on a free port, for so long at most; yield its address, then stop it.

    It has no keys, no second port, and no rate: it is asked here alone.

    Raises:
        ServingError: it did not start; its own last line is told.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "visionloop", "serve", "--port", "0", "--trial", *options],
        cwd=home,
        env=make_stage_environment(home, os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    alarm = threading.Timer(limit_s, process.kill)
    alarm.start()
    try:
        yield _wait_for_url(process, limit_s)
    finally:
        alarm.cancel()
        process.send_signal(signal.SIGINT)  # no balancer looks at this one: it need not answer on after SIGTERM
        stop_process(process)


def _wait_for_url(process: "subprocess.Popen[str]", limit_s: float) -> str:
    """Return the address from the line that the server prints when it is ready. Raises ServingError."""
    assert process.stdout is not None
    started, last = time.monotonic(), "it said nothing"
    for line in process.stdout:
        if " on http://" in line:
            return line.split(" on ", 1)[1].split()[0]
        last = line.strip() or last
    over = f" within {limit_s:.0f} s" if time.monotonic() - started > limit_s - 1 else ""
    raise ServingError(WHERE, f"did not start{over} ({last[:300]})", "a server that listens")


def _ask(url: str, method: str, path: str, data: bytes | None = None) -> Mapping[str, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=ANSWER_S)
    try:
        with contextlib.closing(connection):
            connection.request(method, path, data)
            body = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise ServingError(WHERE, f"did not answer ({str(exc) or type(exc).__name__})", "an answer in time") from exc
    return body if isinstance(body, dict) else {}


def _compare(number: int, body: Mapping[str, Any], want: Prediction) -> None:
    given = body.get("probabilities", {})
    far = max((abs(given.get(name, -1) - p) for name, p in want.probabilities.items()), default=0.0)
    if given.keys() == want.probabilities.keys() and far <= CLOSE and body.get("prediction") == want.prediction:
        return
    raise ServingError(
        WHERE,
        f"answers golden image {number} with {body.get('prediction')!r}, a probability {far:.3g} off",
        f"{want.prediction!r}, as the bundle does",
        "See that the server has the versions of onnxruntime and Pillow that it was judged with.",
    )
