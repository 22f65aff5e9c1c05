import errno
from pathlib import Path

import pytest

from visionloop import workspace
from visionloop.errors import SettingsError


def test_a_place_that_cannot_be_written_is_told_though_nothing_can_be_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that is mounted read-only even the removal of what is not there fails."""

    def refuse(path: Path, **options: bool) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(workspace, "make_tool_folders", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(SettingsError, match=r"pets: cannot be made \(Read-only file system\); expected a folder"):
        workspace.make_workspace(tmp_path / "pets")
