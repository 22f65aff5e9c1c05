"""For all tests: a quiet environment that knows nothing of the person's own workspace, and a small bundle.

`tests/support` is on the path (pyproject.toml), so that tests can `from fakes import make_bundle`.
"""

import contextlib
import fcntl
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from fakes import make_bundle, make_image
from processors import FLAGS, pretending, refuse_to_measure
from s3_server import run_seaweed
from visionloop.lifetime import collect_seldom
from visionloop.networks import processor
from visionloop.settings import QUIET_TOOLS

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_seldom()

# How long an example takes hangs on what else the machine does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

FOREIGN = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "AWS_ENDPOINT_URL")

# At import, not in a fixture: the tools read these once, when they are imported.
os.environ.update(QUIET_TOOLS)
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [n for n in os.environ if n in FOREIGN or n.startswith("VISIONLOOP_")]:
    del os.environ[name]


# Those that take longest begin first: the last of them would else run alone.
SLOW = (
    "own_images",
    "what_stays",
    "kills",
    "demo_loop",
    "readme",
    "start",
    "mlflow_pages",
    "flow_errors",
    "training_kills",
    "ranks",
    "up",
    "dvc_views",
    "ray",
    "store_away",
    "training",
    "lying_state",
    "bucket_loop",
    "extras",
    "all_backbones",
    "abstaining",
    "tune",
    "onnx_encoders",
    "learning",
    "leaks",
    "server_overload",
    "watching",
    "ways",
    "stamina",
    "views",
)


LONG_S = 3600  # for a long test, on a machine that ten others use


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first (`--no-loadscope-reorder` keeps it so), and give long tests their time."""
    places = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(LONG_S))


@pytest.fixture(autouse=True, scope="session")
def same_processor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measure nothing, unless a test asks for it, and pretend another processor if TEST_CPU (bf16 or fp32) says so."""
    measured, processor.time_in_turn = processor.time_in_turn, refuse_to_measure  # type: ignore[assignment]
    kind = os.environ.get("TEST_CPU")
    with pretending(kind, tmp_path_factory.mktemp("cpu")) if kind else contextlib.nullcontext():
        yield
    processor.time_in_turn = measured


@pytest.fixture(params=sorted(FLAGS))
def each_processor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A processor that is pretended: with instructions for bf16 ("bf16"), or without ("fp32")."""
    with pretending(request.param, tmp_path):
        yield request.param


@pytest.fixture
def bf16_processor(tmp_path: Path) -> Iterator[None]:
    """A processor that is pretended, with instructions for bf16."""
    with pretending("bf16", tmp_path):
        yield


@pytest.fixture(autouse=True, scope="module")
def same_environment() -> Iterator[None]:
    """Put the environment back after each file: entry points that run in this process set the tools' variables."""
    before, folder = dict(os.environ), tempfile.tempdir
    yield
    os.environ.clear()
    os.environ.update(before)
    tempfile.tempdir = folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a run."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def make_once(shared_folder: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """Make what all workers of a run read: the first one fills a new folder of this name, the others wait for it."""

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder = shared_folder / name
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "made").is_file():
                fill(folder)
                (folder / "made").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def seaweed_url() -> Iterator[str]:
    """The address of a SeaweedFS, with the keys of `s3_server.S3_ENV`."""
    with run_seaweed() as url:
        yield url


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    """A sealed bundle with the classes a, b, c for images of 32 x 32."""
    folder = tmp_path / "bundle"
    make_bundle(folder, classes=("a", "b", "c"), size_hw=(32, 32), seed=0)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two images, one of them in a folder below, a broken one, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(make_image(1))
    (folder / "sub" / "b.JPG").write_bytes(make_image(2, kind="JPEG"))
    (folder / "broken.jpg").write_text("text")
    (folder / "notes.txt").write_text("text")
    return folder
