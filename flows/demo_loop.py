"""The whole loop in one go, told line by line: a new look, an alarm, labels, a retrain, a swap, a rollback, a night.

    python flows/demo_loop.py [FOLDER]     # or: make demo-loop

It needs nothing but this machine: 1,797 handwritten digits, a Prefect server and a worker of its own, on free ports.
All of it is in FOLDER, which is made anew each time.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visionloop.data.prediction_log import read_predictions
from visionloop.errors import PipelineError, VisionLoopError
from visionloop.lifetime import stop_process, stop_with_us, terminable
from visionloop.settings import choose_tool_environment, load_settings, make_tool_folders
from visionloop.store import open_store
from visionloop.words import describe_error

FLOWS_DIR = Path(__file__).resolve().parent
NAME = "demo-loop"
TRAINED_ON, SIDE_PX, ASKED = 1200, 32, 240
LIMIT_S, POLL_S, PAUSE_S = 240.0, 0.5, 0.2
TRIES = 10
NEAR_THE_HOUR_S = 60
ENDED = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
PARAMS = """\
name: demo-loop
task: auto
embed: {batch_size: 500}
ingest:
  sources:
    - {kind: folder, path: photos}
    - {kind: review}
prepare: {image_size: 32}
train: {backbone: small_cnn, max_epochs: 12, batch_size: 64, learning_rate: 2.0e-3, export: {int8: off}}
evaluate: {resamples: 500}
gate: {rule: no_worse, margin: 0.05, class_drop: {mode: off}, slice_drop: {mode: off}}
serve: {poll_s: 1, log_flush_s: 1, keep_images: {random: 1.0, per_hour: 100000}}
monitor: {window_hours: 1, block_hours: 0, false_alarm_days: 4}
triggers: {drift_windows: 1, warmup_hours: 0, cooldown_hours: 0}
schedule: {retrain: "0 3 * * *", ingest: "0 4 1 1 *", monitor: "0 5 1 1 *"}
"""


@dataclass(frozen=True)
class Photos:
    """The digits that no training has seen, as the old and as the new camera takes them, with what they show."""

    old: list[bytes]
    new: list[bytes]
    labels: list[str]

    @property
    def truth(self) -> dict[str, str]:
        """What each photo of the new camera shows, by the sha256 of its bytes."""
        return {sha256(data).hexdigest(): label for data, label in zip(self.new, self.labels, strict=True)}


def make_photos(folder: Path) -> Photos:
    """Write the photos that the first model learns from, a folder for each class; return the others."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for place in order[:TRAINED_ON]:
        path = folder / str(digits.target[place]) / f"{place:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(digits.images[place] / 16))
    rest = order[TRAINED_ON:]
    return Photos(
        old=[encode(digits.images[place] / 16) for place in rest],
        new=[encode(see_anew(digits.images[place] / 16)) for place in rest],
        labels=[str(digits.target[place]) for place in rest],
    )


