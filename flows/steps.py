"""The steps of a retrain as Prefect tasks, which try again what is transient; and the last one, which asks the server.

Results are small JSON values: paths, digests, counts.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from visionloop.data.manifest import load_pin, make_image_key
from visionloop.data.parts import iterate_records
from visionloop.errors import ServingError, VisionLoopError
from visionloop.records import LABEL_SEPARATOR, ImageRecord
from visionloop.serving.check import run_own_server
from visionloop.workspace import Workspace, open_workspace

RETRIES = 2
RETRY_DELAY_S = 4


def is_transient(task: Any, run: TaskRun, state: State[Any]) -> bool:
    """Say whether trying again may help, and tell it: a typo in params.yaml stays a typo."""
    error = state.result(raise_on_failure=False)
    if not (isinstance(error, VisionLoopError) and error.transient):
        return False
    again = f"trying again in {RETRY_DELAY_S} s (try {run.run_count + 1} of {RETRIES + 1})"
    say(f"  {error.where}: {error.found}; {again}")
    return True


def say(line: str) -> None:
    """Tell the person who waits, and the log: lines marked so are shown on the terminal."""
    get_run_logger().info(line, extra={"told": True})


def note(line: str) -> None:
    """Tell the log alone."""
    get_run_logger().debug(line)


def run_step(name: str, work: Callable[[], Any]) -> Any:
    """Run a step of a retrain as a task: what is transient is tried again."""
    options = {"retries": RETRIES, "retry_delay_seconds": RETRY_DELAY_S, "retry_condition_fn": is_transient}
    return task(work, name=name, cache_policy=NO_CACHE, **options)()


def ask(home: str, tell: Callable[[str], None], number: int = 3) -> list[dict[str, Any]]:
    """Start the server on a free port, ask it about held-out images over HTTP, stop it; return the answers."""
    workspace = open_workspace(Path(home))
    chosen = _choose_held_out(workspace, number)
    answers = []
    with (
        run_own_server(workspace.settings.home) as url,
        httpx.Client(base_url=url, timeout=30, trust_env=False) as client,
    ):
        tell(f"  server at {url}")
        for record in chosen:
            data = workspace.store.get(make_image_key(record.sha256))
            try:
                body = client.post("/predict", content=data).raise_for_status().json()
            except httpx.HTTPError as exc:
                raise ServingError("server", f"did not answer ({exc})", "an answer") from exc
            answer = {k: body[k] for k in ("prediction", "confidence", "labels") if k in body}
            answers.append({**answer, "actual": LABEL_SEPARATOR.join(record.labels), "origin": record.origins[0]})
            tell(f"  asked about {describe_asked(record.labels, body)} ({body['confidence']:.1%})")
    return answers


def describe_asked(labels: Sequence[str], body: Mapping[str, Any]) -> str:
    """Tell what an image is and what the server says: `a ring: disc`, or with several labels `disc, ring: disc`."""
    if "labels" not in body:
        return f"a {labels[0]}: {body['prediction']}"
    return f"an image of {', '.join(labels) or 'nothing'}: {', '.join(body['labels']) or 'nothing'}"


def _choose_held_out(workspace: Workspace, number: int) -> list[ImageRecord]:
    """Choose test images spread over the classes."""
    records = iterate_records(workspace.store, load_pin(workspace.settings.pin_path))
    tests = sorted((r for r in records if r.side == "test" and r.labels), key=lambda r: (r.labels, r.sha256))
    spread = [len(tests) * (2 * i + 1) // (2 * number) for i in range(number)]
    return [tests[i] for i in dict.fromkeys(spread) if i < len(tests)]
