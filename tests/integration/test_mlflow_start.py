"""mlflow/start.sh, what the image of MLflow runs: on PostgreSQL and SeaweedFS, with passwords and host names."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from postgres_server import PASSWORD, Postgres, run_postgres
from s3_server import S3_ENV, make_bucket, make_client
from shapes import ROOT, make_environment
from visionloop.errors import TrackingError
from visionloop.tracking import MlflowTracking

START = ROOT / "mlflow" / "start.sh"
START_S = 240
ADMIN = ("admin", "a-long-password")


def run_start(**env: str) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": os.environ["PATH"], **env}
    return subprocess.run([START], env=env, capture_output=True, text=True, timeout=120, check=False)


def test_what_is_missing_is_one_line_and_nothing_starts() -> None:
    places = {"MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://x", "MLFLOW_ARTIFACTS_DESTINATION": "s3://x"}
    cases = {
        "MLFLOW_BACKEND_STORE_URI is not set; expected postgresql+psycopg://": {},
        "MLFLOW_ARTIFACTS_DESTINATION is not set; expected s3://": {"MLFLOW_BACKEND_STORE_URI": "postgresql://x"},
        "MLFLOW_AUTH is 'yes'; expected off or basic.": {**places, "MLFLOW_AUTH": "yes"},
        "MLFLOW_AUTH_DATABASE_URI is not set; expected postgresql": {**places, "MLFLOW_AUTH": "basic"},
    }
    for told, env in cases.items():
        done = run_start(**env)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"mlflow: {told}")
        assert done.stderr.count("\n") == 1


def test_a_database_that_does_not_answer_is_one_line_without_the_password() -> None:
    done = run_start(
        MLFLOW_BACKEND_STORE_URI="postgresql+psycopg://ann:geheim@127.0.0.1:1/mlflow",
        MLFLOW_ARTIFACTS_DESTINATION="s3://x",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("mlflow: MLFLOW_BACKEND_STORE_URI: connection failed: connection to server")
    assert "geheim" not in done.stderr


@pytest.fixture(scope="module")
def environment(seaweed_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What it is told where all is as it should be."""
    make_bucket(seaweed_url, "with-mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with run_postgres() as postgres:
        postgres.run("CREATE DATABASE mlflow", "CREATE DATABASE users")
        address = make_address(postgres)
        yield make_environment(
            **{**S3_ENV, "AWS_MAX_ATTEMPTS": "5"},
            MLFLOW_BACKEND_STORE_URI=f"{address}/mlflow",
            MLFLOW_ARTIFACTS_DESTINATION="s3://with-mlflow/artifacts",
            MLFLOW_S3_ENDPOINT_URL=seaweed_url,
            MLFLOW_AUTH="basic",
            MLFLOW_AUTH_DATABASE_URI=f"{address}/users",
            MLFLOW_AUTH_ADMIN_USERNAME=ADMIN[0],
            MLFLOW_AUTH_ADMIN_PASSWORD=ADMIN[1],
            MLFLOW_FLASK_SERVER_SECRET_KEY="x" * 32,
            MLFLOW_HOST="127.0.0.1",
            MLFLOW_PORT=str(port),
            MLFLOW_WORKERS="1",
            TMPDIR=str(tmp_path_factory.mktemp("mlflow")),
        )


def make_address(postgres: Postgres, password: str = PASSWORD) -> str:
    secret = password.replace("/", "%2F").replace("@", "%40")
    return f"postgresql+psycopg://postgres:{secret}@127.0.0.1:{postgres.port}"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("MLFLOW_AUTH_DATABASE_URI", ("%40x@", "@"), "connection failed: .* password authentication failed for user"),
        ("AWS_SECRET_ACCESS_KEY", ("test", "wrong"), "An error occurred .* expected a bucket that lets us in"),
        (
            "MLFLOW_ARTIFACTS_DESTINATION",
            ("with-", "without-"),
            "An error occurred .NoSuchBucket. .* expected a bucket",
        ),
    ],
    ids=["password of the users", "secret of the bucket", "bucket"],
)
def test_what_does_not_let_it_in_is_one_line(
    environment: dict[str, str], name: str, value: tuple[str, str], told: str
) -> None:
    done = run_start(**environment | {name: environment[name].replace(*value)})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    where = "MLFLOW_ARTIFACTS_DESTINATION" if name.startswith("AWS_") else name
    assert re.match(f"mlflow: {where}: {told}", done.stderr), done.stderr