def see_anew(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a digit as the new camera sees it, in daylight: pale."""
    return 0.3 + 0.5 * grey


def encode(grey: NDArray[np.float64]) -> bytes:
    """Return grey values from 0 to 1 as PNG."""
    import io

    sink = io.BytesIO()
    picture = Image.fromarray((grey * 255).astype(np.uint8)).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
    picture.convert("RGB").save(sink, "PNG")
    return sink.getvalue()


@dataclass
class Client:
    """A client of the server that asks and asks, about photos of the new camera; it counts what goes wrong."""

    url: str
    photos: Photos
    answers: list[tuple[str, bool]] = field(default_factory=list)  # the model's version, and whether it was right
    failed: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, http: httpx.Client, place: int) -> None:
        """Ask about one photo."""
        try:
            body = http.post("/predict", content=self.photos.new[place]).raise_for_status().json()
            self.answers.append((body["model"]["version"], body["prediction"] == self.photos.labels[place]))
        except (httpx.HTTPError, ValueError, KeyError) as exc:
            self.failed.append(str(exc))

    def run(self) -> None:
        """Ask until it is stopped: quickly at first."""
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as http:
            for number in itertools.count():
                self.ask(http, number % len(self.photos.new))
                if self._stop.wait(0.0 if number < ASKED else PAUSE_S):
                    return

    def stop(self) -> None:
        """Have it end with its next answer."""
        self._stop.set()

    def measure(self) -> dict[str, float]:
        """Return the share of right answers of each model version."""
        asked, right = Counter(v for v, _ in self.answers), Counter(v for v, is_right in self.answers if is_right)
        return {version: right[version] / number for version, number in sorted(asked.items())}


@dataclass
class Demo:
    """A workspace with a Prefect server, a worker, a model server and a client. `tell` gets each line of the story."""

    home: Path
    tell: Callable[[str], None]
    name: str = NAME
    api: str = ""
    env: dict[str, str] = field(default_factory=dict)

    def call(self, *argv: str, show: int = 6, codes: Sequence[int] = (0,)) -> str:
        """Run a command of visionloop in the workspace, tell its last lines, and return what it said."""
        self.tell(f"  $ visionloop {' '.join(argv)}")
        command = [sys.executable, "-m", "visionloop", *argv]
        place = self.home if self.home.is_dir() else self.home.parent
        done = subprocess.run(command, cwd=place, env=self.env, capture_output=True, text=True, check=False)
        if done.returncode not in codes:
            raise PipelineError(f"visionloop {argv[0]}", f"ended with {done.returncode}: {done.stderr[-500:]}", "0")
        for line in done.stdout.splitlines()[-show:] if show else ():
            self.tell(f"    {line}")
        return done.stdout

    @contextlib.contextmanager
    def running(self, log: str, *command: str) -> Iterator[Path]:
        """Run a process beside this one, its lines in a log file; stop it at the end."""
        path = self.home.parent / f"{self.home.name}-{log}.log"
        with path.open("w") as file:
            process = subprocess.Popen(command, cwd=self.home, env=self.env, stdout=file, stderr=file, text=True)
            stop_with_us(process.pid)
            try:
                yield path
            finally:
                stop_process(process)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask the Prefect server; some times more while it answers 5xx, as it does while its database is locked."""
        for left in reversed(range(TRIES)):
            answer = httpx.request(method, f"{self.api}/{path}", json=body, trust_env=False, timeout=30)
            if answer.status_code < 500 or not left:
                break
            time.sleep(POLL_S)
        return answer.raise_for_status().json()

    def start(self, deployment: str, **parameters: str) -> None:
        """Start a deployment now, as its schedule would: once, however often it is asked."""
        number = self.ask("GET", f"deployments/name/{deployment}")["id"]
        body = {"parameters": parameters, "idempotency_key": secrets.token_hex(8)}
        self.ask("POST", f"deployments/{number}/create_flow_run", body)

    def wait_for_run(self, deployment: str, number: int = 1) -> str:
        """Wait for the so-many-th run of a deployment to end; tell how, and return the name of that state."""
        flow, _, name = deployment.partition("/")
        query = {
            "deployments": {"name": {"any_": [name]}},
            "flows": {"name": {"any_": [flow]}},
            "sort": "START_TIME_ASC",
        }

        def find() -> dict[str, Any] | None:
            runs = [one for one in self.ask("POST", "flow_runs/filter", query) if one["state_type"] in ENDED]
            return runs[number - 1] if len(runs) >= number else None

        run = wait_for(find, f"run {number} of {deployment}")
        self.tell(f"  Prefect: {deployment} ended as {run['state_name']}: {run['state']['message'] or ''}")
        return str(run["state_name"])


def wait_for(find: Callable[[], Any], what: str) -> Any:
    """Ask again and again. Raises PipelineError after a while."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := find()):
        if time.monotonic() > deadline:
            raise PipelineError("demo", f"{what}: nothing after {LIMIT_S:.0f} s", "an end", "See the logs beside it.")
        time.sleep(POLL_S)
    return found


def require(name: str, state: str, *expected: str) -> None:
    """Raise PipelineError where a step of the story did not end as it has to."""
    if state not in expected:
        raise PipelineError(f"demo, {name}", f"ended as {state}", " or ".join(expected), "See the logs beside it.")


def run_demo(home: Path, tell: Callable[[str], None], params: str = PARAMS) -> Client:
    """Tell the whole story in a new workspace; return the client that has asked all the time.

    Raises:
        PipelineError: a step did not end as it has to.
    """
    demo = Demo(home, tell)
    demo.env = {**os.environ, **choose_tool_environment(os.environ, home), "VISIONLOOP_HOME": ""}
    tell("1. A first model, of photos that an old camera has taken.")
    home.parent.mkdir(parents=True, exist_ok=True)
    demo.call("new", str(home), show=0)
    make_tool_folders(home)
    photos = make_photos(home / "photos")
    (home / "params.yaml").write_text(params)
    demo.call("start", show=0)
    demo.call("history")
    with run_prefect(demo), serve(demo) as url:
        client = Client(url, photos)
        thread = threading.Thread(target=client.run, daemon=True)
        wait_for_the_hour(tell)
        tell("2. It serves. From now on a new camera takes the photos, and a client asks, all the time.")
        thread.start()
        try:
            tell_story(demo, client)
        finally:
            client.stop()
            thread.join()
    tell(f"  {len(client.answers):,} requests were answered, {len(client.failed)} failed")
    return client


def tell_story(demo: Demo, client: Client) -> None:
    """Go through the loop: alarm, labels, retrain, swap, rollback, night."""
    tell = demo.tell
    wait_for(lambda: len(client.answers) >= ASKED, "answers")
    asked = len(client.answers)
    wait_for(lambda: count_logged(demo) >= asked, "the log of the answers")
    tell(f"  {len(client.answers)} answers, of which {client.measure()['1']:.0%} are right: nobody has noticed yet")
    tell("3. The hour is over: the monitor looks at what was served.")
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    demo.start(f"monitor/{demo.name}", now=now.isoformat())
    require("monitor", demo.wait_for_run(f"monitor/{demo.name}"), "Drift")
    tell("  The alarm is an event, which starts the flow that asks the triggers. There is nothing to learn from yet:")
    require("triggers", demo.wait_for_run(f"retrain/{demo.name}-if-due"), "NotDue")
    tell("4. Which photos are worth a label? A person answers for 50 of them.")
    label(demo, client.photos)
    tell("5. The labels come in with the next ingest. Now a retrain is due: it runs in a worker of Prefect.")
    demo.start(f"ingest/{demo.name}")
    require("ingest", demo.wait_for_run(f"ingest/{demo.name}"), "NewData")
    require("retrain", demo.wait_for_run(f"retrain/{demo.name}-if-due", 2), "Promoted")
    wait_for(lambda: client.answers[-1][0] == "2", "an answer of the new model")
    before = len(client.answers)
    wait_for(lambda: len(client.answers) >= before + 50, "answers")
    told = ", ".join(f"version {version} {share:.0%}" for version, share in client.measure().items())
    tell(f"6. The server has taken it up by itself. Right answers: {told}")
    demo.call("history")
    demo.call("triggers", "history")
    tell("7. Somebody does not like it, and rolls back. A night passes: the scheduled retrain runs again.")
    demo.call("rollback", "--why", "the new camera is taken down")
    wait_for(lambda: client.answers[-1][0] == "1", "an answer of the old model")
    demo.start(f"retrain/{demo.name}")
    require("night", demo.wait_for_run(f"retrain/{demo.name}"), "Unchanged")
    time.sleep(2)
    require("server", f"version {client.answers[-1][0]}", "version 1")
    demo.call("history")


def count_logged(demo: Demo) -> int:
    """Return how many answers are in the store: the server writes them there each second."""
    store = open_store(load_settings(demo.env, demo.home).store_url)
    return len(read_predictions(store, demo.name, columns=["time"]).table)


def label(demo: Demo, photos: Photos) -> None:
    """Answer for the images that `visionloop review` asks about, as a person does in a table."""
    demo.call("review", "--csv", "ask.csv")
    path = demo.home / "ask.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "label": photos.truth[row["sha256"]]} for row in rows)
    demo.call("review", "--take", "ask.csv", "--by", "ann")
    demo.call("review", "--accept")


def wait_for_the_hour(tell: Callable[[str], None]) -> None:
    """Wait for the next hour where it is near: all that follows is to lie in one window."""
    now = datetime.now(UTC)
    left_s = 3600 - (now.minute * 60 + now.second)
    if left_s < NEAR_THE_HOUR_S:
        tell(f"  (waiting {left_s} s for the full hour, with which a window of the monitor begins)")
        time.sleep(left_s + 1)


@contextlib.contextmanager
def run_prefect(demo: Demo) -> Iterator[None]:
    """Run a Prefect server, register the deployments for a pool, and run a worker of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    demo.api = f"http://127.0.0.1:{port}/api"
    demo.env |= {"PREFECT_API_URL": demo.api, "PREFECT_SERVER_UI_ENABLED": "false", "PREFECT_WORKER_QUERY_SECONDS": "1"}
    prefect = [sys.executable, "-m", "prefect"]
    with demo.running("prefect", *prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)):
        wait_for(lambda: is_up(f"{demo.api}/health"), "the Prefect server")
        command = [sys.executable, str(FLOWS_DIR / "deploy.py"), "--workspace", str(demo.home), "--pool", NAME]
        done = subprocess.run(command, env=demo.env, capture_output=True, text=True, check=False)
        require("deploy", done.stderr or "registered", "registered")
        demo.tell("  $ python flows/deploy.py --pool demo-loop")
        for line in done.stdout.splitlines():
            demo.tell(f"    {line}")
        with demo.running("worker", *prefect, "worker", "start", "--pool", NAME, "--type", "process"):
            yield


