"""The whole loop, as `make demo-loop` tells it: drift, alarm, labels, a retrain, a swap, a rollback, and a night.

Once with all that is real. The short one runs flows and commands here, without a Prefect server, on shapes.
"""

import importlib
import io
import json
import shutil
import subprocess
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageOps

from shapes import ROOT, make_environment, open_home, visionloop_here, write_shapes

SECTIONS = """
ingest: {sources: [{kind: review}]}
serve: {poll_s: 0.2, log_flush_s: 1, keep_images: {random: 1.0, per_hour: 100000}}
monitor: {window_hours: 1, block_hours: 0, false_alarm_days: 4}
triggers: {drift_windows: 1, warmup_hours: 0, cooldown_hours: 0}
"""
WAKES = {"visionloop.dataset.new", "visionloop.drift", "visionloop.quality"}


def check(home: Path, name: str, client: Any, told: str) -> None:
    """Nothing has failed, it has learned, and the ledger and the triggers tell the same story."""
    store = home / ".visionloop" / "store"
    assert client.failed == [], "no request fails while a model is swapped"
    assert (client.answers[0][0], client.answers[-1][0]) == ("1", "1")
    entries = [json.loads(path.read_text()) for path in sorted((store / "ledger" / name).iterdir())]
    assert [entry["action"] for entry in entries] == ["promote", "promote", "rollback"]
    assert entries[2]["bundle"] == entries[0]["bundle"] != entries[1]["bundle"]
    decisions = [json.loads(path.read_text()) for path in sorted((store / "triggers" / name).iterdir())]
    assert [one["outcome"] for one in decisions] == ["held", "retrain"]
    for line in (f"monitor/{name} ended as Drift", f"retrain/{name}-if-due ended as Promoted", f"retrain/{name} ended"):
        assert line in told, told
    assert "rollback" in told.rpartition("$ visionloop history")[2], "history tells it"


@pytest.mark.long
def test_the_loop_closes_and_what_a_person_put_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "flows"))
    module, lines = importlib.import_module("demo_loop"), list[str]()
    client = module.run_demo(tmp_path / "ws", lines.append)
    check(tmp_path / "ws", "demo-loop", client, "\n".join(lines))
    shares = client.measure()
    assert shares["2"] > shares["1"] + 0.1, "it has learned the new look"


