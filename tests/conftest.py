"""For all tests: a quiet environment that knows nothing of the person's own workspace, and a small bundle.

pytest puts this folder on the path, so that tests can `from fakes import make_bundle`.
"""

import os
from pathlib import Path

import pytest
from fakes import make_bundle

from visionloop.settings import QUIET_TOOLS

FOREIGN = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "AWS_ENDPOINT_URL")

# At import, not in a fixture: the tools read these once, when they are imported.
os.environ.update(QUIET_TOOLS)
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [n for n in os.environ if n in FOREIGN or n.startswith("VISIONLOOP_")]:
    del os.environ[name]


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    """A sealed bundle with the classes a, b, c for images of 32 x 32."""
    folder = tmp_path / "bundle"
    make_bundle(folder, classes=("a", "b", "c"), size_hw=(32, 32), seed=0)
    return folder
