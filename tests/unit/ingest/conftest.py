"""A workspace without images, and a store, for tests of pulls."""

from pathlib import Path

import pytest

from visionloop.settings import Settings, load_settings
from visionloop.store import LocalStore


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "params.yaml").write_text("name: pets\n")
    return load_settings({}, tmp_path / "ws")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")
