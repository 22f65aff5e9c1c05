"""infra/env.sh and infra/up.sh: what is in the way of the team's stack is one line, and nothing is half-started.

The engine is a stand-in; with a real one they are tried by infra/try.sh.
"""

import os
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

INFRA = Path(__file__).parents[2] / "infra"
SECRETS = set(re.findall(r"\$\{(\w+):\?", (INFRA / "compose.yaml").read_text()))


def make_env(path: Path, before: str = "") -> "subprocess.CompletedProcess[str]":
    command = f"{before} exec sh '{INFRA / 'env.sh'}' '{path}'"
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)


def test_secrets_are_random_for_their_owner_alone_and_never_written_over(tmp_path: Path) -> None:
    assert make_env(tmp_path / "env").stdout == f"wrote random secrets into {tmp_path}/env\n"
    text = (tmp_path / "env").read_text()
    secrets = dict(re.findall(r"^(\w+)=([0-9a-f]{20,})$", text, flags=re.M))
    assert set(secrets) == SECRETS, "all that the compose file asks for, and no more"
    assert len(set(secrets.values())) == len(secrets)
    assert len(secrets["S3_ENCRYPTION_KEY"]) == 64, "SeaweedFS wants 256 bits in hex"
    assert (tmp_path / "env").stat().st_mode & 0o777 == 0o600
    again = make_env(tmp_path / "env")
    assert (again.returncode, again.stdout) == (0, f"{tmp_path}/env is there already, and stays as it is.\n")
    assert (tmp_path / "env").read_text() == text
    make_env(tmp_path / "other")
    assert (tmp_path / "other").read_text() != text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "other"], "no half-written file"


@pytest.mark.parametrize("line", ["", "S3_SECRET_KEY="], ids=["missing", "empty"])
def test_a_file_without_a_secret_is_told_and_stays_as_it_is(tmp_path: Path, line: str) -> None:
    """New secrets would fit neither the volumes nor, without the key, the images."""
    make_env(tmp_path / "env")
    text = re.sub(r"^S3_SECRET_KEY=.*$", line, (tmp_path / "env").read_text(), flags=re.M)
    (tmp_path / "env").write_text(text)
    done = make_env(tmp_path / "env")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"{tmp_path}/env: has no S3_SECRET_KEY; expected all secrets of the stack. "
        "Put back your copy; for a new stack remove the file, and run this again.\n"
    )
    assert (tmp_path / "env").read_text() == text


@pytest.mark.parametrize(
    ("folder", "before"), [("no", ""), (".", "trap '' XFSZ; ulimit -f 0;")], ids=["no folder", "full disk"]
)
def test_secrets_that_cannot_be_written_are_told_and_leave_nothing(tmp_path: Path, folder: str, before: str) -> None:
    path = tmp_path / folder / "env"
    done = make_env(path, before)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"{path}: cannot be written, or was made just now; expected a place for a new file. "
        "Look at its folder and its disk.\n"
    )
    assert list(tmp_path.iterdir()) == []


DOCKER = """#!/bin/sh
# The engine of a machine with two images, of which one is for another processor. What is asked of it is in asked.txt.
echo "$*" >>asked.txt
case "$*" in
version*) [ ! -e away ] && echo linux/amd64 ;;
info*) pwd ;;
"image inspect"*theirs) echo linux/arm64 ;;
"image inspect"*) echo linux/amd64 ;;
run*) [ -e emulator ] ;;
"compose config --images") cat images ;;
"compose config") printf 'ports:\\n  host_ip: 127.0.0.1\\n  published: "%s"\\n' "$(cat port)" ;;
"compose up"*) [ ! -e broken ] ;;
"compose ps --all"*) echo c1 ;;
logs*) cat said ;;
inspect*index*) cat state ;;
inspect*) echo "password authentication failed" ;;
esac
"""


