"""A real PostgreSQL for tests: a cluster of its own in a temporary folder, on a free port of loopback."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PASSWORD = "s3cret/word@x"
OPTIONS = "-c fsync=off -c synchronous_commit=off -c full_page_writes=off -c listen_addresses=127.0.0.1"


@dataclass(frozen=True)
class Postgres:
    """A running server. `folder` belongs to the user that it runs as."""

    port: int
    folder: Path

    def url(self, user: str = "postgres", password: str = "${PG_PASSWORD}") -> str:
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/postgres"

    def run(self, *statements: str) -> list[tuple[object, ...]]:
        """Run statements as superuser and return the rows of the last one."""
        import psycopg

        rows: list[tuple[object, ...]] = []
        address = {"host": "127.0.0.1", "port": self.port, "user": "postgres", "password": PASSWORD}
        with psycopg.connect(dbname="postgres", autocommit=True, **address) as connection:  # type: ignore[arg-type]
            for statement in statements:
                cursor = connection.execute(statement.encode())
                rows = cursor.fetchall() if cursor.description else []
        return rows


@contextmanager
def run_postgres() -> Iterator[Postgres]:
    """Make a cluster and run it until the block ends. Skips the test where PostgreSQL is not installed."""
    programs = [shutil.which(name) for name in ("initdb", "pg_ctl")]
    if not all(programs):
        pytest.skip("PostgreSQL is not installed (no initdb, pg_ctl on PATH)")
    initdb, pg_ctl = (str(program) for program in programs)
    as_user: dict[str, object] = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "timeout": 60,
    }
    folder = Path(tempfile.mkdtemp(prefix="visionloop-pg-"))
    if os.getuid() == 0:  # it refuses to run as root
        try:
            entry = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        as_user |= {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    password = folder / "password"
    password.write_text(PASSWORD)
    password.chmod(0o644)
    data, log, port = str(folder / "data"), str(folder / "log"), _find_free_port()
    options = f"{OPTIONS} -c port={port} -c unix_socket_directories={folder}"
    initialise = (
        initdb,
        "-D",
        data,
        "-U",
        "postgres",
        "-A",
        "scram-sha-256",
        f"--pwfile={password}",
        "-N",
        "-E",
        "UTF8",
    )
    try:
        subprocess.run([*initialise, "--locale=C"], check=True, cwd=folder, **as_user)  # type: ignore[call-overload]
        start = (pg_ctl, "-D", data, "-l", log, "-w", "-o", options, "start")
        subprocess.run(start, check=True, cwd=folder, **as_user)  # type: ignore[call-overload]
        try:
            yield Postgres(port, folder)
        finally:
            stop = (pg_ctl, "-D", data, "-m", "immediate", "-w", "stop")
            subprocess.run(stop, check=True, cwd=folder, **as_user)  # type: ignore[call-overload]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
