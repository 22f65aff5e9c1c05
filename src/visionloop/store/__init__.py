"""The object store: one protocol, one implementation per kind of place."""

from visionloop.errors import SettingsError
from visionloop.store.local import LocalStore
from visionloop.store.protocol import ObjectStore

__all__ = ["LocalStore", "ObjectStore", "open_store"]


def open_store(url: str) -> ObjectStore:
    """Open the store at a URL (`file:///folder`). Makes nothing until something is put.

    Raises:
        SettingsError: the scheme is not known.
    """
    if url.startswith("file://"):
        return LocalStore.from_url(url)
    raise SettingsError(
        "VISIONLOOP_STORE",
        f"got {url!r}",
        "file:///folder or a path",
        "Set it to a folder, or unset it for the default.",
    )
