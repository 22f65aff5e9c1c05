"""The supervisor, with small real processes: order, restarts, what is waited for, and nothing left at the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fakes import run_here
from visionloop.cli.stages import _find_prefect
from visionloop.cli.up import describe_parts
from visionloop.errors import BusyError, ServingError
from visionloop.lifetime import MARK_VARIABLE
from visionloop.up import supervise
from visionloop.up.board import STOPPING, UP, Board, PartState, State, choose_port, is_free, name_server
from visionloop.up.parts import Part, _make_prefect, ask
from visionloop.up.supervise import Supervisor, read_reason, stop_left

SLEEP = (sys.executable, "-c", "import time; time.sleep(100)")
# A child that ignores SIGTERM, in a session of its own: as a training that a flow has started.
STRAY = (
    "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
    "'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)'], start_new_session=True);"
    "time.sleep(100)"
)


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    for name, seconds in {"TICK_S": 0.02, "LOOK_EVERY_S": 0.05, "LEFT_S": 0.3}.items():
        monkeypatch.setattr(supervise, name, seconds)
    board = Board(tmp_path)
    board.folder.mkdir()
    return board


def make_part(name: str, command: tuple[str, ...] = SLEEP, **facts: Any) -> Part:
    return Part(name, name, command, **{"is_well": lambda: True, **facts})


def run(board: Board, parts: list[Part], act: Callable[[], None] = lambda: None) -> tuple[list[str], str]:
    """Run a supervisor; once all is up `act` runs in a thread, and then all is stopped. Return its lines and mark."""
    lines: list[str] = []
    environment = {**os.environ, "VISIONLOOP_HOME": str(board.folder)}
    supervisor = Supervisor(board, parts, environment, lines.append)
    failed: list[BaseException] = []

    def act_and_stop() -> None:
        try:
            act()
        except BaseException as exc:
            failed.append(exc)
        os.kill(os.getpid(), signal.SIGTERM)

    supervisor.run(lambda: threading.Thread(target=act_and_stop).start())
    if failed:
        raise failed[0]
    return lines, supervisor.mark


def wait_for(board: Board, holds: Callable[[State], Any]) -> State:
    deadline = time.monotonic() + 120
    while not ((state := board.read()) and holds(state)):
        assert time.monotonic() < deadline, state
        time.sleep(0.02)
    return state


def find_part(state: State, name: str) -> Any:
    return next(part for part in state.parts if part.name == name)


def find_marked(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK_VARIABLE) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def test_a_part_that_is_killed_is_started_again_and_all_is_stopped_at_the_end(board: Board) -> None:
    def act() -> None:
        first = find_part(wait_for(board, lambda state: state.phase == UP), "stray")
        assert first.log == ".visionloop/up/stray.log"
        os.kill(first.pid, signal.SIGKILL)
        again = find_part(wait_for(board, lambda s: find_part(s, "stray").restarts == 1), "stray")
        assert again.pid != first.pid

    lines, mark = run(board, [make_part("one"), make_part("stray", (sys.executable, "-c", STRAY))], act)
    assert any("was killed (signal 9); starts again in 1 s" in line for line in lines), lines
    assert lines[-1] == "stopped"
    assert find_marked(mark) == [], "also what has left its group and ignores SIGTERM"
    state = board.read()
    assert state is not None
    assert (state.phase, {part.state for part in state.parts}, state.is_well) == (STOPPING, {"stopped"}, False)


def test_a_part_that_was_killed_is_not_given_its_last_words_as_the_reason(board: Board) -> None:
    """What a server says when it is up explains no kill; of one that is up again there is no reason at all."""
    talker = make_part("talker", (sys.executable, "-uc", "import time; print('running on http'); time.sleep(100)"))

    def act() -> None:
        first = find_part(wait_for(board, lambda state: state.phase == UP), "talker")
        while "running on http" not in (board.folder / "talker.log").read_text():
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
        wait_for(board, lambda s: find_part(s, "talker").restarts == 1)

    lines, _ = run(board, [talker], act)
    assert any("was killed (signal 9); starts again in 1 s" in line for line in lines), lines
    part = PartState("talker", "talker", "starting", restarts=1)
    assert describe_parts(State(1, "m", UP, "2026-11-29T08:00:00+00:00", (part,)))[1] == (
        "  talker     starting    started again 1 x"
    )


def test_a_part_waits_for_what_it_needs_and_for_its_time(board: Board) -> None:
    reasons = ["no champion yet", "no champion yet"]
    late = make_part("late", hold=lambda: reasons.pop() if reasons else "", is_vital=False)
    parts = [late, make_part("second", needs="first"), make_part("first")]
    lines, _ = run(board, parts, lambda: wait_for(board, lambda s: find_part(s, "late").state == "ready") and None)
    told = [line.split(" (log")[0].split(" after")[0].strip() for line in lines]
    order = ["  ".join(line.split()) for line in told[:-2]]
    assert order.index("late  waiting:  no  champion  yet") < order.index("late  starting")
    assert order.index("first  ready") < order.index("second  starting")


def test_a_vital_part_that_does_not_start_leaves_nothing_running(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "MAX_FAILURES", 1)
    broken = make_part(
        "broken", (sys.executable, "-c", "print('no space left'); raise SystemExit(2)"), is_well=lambda: False
    )
    with pytest.raises(ServingError, match=r"^broken: did not start: ended with code 2: no space left; starts again"):
        run(board, [make_part("one"), broken])
    state = board.read()
    assert state is not None
    assert find_marked(state.mark) == []


def test_a_part_that_can_be_done_without_may_fail(board: Board) -> None:
    broken = make_part("server", (sys.executable, "-c", "raise SystemExit(2)"), is_vital=False, is_well=lambda: False)
    lines, _ = run(board, [make_part("one"), broken])
    assert any("restarting: ended with code 2; starts again in 1 s" in line for line in lines), lines


def test_a_part_is_started_anew_when_its_params_have_changed(board: Board) -> None:
    prints = ["a"]
    part = make_part("server", fingerprint=lambda: prints[0])

    def act() -> None:
        first = find_part(wait_for(board, lambda state: state.phase == UP), "server").pid
        prints[0] = ""  # a broken params.yaml changes nothing
        time.sleep(0.5)
        assert find_part(wait_for(board, lambda state: True), "server").pid == first
        prints[0] = "b"
        wait_for(board, lambda s: find_part(s, "server").pid not in (0, first))

    lines, _ = run(board, [part], act)
    assert "server: params.yaml has changed, it is started anew" in lines


def test_what_a_killed_supervisor_has_left_is_found(board: Board) -> None:
    left = psutil.Popen(SLEEP, env={**os.environ, MARK_VARIABLE: "feed"})
    board.write(State(1, "feed", UP, ""))
    with board.lock():
        assert stop_left(board) == 1
        with pytest.raises(BusyError, match="is running for this workspace"), board.lock():
            pass
        assert board.read_live() is None, "the one that holds the lock has told nothing yet"
        board.write(State(os.getpid(), "beef", UP, ""))
        assert board.read_live() is not None
    assert not psutil.pid_exists(left.pid)
    assert board.read_live() is None, "nobody holds the lock"
    (board.folder / "state.json").write_text("{")
    assert board.read() is None
    assert stop_left(board) == 0


def test_ports_are_kept_and_one_that_is_taken_moves(board: Board) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        first, told = board.choose_ports({"home": taken, "server": taken}, {})
        assert taken not in first.values()
        assert len(set(first.values())) == 2
        assert told[0] == f"port {taken} is in use: home takes {first['home']}"
        with pytest.raises(ServingError, match=f"port 127.0.0.1:{taken}: is in use; expected a free port for home"):
            board.choose_ports({"home": 1}, {"home": taken})
        assert not is_free(taken)
        assert choose_port(taken) != taken
    again, told = board.choose_ports({"home": taken, "server": first["server"]}, {})
    assert again == first, "as last time"
    free = f"but {taken} is free: remove {board.folder}/ports.json to have it"
    assert told == [f"ports as last time, {free}"]
    assert board.choose_ports({"home": taken}, {"home": first["home"]})[1] == [], "a person asked for it"
    (board.folder / "ports.json").write_text('{"home": "x", "server": 70000}')
    again, _ = board.choose_ports({"home": first["home"]}, {})
    assert again == {"home": first["home"]}


def test_a_full_disk_ends_nothing(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {"write": 3, "start": 1}

    def fail_first(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **options: Any) -> Any:
            faults[what] -= 1
            if faults[what] >= 0:
                raise OSError(28, "No space left on device")
            return work(*args, **options)

        return act

    monkeypatch.setattr(Board, "write", fail_first("write", Board.write))
    monkeypatch.setattr(supervise, "start_apart", fail_first("start", supervise.start_apart))
    lines, _ = run(board, [make_part("one")], lambda: wait_for(board, lambda state: state.phase == UP) and None)
    assert "  one        restarting: cannot be started: No space left on device; starts again in 1 s" in lines
    assert max(faults.values()) < 0


def test_all_is_stopped_where_nobody_can_be_told(board: Board) -> None:
    def tell(line: str) -> None:
        if line.startswith("stop"):
            raise OSError(5, "Input/output error")  # a terminal that was closed

    supervisor = Supervisor(board, [make_part("one")], {**os.environ, "VISIONLOOP_HOME": str(board.folder)}, tell)
    supervisor.run(lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert find_marked(supervisor.mark) == []
    state = board.read()
    assert state is not None
    assert [part.state for part in state.parts] == ["stopped"]


def test_nohup_keeps_the_end_of_a_terminal_away(board: Board) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        supervisor = Supervisor(board, [make_part("one")], {}, lambda line: None)
        with supervisor._taking_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert supervisor._num_signals == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert supervisor._num_signals == 1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_answers_in_another_tongue_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(b"220 mail.example.com ready\r\n")).start()
        assert ask(f"http://127.0.0.1:{other.getsockname()[1]}/health") is None
    assert ask("http://anna:secret@127.0.0.1/health") is None


def test_the_prefect_of_the_named_workspace_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    board = Board(tmp_path / ".visionloop")
    with board.lock():
        part = PartState("prefect", "Prefect", "ready", url="http://127.0.0.1:4200")
        board.write(State(os.getpid(), "feed", UP, "", (part,)))
        assert _find_prefect(tmp_path, {}) == "http://127.0.0.1:4200"
        monkeypatch.setenv("HOME", str(tmp_path.parent))
        assert _find_prefect(Path("~", tmp_path.name), {}) == "http://127.0.0.1:4200", "as the shell leaves it"
        assert _find_prefect(tmp_path, {"PREFECT_API_URL": "http://prefect:4200/api"}) == "", "another one is set"


def test_a_broken_params_file_keeps_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("name: pets\nservee: {}\n")
    hold = (
        "import os, pathlib, signal; from visionloop.up.board import UP, Board, PartState, State;"
        "board = Board(pathlib.Path('.visionloop')); lock = board.lock(); lock.__enter__();"
        "part = PartState('mlflow', 'MLflow', 'ready', url='http://127.0.0.1:5000');"
        "board.write(State(os.getpid(), 'feed', UP, '', (part,))); signal.pause()"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", hold])
    try:
        wait_for(Board(tmp_path / ".visionloop"), lambda state: state.is_live)
        assert run_here(monkeypatch, "status") == 2
        told = capsys.readouterr()
        assert "MLflow     ready       http://127.0.0.1:5000" in told.out
        assert told.err.startswith("error: params.yaml servee: unknown key")
        assert run_here(monkeypatch, "status", "--json") == 2
        found = json.loads(capsys.readouterr().out)
        assert (found["is_up"], found["loop"], "servee" in found["problem"]) == (True, None, True)
        assert run_here(monkeypatch, "down") == 0
        assert capsys.readouterr().out == "stopped\nnext: `visionloop up` starts it again\n"
        assert supervisor.wait(10) == -signal.SIGTERM
    finally:
        supervisor.kill()
        supervisor.wait()


def test_the_page_of_prefect_is_the_one_that_asks_nobody(tmp_path: Path) -> None:
    part = _make_prefect(tmp_path, 4321, None)
    assert part.environment["PREFECT_SERVER_UI_V2_ENABLED"] == "false"
    assert part.environment["PREFECT_SERVER_UI_API_URL"] == "http://127.0.0.1:4321/api"


def test_a_champion_that_is_served_is_named_by_its_address(board: Board) -> None:
    commands = {"compare runs": "visionloop ui", "serve the champion": "visionloop serve"}
    assert name_server(commands, board) == commands, "nothing is up"
    with board.lock():
        board.write(State(os.getpid(), "m", UP, "", (PartState("server", "server", "starting", url="http://x:8000"),)))
        assert name_server(commands, board) == commands, "it does not answer yet"
        board.write(State(os.getpid(), "m", UP, "", (PartState("server", "server", "ready", url="http://x:8000"),)))
        named = {"compare runs": "visionloop ui", "ask the champion": "http://x:8000"}
        assert name_server(commands, board) == named


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "Traceback (most recent call last):\nConnectionRefusedError: [Errno 111] Connection refused\n\nERROR:    "
            "Application startup failed. Exiting.\nServer stopped!\n",
            "ConnectionRefusedError: [Errno 111] Connection refused",
        ),
        ("socket.gaierror: [Errno -2] Name or service not known\nServer stopped!\n", "socket.gaierror: [Errno -2] "),
        ("error: serve: postgresql://ann:s3cret@db/x is away\n", "error: serve: postgresql://***@db/x is away"),
        ("one\n  no space left\n\n", "no space left"),
        ("ValueError: of the start before\n--- 03:00 -m prefect ...\nServer stopped!\n", "Server stopped!"),
        ("ValueError: of the start before\n--- 03:00 -m prefect ...\n", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_the_reason_is_the_last_error_that_a_part_has_named(tmp_path: Path, said: str | None, reason: str) -> None:
    log = tmp_path / "prefect.log"
    if said is not None:
        log.write_text(f"--- 02:59 -m prefect ...\n{said}")
    found = read_reason(log)
    assert found.startswith(reason) and bool(found) == bool(reason)