def test_a_port_that_is_taken_is_one_line(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", int(environment["MLFLOW_PORT"]))):
        done = run_start(**environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.match(r"mlflow: MLFLOW_HOST, MLFLOW_PORT: \[Errno 98\] Address already in use", done.stderr)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 90 MB, where PostgreSQL's own user may go."""
    place = Path(tempfile.mkdtemp(prefix="visionloop-small-", dir="/tmp"))
    command = ["mount", "-t", "tmpfs", "-o", "size=90m,mode=755", "small", place]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        done = None
    if done is None or done.returncode:
        place.rmdir()
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)
    place.rmdir()


def test_a_database_on_a_full_disk_is_one_line(
    environment: dict[str, str], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with run_postgres() as postgres:
        postgres.run("SELECT 1")
        with (small_disk / "full").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - 3_000_000)
        done = run_start(**environment | {"MLFLOW_BACKEND_STORE_URI": f"{make_address(postgres)}/postgres"})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert re.match(r"mlflow: MLFLOW_BACKEND_STORE_URI: .*No space left on device.* expected a database", done.stderr)


@pytest.fixture(scope="module")
def server(environment: dict[str, str]) -> Iterator[str]:
    url, folder = f"http://127.0.0.1:{environment['MLFLOW_PORT']}", Path(environment["TMPDIR"])
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([START], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(process, url, folder / "log")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", trust_env=False, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise AssertionError(f"MLflow does not answer: {log.read_text()[-3000:]}")


def test_the_server_keeps_runs_and_artifacts_for_who_has_the_password(server: str, seaweed_url: str) -> None:
    search = f"{server}/api/2.0/mlflow/experiments/search?max_results=1"
    assert httpx.get(search, trust_env=False, timeout=60).status_code == 401
    assert httpx.get(search, auth=("admin", "wrong"), trust_env=False, timeout=60).status_code == 401
    with pytest.raises(TrackingError) as caught:  # nobody has said who we are
        MlflowTracking(server, "file:///nowhere", "pets").get_champion()
    assert str(caught.value) == (
        f"MLflow {server}: does not let us in (401); expected a user and a password that it knows. "
        "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
    )
    assert httpx.get(search, auth=ADMIN, trust_env=False, timeout=60).status_code == 200
    strange = httpx.get(search, auth=ADMIN, trust_env=False, timeout=60, headers={"Host": "evil.example"})
    assert strange.status_code == 403
    code = (
        "import mlflow; mlflow.set_experiment('pets'); run = mlflow.start_run(); mlflow.log_metric('a', 0.5);"
        "mlflow.log_text('hello', 'note.txt'); mlflow.end_run(); print(run.info.run_id, run.info.artifact_uri)"
    )
    login = {"MLFLOW_TRACKING_USERNAME": ADMIN[0], "MLFLOW_TRACKING_PASSWORD": ADMIN[1]}
    env = {**make_environment(MLFLOW_TRACKING_URI=server, **login), "AWS_ACCESS_KEY_ID": "", "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run_id, place = done.stdout.split()[-2:]
    assert place.startswith("mlflow-artifacts:/"), "a client needs no keys of the bucket"
    listed = make_client(seaweed_url).list_objects_v2(Bucket="with-mlflow", Prefix="artifacts/")["Contents"]
    assert [one["Key"].rpartition(f"{run_id}/")[2] for one in listed] == ["artifacts/note.txt"]