@pytest.fixture
def start_team(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run infra/up.sh with that engine; returns its exit code, its errors, and what was asked of compose."""
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "port").write_text("1")  # nobody listens there
    (tmp_path / "images").write_text("ours\n")
    (tmp_path / "state").write_text("postgres 0 0 unhealthy\n")

    def start() -> tuple[int, str, str]:
        asked = tmp_path / "asked.txt"
        asked.unlink(missing_ok=True)
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(
            [INFRA / "up.sh", "docker", "compose"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        calls = [line for line in asked.read_text().splitlines() if line.startswith(("compose up", "compose down"))]
        return done.returncode, done.stderr, "; ".join(calls)

    return start


def test_the_stack_starts_where_nothing_is_in_its_way(start_team: Callable[[], tuple[int, str, str]]) -> None:
    assert start_team() == (0, "", "compose up --detach --build")


def test_a_port_that_is_taken_is_told_and_nothing_starts(
    tmp_path: Path, start_team: Callable[[], tuple[int, str, str]]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (tmp_path / "port").write_text(str(taken.getsockname()[1]))
        code, told, calls = start_team()
    assert (code, calls, told.count("\n")) == (2, "", 1)
    assert f"port {(tmp_path / 'port').read_text()} of 127.0.0.1 is taken; expected a free one." in told


def test_an_image_for_another_processor_is_told_unless_this_machine_runs_it(
    tmp_path: Path, start_team: Callable[[], tuple[int, str, str]]
) -> None:
    (tmp_path / "images").write_text("ours\ntheirs\n")
    code, told, calls = start_team()
    assert (code, calls, told.count("\n")) == (2, "", 1)
    assert told.startswith("infra: image theirs is for linux/arm64; expected one that runs on linux/amd64.")
    (tmp_path / "emulator").touch()
    assert start_team()[0] == 0


def test_without_an_engine_or_room_on_the_disk_nothing_starts(
    tmp_path: Path, start_team: Callable[[], tuple[int, str, str]]
) -> None:
    (tmp_path / "away").touch()
    assert start_team()[:2] == (
        2,
        "infra: no Docker engine answers; expected one that you may use. Start it, or set DOCKER_HOST.\n",
    )
    (tmp_path / "away").unlink()
    (tmp_path / "df").write_text("#!/bin/sh\necho head\necho disk 1 1 71680 99% /\n")
    (tmp_path / "df").chmod(0o755)
    code, told, calls = start_team()
    assert (code, calls, told.count("\n")) == (2, "", 1)
    assert told.startswith("infra: 70 MB are free on ")


NO_ROOM = '2026 [29] PANIC:  could not write to file "pg_wal/xlogtemp.29": No space left on device'
ENDS = "LOG:  aborting startup due to startup process failure\nLOG:  database system is shut down\n"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("starts\nFATAL: no such role\n\n", "FATAL: no such role"),
        (f"{NO_ROOM}\nLOG:  startup process (PID 29) was terminated by signal 6: Aborted\n{ENDS}", NO_ROOM),
        (
            "Traceback ...\nOSError: [Errno 5] Input\n\nERROR:    Application startup failed.\n",
            "OSError: [Errno 5] Input",
        ),
        ("one\ntwo\n", "two"),
        ("", ""),
    ],
    ids=["fatal", "full disk", "traceback", "nothing of that", "silence"],
)
def test_what_does_not_come_up_says_why_and_is_taken_down(
    tmp_path: Path, start_team: Callable[[], tuple[int, str, str]], said: str, told: str
) -> None:
    (tmp_path / "broken").touch()
    (tmp_path / "said").write_text(said)
    code, lines, calls = start_team()
    assert (code, calls) == (1, "compose up --detach --build; compose down")
    room = f"; expected room on {tmp_path}. Make some: `docker system prune` shows how." if "space" in told else ""
    assert lines.splitlines() == [
        f"infra: postgres: {told}{room} (password authentication failed)",
        "infra: nothing was started. Correct that, and try again.",
    ]


@pytest.mark.parametrize(
    ("state", "is_told"),
    [
        ("postgres 1 0 ", True),
        ("postgres 0 3 starting", True),  # it ended three times, and runs just now
        ("postgres 0 0 healthy", False),
        ("server-1 2 5 ", False),
    ],
)
def test_of_parts_only_those_that_failed_are_told(
    tmp_path: Path, start_team: Callable[[], tuple[int, str, str]], state: str, is_told: bool
) -> None:
    (tmp_path / "broken").touch()
    (tmp_path / "said").write_text("FATAL: no such role\n")
    (tmp_path / "state").write_text(f"{state}\n")
    code, lines, _ = start_team()
    assert (code, "FATAL" in lines) == (1, is_told)
