"""How flows end, as Prefect shows it: a page for each end, no green for what was not promoted. Without Prefect."""

import base64
import importlib
import socket
import types
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.results import get_result_store
from prefect.states import Cancelled, Cancelling, Crashed, Failed, Pending, Running, State

from shapes import ROOT
from visionloop.errors import StoreError
from visionloop.words import Summary
from watched import make_watched


class Kept:
    """The modules of the flows, and the artifacts that they have kept: by key, the newest of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(ROOT / "flows"))
        self.told, self.retrain = importlib.import_module("told"), importlib.import_module("retrain")
        self.found: dict[str, Any] = {}
        for module, name in (
            (self.told, "create_markdown_artifact"),
            (self.told, "create_image_artifact"),
            (self.retrain, "create_markdown_artifact"),
            (self.retrain, "create_table_artifact"),
        ):
            monkeypatch.setattr(module, name, self.keep)

    def keep(self, value: Any, *, key: str, description: str) -> None:
        assert key == key.lower().replace("_", "-"), "what Prefect takes as a key"
        self.found[key] = value

    def get(self, end: str) -> Any:
        (key,) = (key for key in self.found if key.endswith(end))
        return self.found[key]


def make_run(**parameters: str) -> Any:
    return types.SimpleNamespace(name="blue-fox", id="0123", parameters=parameters)


def test_each_bad_end_has_a_page_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    kept, flow, run = Kept(monkeypatch), types.SimpleNamespace(name="ingest"), make_run(workspace=str(tmp_path))
    error = StoreError("store", "is away", "an answer", "Wait.")
    kept.told.keep_failed(flow, run, Failed(data=error))
    kept.told.keep_crashed(flow, run, Crashed(message="exited with status code -9"))
    kept.told.keep_cancelled(flow, run, Cancelling())
    whose = f"\n\nRun `blue-fox (0123)` of the flow `ingest` in the workspace `{tmp_path}`.\n"
    assert kept.get("-failed") == (
        "# pets: ingest failed\n\nerror: store: is away; expected an answer. Wait.\n\n"
        f"Mend what it says, and run it again: it goes on where it was.{whose}"
    )
    assert kept.get("-crashed").startswith(
        "# pets: ingest crashed\n\nexited with status code -9\n\nIts process is gone"
    )
    assert kept.get("-cancelled").startswith("# pets: ingest cancelled\n\nIt was cancelled.\n\nSomebody stopped it.")
    assert [key.rsplit("-", 2)[0] for key in kept.found] == ["ingest-pets"] * 3
    (tmp_path / "params.yaml").write_text("name: [\n")
    kept.told.keep_failed(flow, run, Failed(data=ValueError("odd")))
    assert "ingest failed\n\nValueError: odd\n" in kept.get(
        f"{kept.told.make_key('ingest', *name_of(tmp_path))}-failed"
    )
    kept.told.keep_failed(flow, run, Failed(data=OSError("postgresql://me:secret@db/x?sslkey=1 is away")))
    assert "OSError: postgresql://***@db/x?... is away" in kept.get(
        f"{kept.told.make_key('ingest', *name_of(tmp_path))}-failed"
    )
    kept.told.keep_crashed(flow, make_run(), Crashed())  # a flow that is not ours


def name_of(folder: Path) -> tuple[str, Path]:
    return "".join(c if c.isalnum() else "-" for c in folder.name.lower()).strip("-"), folder


@pytest.mark.parametrize(
    ("outcome", "verdict", "end"),
    [
        ("promoted", "passed", ("Promoted", "COMPLETED")),
        ("unchanged", "passed", ("Unchanged", "COMPLETED")),
        ("same", "same", ("Same", "COMPLETED")),
        ("refused", "refused", ("Refused", "CANCELLED")),
        ("inconclusive", "inconclusive", ("Inconclusive", "CANCELLED")),
        ("waiting", "waiting", ("Waiting", "CANCELLED")),
        ("unchanged", "refused", ("Unchanged", "CANCELLED")),
    ],
)
def test_what_is_not_promoted_is_not_green(
    outcome: str, verdict: str, end: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, place = Kept(monkeypatch), make_watched(tmp_path).place
    summary = Summary("fake", outcome, "so it is", verdict=verdict)
    state = kept.retrain.finish(summary, place)
    assert (state.name, state.type.value, state.message) == (*end, "so it is")
    assert state.result(raise_on_failure=False) == summary
    assert [text.splitlines()[0] for text in kept.found.values()] == ["# fake: so it is"]


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (Cancelled(name="Skipped", message="retrain pets: is under way"), "error: retrain pets: is under way\n"),
        (Cancelled(), "error: the run was cancelled in Prefect\n"),
        # As Prefect's engine returns it: with what is to be kept of nothing.
        (
            Cancelled(name="Skipped", message="is under way", data=get_result_store().create_result_record(None)),
            "error: is under way\n",
        ),
    ],
)
def test_a_run_that_is_skipped_or_cancelled_ends_the_shell_with_one_line(
    end: State[Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "flows"))
    shell = importlib.import_module("shell")
    monkeypatch.setenv("VISIONLOOP_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr(shell.signal, "signal", lambda *_: None)
    monkeypatch.setattr(shell, "_open_log", lambda folder: tmp_path / "retrain.log")
    monkeypatch.setattr(shell, "_run_marked", lambda flow, home: end)
    assert (shell.run(None), capsys.readouterr().err) == (2, said)


def test_a_prefect_that_does_not_answer_is_one_line_without_its_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "flows"))
    shell = importlib.import_module("shell")
    monkeypatch.setenv("VISIONLOOP_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", "http://ann:s3cret@127.0.0.1:9/api")
    monkeypatch.setattr(shell.signal, "signal", lambda *_: None)
    monkeypatch.setattr(shell, "_open_log", lambda folder: tmp_path / "retrain.log")
    assert shell.run(None) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: PREFECT_API_URL: http://***@127.0.0.1:9/api does not answer (")
    assert said.err.endswith("Start it, or unset PREFECT_API_URL: then one is started for this run.\n")
    assert "s3cret" not in said.out + said.err


def test_the_candidate_stands_beside_the_champion_and_a_picture_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, place = Kept(monkeypatch), make_watched(tmp_path).place
    figures = place.settings.reports_dir / "figures"
    figures.mkdir(parents=True)
    (figures / "confusion.png").write_bytes(b"picture")
    accuracy = {"value": 0.9, "low": 0.8, "high": 0.95}
    decision = types.SimpleNamespace(
        number=4,
        metrics={"accuracy": accuracy, "auc": accuracy},
        champion_metrics={"accuracy": accuracy | {"low": None}},
    )
    monkeypatch.setattr(kept.retrain, "latest_decision", lambda store, name: decision)
    kept.retrain.finish(Summary("fake", "refused", "no", verdict="refused"), place)
    assert kept.get("-models") == [
        {"figure": "accuracy", "candidate": "0.9000 (95 %: 0.8000 to 0.9500)", "champion": "0.9000 (too few images)"},
        {"figure": "auc", "candidate": "0.9000 (95 %: 0.8000 to 0.9500)", "champion": ""},
    ]
    assert kept.get("-confusion") == f"data:image/png;base64,{base64.b64encode(b'picture').decode()}"
    del kept.found[next(key for key in kept.found if key.endswith("-confusion"))]
    (figures / "confusion.png").write_bytes(b"x" * 300_001)
    kept.retrain.finish(Summary("fake", "refused", "no", verdict="refused"), place)
    assert not any(key.endswith("-confusion") for key in kept.found), "what is large stays where it is"


NOW = datetime(2026, 11, 29, 3, tzinfo=UTC)
GONE, LIVES = "gone", "lives"


def make_open_run(state: State[Any], marks: list[str], *, deployed: bool = True, pool: str = "", **more: Any) -> Any:
    tags = ["visionloop", "pets", f"on {socket.gethostname()}", *(f"process:{mark}" for mark in marks)]
    facts = {"tags": tags, "deployment_id": "7" if deployed else None, "work_pool_name": pool or None, "run_count": 1}
    return types.SimpleNamespace(**{"parameters": {"workspace": "/ws"}, **facts, "state": state, **more})


def waited(minutes: int) -> State[Any]:
    state: State[Any] = Pending()
    state.timestamp = NOW - timedelta(minutes=minutes)
    return state


@pytest.mark.parametrize(
    ("run", "is_left"),
    [
        (make_open_run(Running(), [f"1:{GONE}"]), True),
        (make_open_run(Cancelling(), [f"1:{GONE}"]), True),
        (make_open_run(Running(), [f"1:{LIVES}"]), False),
        (make_open_run(Running(), [f"1:{GONE}"], parameters={"workspace": "/another"}), False),
        (make_open_run(Running(), [f"1:{GONE}"], parameters={}), False),
        # Somebody has started it again, and its new process has not put its mark yet.
        (make_open_run(Running(), [f"1:{GONE}"], run_count=2), False),
        (make_open_run(waited(60), [f"1:{GONE}"]), False),
        # One from the shell has its mark from the first; nobody starts it again.
        (make_open_run(waited(0), [f"0:{GONE}"], deployed=False), True),
        (make_open_run(waited(60), [f"0:{LIVES}"], deployed=False), False),
        (make_open_run(waited(60), [], deployed=False), False),
        # One that was handed to a process of this machine, which has never begun it; workers may take longer.
        (make_open_run(waited(11), []), True),
        (make_open_run(waited(9), []), False),
        (make_open_run(waited(11), [], pool="boxes"), False),
        (make_open_run(waited(11), [], tags=["visionloop", "pets", "on another machine"]), False),
        (make_open_run(Running(), []), False),
    ],
)
def test_run_is_closed_only_where_it_is_sure_that_it_has_no_process(
    monkeypatch: pytest.MonkeyPatch, run: Any, is_left: bool
) -> None:
    told = Kept(monkeypatch).told
    monkeypatch.setattr(told, "is_gone", lambda mark: mark == GONE)
    assert told.is_left(run, Path("/ws"), NOW) is is_left
