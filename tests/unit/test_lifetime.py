"""No process outlives the one it works for, and none takes long to end. Real processes, killed for real."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from visionloop import lifetime

SLEEP = "import time; time.sleep(60)"
STAGE = "from visionloop.lifetime import die_with_parents; die_with_parents(); print('up', flush=True); " + SLEEP
PARENT = (
    "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE);"
    "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
)


def wait_until_gone(pid: int, limit_s: float = 60) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_stage_stops_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, STAGE], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    stage = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert wait_until_gone(stage)


def test_a_stage_stops_when_its_guardian_is_killed() -> None:
    guardian = subprocess.Popen([sys.executable, "-c", SLEEP])
    env = {**os.environ, "VISIONLOOP_GUARDIAN": str(guardian.pid)}
    stage = subprocess.Popen([sys.executable, "-c", STAGE], env=env, stdout=subprocess.PIPE)
    assert stage.stdout is not None
    stage.stdout.readline()
    assert stage.poll() is None
    guardian.kill()
    guardian.wait()
    assert stage.wait(timeout=60) == 143


CLOSES = (
    "import signal, sys, time\n"
    "def close(*args): time.sleep(0.5); print('closed', flush=True); sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, close); print('up', flush=True); time.sleep(60)"
)
BY_SHELL = "import subprocess, sys; subprocess.run(['sh', '-c', '\"$0\" -c \"$1\"; true', sys.executable, sys.argv[1]])"


def test_a_program_below_a_shell_closes_its_work_before_what_runs_it_ends() -> None:
    parent = subprocess.Popen([sys.executable, "-c", BY_SHELL, CLOSES], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "up\n"
    lifetime.stop_programs(parent, limit_s=60)
    assert parent.stdout.read() == "closed\n"
    assert parent.wait(60) == 0, "nobody ended it: its program had ended"


def test_another_program_is_stopped_with_us() -> None:
    other = subprocess.Popen([sys.executable, "-c", SLEEP])
    code = f"from visionloop.lifetime import stop_with_us; stop_with_us({other.pid}); print('up', flush=True); {SLEEP}"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    owner.stdout.readline()
    time.sleep(1.0)
    watcher = [p for p in psutil.Process(owner.pid).children() if "visionloop.lifetime" in p.cmdline()]
    assert len(watcher) == 1
    owner.kill()
    owner.wait()
    assert other.wait(timeout=60) == -signal.SIGTERM
    assert wait_until_gone(watcher[0].pid)


END = """
import atexit, sys, threading, time
from visionloop.lifetime import end_process

class Kept:
    def __del__(self):
        print("taken apart")

def wait_for_the_end():
    while not any(frame.f_code.co_name == "_shutdown" for frame in sys._current_frames().values()):
        time.sleep(0.01)

kept = Kept()
threading.Thread(target=lambda: (wait_for_the_end(), print("thread done"))).start()
atexit.register(print, "atexit done")
print("told", end="")
end_process(3)
"""


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_a_process_ends_in_order_without_taking_its_objects_apart() -> None:
    done = subprocess.run([sys.executable, "-c", END], env=BUFFERED, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "toldthread done\natexit done\n", "")


def test_ctrl_c_at_the_end_waits_for_no_thread_and_changes_no_exit_code() -> None:
    code = END.replace('print("thread done")', 'print("waits", flush=True), time.sleep(30)')
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"toldwaits\n"
        process.send_signal(signal.SIGINT)
        told, error = process.communicate(timeout=25)
    assert (process.returncode, told, error) == (3, b"atexit done\n", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_what_could_not_be_written_at_the_end_is_told() -> None:
    code = "from visionloop.lifetime import end_process; print('told'); end_process(0)"
    with Path("/dev/full").open("w") as full:
        pipes = {"stdout": full, "stderr": subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", code], env=BUFFERED, text=True, check=False, **pipes)
    assert (done.returncode, "No space left on device" in done.stderr) == (120, True)


MARK = "from visionloop.lifetime import mark_process; print(mark_process(), flush=True); " + SLEEP


def test_a_mark_says_of_a_process_of_this_machine_whether_it_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", MARK], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    mark = process.stdout.readline().strip()
    assert mark.split(".")[0] == str(process.pid)
    assert (lifetime.is_gone(mark), lifetime.is_gone(lifetime.mark_process())) == (False, False)
    pid, start, *place = lifetime.mark_process().split(".")
    assert lifetime.is_gone(".".join([pid, f"{start}1", *place])), "its number was given again"
    process.kill()
    assert wait_until_gone(process.pid)
    assert lifetime.is_gone(mark), "also while nobody has asked for its exit code"
    process.wait()
    assert lifetime.is_gone(mark)


def test_a_mark_says_nothing_of_another_machine_and_all_of_this_one_before_it_was_started_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boot, space, computer = ["boot-1"], [lifetime.OUTSIDE], ["desk"]
    monkeypatch.setattr(lifetime, "find_machine", lambda: f"{boot[0]} {space[0]}")
    monkeypatch.setattr(lifetime.socket, "gethostname", lambda: computer[0])
    monkeypatch.setattr(lifetime.Path, "read_text", lambda path: "abcdef\n")
    monkeypatch.setattr(lifetime, "find_process_start", lambda pid: "17")
    mark = lifetime.mark_process()
    boot[0] = "boot-2"
    assert lifetime.is_gone(mark), "whatever has its number now"
    computer[0] = "a copy of its disk"
    assert not lifetime.is_gone(mark)
    computer[0], space[0] = "desk", "pid:[17]"
    assert not lifetime.is_gone(mark), "seen from a container"
    inside = lifetime.mark_process()
    boot[0] = "boot-3"
    assert not lifetime.is_gone(inside), "a container may have come back on another machine"


@pytest.mark.parametrize("mark", ["", "1.2.3", "x.2.3.4", "1.2..", "1.2.3.4.5", "9" * 5000 + ".1.2.3", "\n", "٣.1..x"])
def test_what_is_no_mark_is_of_nobody(mark: str) -> None:
    assert not lifetime.is_gone(mark)
