"""Use the team's stack from outside, as its people do, and break it: python3 infra/try/outside.py DIR STEP ...

infra/try.sh starts it. Steps: `loop` (a first and a better model, by the worker of Prefect, while clients ask), `kills`
(each part goes away in turn, while clients ask and while a model is trained), `again` (down and up). Needs the standard
library alone. It stops at the first thing that is not as it should be, with exit code 1.
"""

import base64
import http.client
import json
import os
import random
import shlex
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROXY = "127.0.16.15:8080"
SERVERS = {"server-1": "http://127.0.16.21:8000", "server-2": "http://127.0.16.22:8000"}
MLFLOW, PREFECT = "http://127.0.16.13:5000", "http://127.0.16.14:4200/api"
PROMETHEUS = "http://127.0.16.31:9090/api/v1"
SCRAPED = {"server-1:9100", "server-2:9100", "figures:9101"}
NAME = "digits"
LIMIT_S = 3600  # all waits are for states: it only ends a try that hangs, on the slowest machine too
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
DECIDED = {"Promoted", "Unchanged", "Same", "Refused", "Inconclusive", "Waiting"}
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Unexpected(Exception):
    """The stack did what it must not do."""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def expect(fact: object, told: str) -> None:
    """Raises Unexpected unless it is so."""
    if not fact:
        raise Unexpected(told)


def run(*command: str) -> str:
    """Run a command; returns what it prints. Raises Unexpected if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    expect(done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def compose(*words: str) -> str:
    return run(*shlex.split(os.environ["COMPOSE"]), *words)


def kill(service: str) -> None:
    """As a machine that fails, or the kernel that wants memory: without a word, and it stays away."""
    run("docker", "kill", "--signal", "KILL", f"visionloop-{service}-1")


def start(service: str) -> None:
    run("docker", "start", f"visionloop-{service}-1")


def in_worker(*words: str) -> str:
    return compose("exec", "-T", "worker", *words)


def ask(url: str, body: object = None, password: str = "") -> Any:
    """Return what an address answers, as JSON where it is. Raises OSError where it does not answer 200 to 299."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
    if url.startswith(MLFLOW):
        request.add_header("Host", "mlflow:5000")  # it answers to names that it was told
    if password:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"admin:{password}".encode()).decode())
    with OPENER.open(request, timeout=30) as answer:
        text = answer.read()
        return json.loads(text) if answer.headers.get_content_type() == "application/json" else text.decode()


def wait_for(find: Callable[[], Any], what: str) -> Any:
    """Return the first answer that is something. What does not answer yet is asked again. Raises Unexpected."""
    begun, problem = time.monotonic(), ""
    while time.monotonic() - begun < LIMIT_S:
        try:
            if found := find():
                return found
        except (OSError, http.client.HTTPException, ValueError) as exc:
            problem = f" ({exc})"
        time.sleep(1)
    raise Unexpected(f"{what}: not within {LIMIT_S} s{problem}")


def draw_png(rng: random.Random, side: int = 32) -> bytes:
    """A grey PNG of a blob on noise: no two are the same, so that no answer is from memory."""
    x, y, size = rng.uniform(8, 24), rng.uniform(8, 24), rng.uniform(10, 60)

    def shade(row: int, column: int) -> int:
        return 220 if (column - x) ** 2 + (row - y) ** 2 < size else rng.randrange(40)

    rows = b"".join(b"\0" + bytes(shade(row, column) for column in range(side)) for row in range(side))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def list_stored(table: str) -> set[str]:
    """Return the ids of the requests that `predictions` or `feedback` of the store has."""
    code = (
        f"from visionloop.data.prediction_log import read_{table} as read;"
        "from visionloop.workspace import open_workspace; w = open_workspace();"
        "print(*read(w.store, w.name).table['request_id'].to_pylist())"
    )
    return set(in_worker("python", "-c", code).split())


