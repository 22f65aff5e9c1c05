"""What a supervisor tells the other commands: its state, its lock, and the ports that stay the same.

.visionloop/up/lock         held while a supervisor runs, whose process id is in it
.visionloop/up/state.json   who it is, and how each part is
.visionloop/up/ports.json   the port of each part, for the next time
.visionloop/up/NAME.log     what a part says
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visionloop.errors import BusyError, ServingError
from visionloop.records import Record
from visionloop.workfolder import is_locked, write_file

HOST = "127.0.0.1"
STARTING, UP, STOPPING = "starting", "up", "stopping"
GOOD = ("ready", "waiting")


@dataclass(frozen=True)
class PartState(Record):
    """How one part is: `state` is waiting, starting, ready, silent, restarting or stopped; `why` says more.

    `url` is what a person opens, `since` when the state began. `restarts` counts those after it ended by itself.
    """

    name: str
    title: str
    state: str
    why: str = ""
    url: str = ""
    pid: int = 0
    since: str = ""
    restarts: int = 0
    log: str = ""


@dataclass(frozen=True)
class State(Record):
    """All that a supervisor tells. `mark` is in the environment of all that it has started; `phase`: see above."""

    pid: int
    mark: str
    phase: str
    started_at: str
    parts: tuple[PartState, ...] = ()
    is_live: bool = True

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "State":
        parts = tuple(PartState.from_json(part) for part in value["parts"])
        return super().from_json({**value, "parts": parts})

    @property
    def is_well(self) -> bool:
        """Whether all parts are as they should be: ready, or waiting for something that is still to come."""
        return self.is_live and self.phase == UP and all(part.state in GOOD for part in self.parts)

    def get_url(self, name: str) -> str:
        """Return the address of a part that is ready, "" of another one."""
        return next((one.url for one in self.parts if one.name == name and one.state == "ready"), "")


class Board:
    """The folder of one workspace that all this is in."""

    def __init__(self, hidden_dir: Path) -> None:
        self.folder = hidden_dir / "up"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the supervisor. Raises BusyError: there is one already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                state = self.read()
                url = f": {state.get_url('home')}" if state and state.get_url("home") else ""
                raise BusyError(
                    "visionloop up",
                    f"is running for this workspace{url}",
                    "one at a time",
                    "`visionloop status` shows it, `visionloop down` stops it.",
                ) from None
            lock.truncate(0)
            print(os.getpid(), file=lock, flush=True)
            yield

    def read(self) -> State | None:
        """Return what was told last, and whether its supervisor lives; None: nothing that can be read was told.

        Whoever holds the lock now may have told nothing yet: then the state is of one that was killed.
        """
        try:
            state = State.from_json(json.loads((self.folder / "state.json").read_bytes()))
            is_live = is_locked(self.folder) and int((self.folder / "lock").read_text()) == state.pid
            return State(**{**vars(state), "is_live": is_live})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def read_live(self) -> State | None:
        """Return the state of a supervisor that runs; None: none does."""
        state = self.read()
        return state if state and state.is_live else None

    def write(self, state: State) -> None:
        """Tell a state. Whoever reads sees the one before or this one."""
        write_file(self.folder / "state.json", json.dumps(asdict(state), ensure_ascii=False, indent=1).encode())

    def choose_ports(self, wanted: Mapping[str, int], given: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
        """Return a free port for each part, and what is to be told of them: the one of last time, else a free one.

        `wanted` are the ports of the first time, `given` those that a person asks for: taken, they are an error.

        Raises:
            ServingError: a given port is taken, or two parts have one.
        """
        known = {**self._load_ports(), **given}
        chosen: dict[str, int] = {}
        told = []
        for name, usual in wanted.items():
            first = known.get(name, usual)
            taken = first in chosen.values() or not is_free(first)
            if taken and name in given:
                todo = "Name another one, or none: then a free one is taken."
                raise ServingError(f"port {HOST}:{first}", "is in use", f"a free port for {name}", todo)
            if taken:
                port = _find_free(usual, (*chosen.values(), *known.values(), *wanted.values()))
                told += [f"port {first} is in use: {name} takes {port}"]
            chosen[name] = port if taken else first
        kept = {name: usual for name, usual in wanted.items() if chosen[name] == known.get(name) and name not in given}
        if free := [usual for name, usual in kept.items() if usual not in chosen.values() and is_free(usual)]:
            ports = ", ".join(map(str, free))
            told += [f"ports as last time, but {ports} is free: remove {self.folder}/ports.json to have it"]
        write_file(self.folder / "ports.json", json.dumps(chosen).encode())
        return chosen, told

    def _load_ports(self) -> dict[str, int]:
        try:
            value = json.loads((self.folder / "ports.json").read_bytes())
            return {str(k): v for k, v in value.items() if isinstance(v, int) and 0 < v < 65_536}
        except (OSError, ValueError, AttributeError):
            return {}


def name_server(commands: Mapping[str, str], board: Board) -> dict[str, str]:
    """Return the commands to look further; a champion that `visionloop up` serves already is named by its address."""
    state = board.read_live()
    url = state.get_url("server") if state else ""
    if not url:
        return dict(commands)
    return {
        "ask the champion" if what == "serve the champion" else what: url if what == "serve the champion" else command
        for what, command in commands.items()
    }


def choose_port(port: int) -> int:
    """Return a port if it is free, else one above it; any free one for 0."""
    return port if port and is_free(port) else _find_free(port or 65_535, ())


def is_free(port: int) -> bool:
    """Say whether a port of this machine can be had now."""
    try:
        with socket.create_server((HOST, port)):
            return True
    except OSError as exc:
        if exc.errno in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            return False
        raise


def _find_free(usual: int, others: Sequence[int]) -> int:
    """Return a free port a little above the usual one, or any that is free."""
    for port in range(usual + 1, usual + 100):
        if port < 65_536 and port not in others and is_free(port):
            return port
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])
