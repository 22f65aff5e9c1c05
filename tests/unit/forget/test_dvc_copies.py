"""Whether dvc keeps a second copy of what a stage makes: then there must be room for it."""

from pathlib import Path

import pytest

from visionloop.forget import dvc_cache


@pytest.mark.parametrize(
    ("config", "shares", "copied"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"cache.type": "copy"}, True, True),
        ({"cache.type": "hardlink,copy"}, False, False),
        ({"cache.type": "reflink,symlink"}, False, False),
    ],
)
def test_dvc_copies_unless_its_cache_has_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, str], shares: bool, copied: bool
) -> None:
    monkeypatch.setattr(dvc_cache, "_read_config", lambda home: config)
    assert not dvc_cache.is_copied(tmp_path), "there is no cache"
    (tmp_path / ".dvc").mkdir()
    assert dvc_cache._has_reflinks(tmp_path) in {True, False}
    monkeypatch.setattr(dvc_cache, "_has_reflinks", lambda folder: shares)
    assert dvc_cache.is_copied(tmp_path) == copied