def test_a_run_is_started_once_though_the_database_of_prefect_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again, with the key of the first time; not for ever, and not after another error."""
    monkeypatch.syspath_prepend(str(ROOT / "flows"))
    module, asked, codes = importlib.import_module("demo_loop"), list[tuple[str, Any]](), [503, 200, 503, 500, 201]

    def answer(method: str, url: str, *, json: Any, **_: Any) -> httpx.Response:
        asked.append((url.removeprefix("http://prefect/"), json))
        return httpx.Response(codes.pop(0), json={"id": "7"}, request=httpx.Request(method, url))

    monkeypatch.setattr(module.httpx, "request", answer)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    demo = module.Demo(Path(), print, api="http://prefect")
    demo.start("monitor/pets", now="03:00")
    assert [path for path, _ in asked] == ["deployments/name/monitor/pets"] * 2 + ["deployments/7/create_flow_run"] * 3
    assert asked[2][1]["parameters"] == {"now": "03:00"}
    assert len({body["idempotency_key"] for _, body in asked[2:]}) == 1
    for code, number in ((503, module.TRIES), (404, 1)):
        codes[:], asked[:] = [code] * 100, []
        with pytest.raises(httpx.HTTPStatusError, match=str(code)):
            demo.start("monitor/pets")
        assert len(asked) == number


class Here:
    """Runs flows in this process, and starts what an event starts, as the deployments say it to Prefect."""

    def __init__(self, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.demo, self.ended, self.keys = demo, dict[str, list[Any]](), set[str]()
        self.flows = {name: importlib.import_module(name) for name in ("monitor", "ingest", "retrain")}
        told, steps = importlib.import_module("told"), importlib.import_module("steps")
        monkeypatch.setattr(told, "emit_event", self.emit)
        for module, name in (
            (told, "create_markdown_artifact"),
            (told, "create_image_artifact"),
            (self.flows["retrain"], "create_markdown_artifact"),
            (self.flows["retrain"], "create_table_artifact"),
        ):
            monkeypatch.setattr(module, name, lambda value, *, key, description: self.keys.add(key))
        monkeypatch.setattr(steps, "say", lambda line: None)
        monkeypatch.setattr(steps, "note", lambda line: None)
        monkeypatch.setattr(steps, "run_step", lambda name, work: work())
        monkeypatch.setattr(self.flows["retrain"].shell, "guard_own_server", lambda: None)

    def emit(self, *, event: str, resource: Mapping[str, str], payload: Any) -> None:
        if event in WAKES:
            self.run(f"retrain/{self.demo.name}-if-due", only_if_due=True)

    def run(self, deployment: str, **parameters: Any) -> None:
        flow = deployment.partition("/")[0]
        if "now" in parameters:
            parameters["now"] = datetime.fromisoformat(parameters["now"])
        state = getattr(self.flows[flow], flow).fn(str(self.demo.home), **parameters)
        self.ended.setdefault(deployment, []).append(state)

    def wait_for_run(self, deployment: str, number: int = 1) -> str:
        state = self.ended[deployment][number - 1]
        self.demo.tell(f"  {deployment} ended as {state.name}: {state.message}")
        return str(state.name)


def make_photos(module: Any, folder: Path) -> Any:
    """Shapes as the old camera takes them, and as a new one does."""
    paths = sorted(write_shapes(folder, 120, seed=9).glob("*/*.png"))
    chosen = [paths[k] for k in np.random.default_rng(0).permutation(len(paths))]
    anew = []
    for path in chosen:
        sink = io.BytesIO()
        with Image.open(path) as image:
            ImageOps.invert(image.convert("RGB")).save(sink, "PNG")
        anew.append(sink.getvalue())
    return module.Photos([path.read_bytes() for path in chosen], anew, [path.parent.name for path in chosen])


def set_state(home: Path) -> None:
    """Let the last decision be one under the params as they are now: or to retrain for them would be due."""
    place = open_home(home)
    (path,) = (home / ".visionloop" / "store" / "decisions" / "shapes").glob("*.json")
    decision = json.loads(path.read_text())
    decision["state"] |= {"params": place.params.digest()}
    path.write_text(json.dumps(decision))


def test_the_loop_closes_without_a_server_of_prefect(
    retrained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "flows"))
    module, lines = importlib.import_module("demo_loop"), list[str]()
    home = Path(shutil.copytree(retrained[0], tmp_path / "ws", symlinks=True))
    params = home / "params.yaml"
    params.write_text(params.read_text().replace("gate: {", "gate: {rule: no_worse, margin: 0.99, ") + SECTIONS)
    set_state(home)
    for name, value in make_environment().items():
        monkeypatch.setenv(name, value)
    commands = {**vars(subprocess), "run": lambda command, *, cwd, **_: visionloop_here(cwd, *command[3:])}
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(**commands))
    demo = module.Demo(home, lines.append, name="shapes", env=make_environment())
    here = Here(demo, monkeypatch)
    monkeypatch.setattr(demo, "start", here.run)
    monkeypatch.setattr(demo, "wait_for_run", here.wait_for_run)
    photos = make_photos(module, tmp_path / "more")
    with module.serve(demo) as url:
        client = module.Client(url, photos)
        thread = threading.Thread(target=client.run, daemon=True)
        module.wait_for_the_hour(lines.append)
        thread.start()
        try:
            module.tell_story(demo, client)
        finally:
            client.stop()
            thread.join()
    check(home, "shapes", client, "\n".join(lines))
    assert {key.rpartition("-")[2] for key in here.keys} >= {"models", "confusion"}