class Clients:
    """Two clients that ask the proxy until they are stopped, and say of each fifth answer what is right."""

    def __init__(self) -> None:
        self.answered: list[str] = []
        self.failed: list[str] = []
        self.digests: Counter[str] = Counter()
        self.acknowledged: list[str] = []
        self.not_taken: Counter[str] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(seed,)) for seed in range(2)]

    def _ask_on(self, seed: int) -> None:
        rng = random.Random(f"{seed} {time.time_ns()}")
        while not self._stop.wait(0.05):
            try:
                status, answer = self._post("/predict", draw_png(rng), "image/png")
            except (OSError, http.client.HTTPException, ValueError) as exc:
                self.failed.append(repr(exc))
                continue
            if status != 200:
                self.failed.append(f"{status} {answer}")
                continue
            self.answered.append(answer["request_id"])
            self.digests[answer["model"]["digest"]] += 1
            if rng.random() < 0.2:
                self._tell(answer["request_id"], str(rng.randrange(10)))

    def _tell(self, request_id: str, label: str) -> None:
        try:
            body = json.dumps({"request_id": request_id, "label": label}).encode()
            status, answer = self._post("/feedback", body, "application/json")
        except (OSError, http.client.HTTPException, ValueError) as exc:
            self.not_taken[type(exc).__name__] += 1
            return
        if status == 200:
            self.acknowledged.append(request_id)
        else:
            self.not_taken[f"{status} {answer.get('code', answer)}"] += 1

    def _post(self, path: str, body: bytes, kind: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(PROXY, timeout=30)
        try:
            connection.request("POST", path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] == b"{" else {"code": text[:200].decode()}
        finally:
            connection.close()

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def describe(self) -> str:
        told = f"{len(self.answered)} answers, {len(self.failed)} failed; {len(self.acknowledged)} labels taken"
        return told + (f", not taken: {dict(self.not_taken)}" if self.not_taken else "")


class Stack:
    """The stack as one sees it from outside, and what was acknowledged so far (kept in DIR/said.json)."""

    def __init__(self, folder: Path) -> None:
        lines = (folder / "env").read_text().splitlines()
        secrets = dict(line.split("=", 1) for line in lines if "=" in line)
        self.prefect, self.mlflow = secrets["PREFECT_PASSWORD"], secrets["MLFLOW_PASSWORD"]
        self.said_path = folder / "said.json"
        self.said: list[str] = json.loads(self.said_path.read_text()) if self.said_path.exists() else []

    @contextmanager
    def clients(self) -> Iterator[Clients]:
        """Clients that ask meanwhile. Raises Unexpected if an answer failed, or a label that was taken is not there."""
        with Clients() as clients:
            yield clients
            time.sleep(3)
        expect(not clients.failed, f"clients: {clients.describe()}: {clients.failed[:3]}")
        self.said += clients.acknowledged
        self.said_path.write_text(json.dumps(self.said))
        self.check_labels()

    def check_labels(self) -> None:
        lost = set(self.said) - list_stored("feedback")
        expect(not lost, f"{len(lost)} of {len(self.said)} labels that were taken are not in the store")

    def start_run(self, flow: str = "retrain") -> str:
        """Let the worker run a flow; returns the id of its run."""
        address = f"{PREFECT}/deployments/name/{flow}/{NAME}"

        def find() -> Any:
            found = ask(address, password=self.prefect)
            return found if found["status"] == "READY" else None

        deployment = wait_for(find, f"the deployment {flow}/{NAME}")
        return str(ask(f"{PREFECT}/deployments/{deployment['id']}/create_flow_run", {}, self.prefect)["id"])

    def read_run(self, run_id: str) -> Any:
        return ask(f"{PREFECT}/flow_runs/{run_id}", password=self.prefect)["state"]

    def wait_run(self, run_id: str) -> str:
        """Return the name of the state that a run ended in."""

        def find() -> Any:
            state = self.read_run(run_id)
            return state if state["type"] in ENDED else None

        state = wait_for(find, f"the end of run {run_id}")
        say(f"     the run ended as {state['name']}: {state['message']}")
        return str(state["name"])

    def retrain(self, ends: set[str]) -> None:
        found = self.wait_run(self.start_run())
        expect(found in ends, f"the retrain ended as {found}; expected one of {sorted(ends)}")

    def wait_servers(self, digest: str) -> float:
        """Return how long it took until both servers have that model."""
        begun = time.monotonic()
        for server in SERVERS.values():
            wait_for(lambda at=server: ask(f"{at}/model")["digest"] == digest, f"{server} with {digest[:12]}")
        return time.monotonic() - begun

    def read_facts(self) -> dict[str, Any]:
        """What must be the same after down and up."""
        history = json.loads(in_worker("visionloop", "history", "--json"))
        runs = ask(f"{MLFLOW}/api/2.0/mlflow/experiments/search?max_results=50", password=self.mlflow)["experiments"]
        ids = [one["experiment_id"] for one in runs]
        found = ask(f"{MLFLOW}/api/2.0/mlflow/runs/search", {"experiment_ids": ids, "max_results": 500}, self.mlflow)
        ended = {"flow_runs": {"state": {"type": {"any_": sorted(ENDED)}}}}
        return {
            "ledger": history,
            "dataset": in_worker("cat", "data/dataset.json"),
            "runs in MLflow": sorted(one["info"]["run_id"] for one in found["runs"]),
            "runs in Prefect": ask(f"{PREFECT}/flow_runs/count", ended, self.prefect),
        }


def read_champion() -> str:
    return str(json.loads(in_worker("visionloop", "history", "--json"))["entries"][0]["bundle"])


def query(expression: str) -> dict[str, float]:
    """Return what Prometheus knows, by the address it has it from."""
    answer = ask(f"{PROMETHEUS}/query?{urllib.parse.urlencode({'query': expression})}")
    return {one["metric"].get("instance", ""): float(one["value"][1]) for one in answer["data"]["result"]}


def check_figures(champion: str) -> None:
    """Prometheus reads both servers and the loop, whose figures name the champion; it knows an Alertmanager."""
    info = f'visionloop_loop_champion_info{{bundle="{champion}"}}'
    wait_for(lambda: query("up == 1").keys() == SCRAPED, f"{sorted(SCRAPED)} are scraped")
    wait_for(lambda: query(info) == {"figures:9101": 1}, "the figures of the loop name the champion")
    problems = query("visionloop_loop_problems")
    expect(problems == {"figures:9101": 0}, f"parts of the loop that figures cannot read: {problems}")
    found = ask(f"{PROMETHEUS}/alertmanagers")["data"]["activeAlertmanagers"]
    expect(len(found) == 1, f"Prometheus sends alerts to {found}; expected one Alertmanager")
    say(f"ok   Prometheus scrapes {', '.join(sorted(SCRAPED))}; the loop's figures name the champion")


def set_params(**values: object) -> None:
    """Give keys of the team's params.yaml other values."""
    for key, value in values.items():
        in_worker("sed", "-i", f"s/^\\(  *\\){key}: [^ ]*/\\1{key}: {value}/", "params.yaml")
        expect(f"{key}: {value}" in in_worker("cat", "params.yaml"), f"params.yaml has no {key}")


def run_loop(stack: Stack) -> None:
    """A first model, weak on purpose; then a better one, while clients ask."""
    set_params(max_epochs=1, accuracy=0.2)
    say("ingest: " + in_worker("visionloop", "ingest").strip().replace("\n", "; "))
    stack.retrain({"Promoted"})
    first = read_champion()
    say(f"ok   the first champion is {first[:12]}; both servers have it after {stack.wait_servers(first):.0f} s")
    set_params(max_epochs=6)
    with stack.clients() as clients:
        stack.retrain({"Promoted"})
        second = read_champion()
        took = stack.wait_servers(second)
    expect(set(clients.digests) == {first, second}, f"answers were of {dict(clients.digests)}")
    say(f"ok   the second is {second[:12]}; both servers have it {took:.0f} s later; {clients.describe()}")
    check_figures(second)


def kill_server(stack: Stack) -> None:
    with stack.clients() as clients:
        kill("server-1")
        time.sleep(15)
        start("server-1")
        wait_for(lambda: ask(f"{SERVERS['server-1']}/health/ready"), "server-1 ready again")
    say(f"ok   server-1 killed: {clients.describe()}")


def kill_store(stack: Stack) -> None:
    """The servers answer on, one of them is even started anew; what they wrote down waits."""
    with stack.clients() as clients:
        kill("s3")
        time.sleep(10)
        run("docker", "restart", "visionloop-server-2-1")
        wait_for(lambda: ask(f"{SERVERS['server-2']}/health/ready"), "server-2 ready without the store")
        time.sleep(10)
        start("s3")
        wait_for(lambda: ask("http://127.0.16.12:8333/healthz") is not None, "the store again")
        before = len(clients.acknowledged)
        wait_for(lambda: len(clients.acknowledged) > before + 2, "labels are taken again")
    say(f"ok   s3 killed, and server-2 started without it: {clients.describe()}")
    count_answers(clients)


def count_answers(clients: Clients) -> None:
    """Each answer of a time in which no server died comes into the log."""
    wait_for(lambda: set(clients.answered) <= list_stored("predictions"), "all answers are in the log")
    say(f"ok   all {len(clients.answered)} answers are in the log of the store")


def kill_in_retrain(stack: Stack, victim: str, url: str, learning_rate: str) -> None:
    """A model is trained while a part is away. Whatever becomes of that run, the next one ends with a decision."""
    set_params(learning_rate=learning_rate)
    with stack.clients() as clients:
        run_id = stack.start_run()
        wait_for(lambda: stack.read_run(run_id)["type"] == "RUNNING", "the retrain runs")
        time.sleep(10)
        kill(victim)
        time.sleep(20)
        start(victim)
        wait_for(lambda: ask(url), f"{victim} again")
        first = stack.wait_run(run_id)
        if first not in DECIDED:
            stack.retrain(DECIDED)
    stack.wait_servers(read_champion())
    say(f"ok   {victim} killed in a retrain, which ended as {first}: {clients.describe()}")


def run_kills(stack: Stack) -> None:
    kill_server(stack)
    kill_store(stack)
    kill_in_retrain(stack, "mlflow", f"{MLFLOW}/health", "1.9e-3")
    kill_in_retrain(stack, "postgres", f"{PREFECT}/health", "1.8e-3")


def run_again(stack: Stack) -> None:
    """Down and up: all of it is there."""
    before, champion = stack.read_facts(), read_champion()
    compose("down")
    compose("up", "--detach", "--no-build", "--wait")
    stack.wait_servers(champion)
    wait_for(lambda: ask(f"{PREFECT}/ready", password=stack.prefect), "Prefect")
    after = stack.read_facts()
    for what, found in before.items():
        expect(found == after[what], f"{what} before: {found}; after down and up: {after[what]}")
    stack.check_labels()
    with stack.clients() as clients:
        stack.retrain(DECIDED)
    check_figures(read_champion())
    say(f"ok   down and up: {', '.join(before)} and {len(stack.said)} labels are there; {clients.describe()}")


STEPS = {"loop": run_loop, "kills": run_kills, "again": run_again}

if __name__ == "__main__":
    stack = Stack(Path(sys.argv[1]))
    try:
        for step in sys.argv[2:] or STEPS:
            STEPS[step](stack)
    except (Unexpected, OSError) as exc:
        say(f"NOT  {exc}")
        sys.exit(1)