@contextlib.contextmanager
def serve(demo: Demo) -> Iterator[str]:
    """Run the model server on a free port; yield its address."""
    with demo.running("serve", sys.executable, "-m", "visionloop", "serve", "--port", "0") as log:
        yield wait_for(lambda: re.search(r" on (http://\S+) ", log.read_text()), "the server")[1]


def is_up(url: str) -> bool:
    """Say whether a server answers."""
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def main() -> int:
    """Tell the story on the terminal; return the exit code."""
    parser = argparse.ArgumentParser(description="Show the whole loop on handwritten digits, in a few minutes.")
    parser.add_argument("folder", nargs="?", type=Path, default=FLOWS_DIR.parent / ".visionloop" / NAME)
    folder = parser.parse_args().folder.resolve()
    started = time.monotonic()
    try:
        if folder.exists():
            if not (folder / "demo.json").is_file():
                raise PipelineError(str(folder), "is there already", "a new folder", "Name another one.")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / "demo.json").write_text(json.dumps({"of": NAME}))
        with terminable():
            run_demo(folder / "ws", lambda line: print(line, flush=True))
    except VisionLoopError as exc:
        print(describe_error(exc), file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(f"the whole loop, in {time.monotonic() - started:.0f} s; it is in {folder / 'ws'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
