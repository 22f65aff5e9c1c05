"""visionloop keeps an image classifier up to date: ingest, train, judge, promote, serve.

    import visionloop
    model = visionloop.load("models/candidate")        # or "NAME@champion", or "s3://..."
    model.predict("photo.jpg").prediction
    visionloop.open_workspace(".").datasets()          # tables as pandas has them

docs/python.md tells of it. Nothing is imported before it is used: `import visionloop` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionloop.api import Model, WorkspaceTables, load, open_workspace
    from visionloop.errors import ImageError, VisionLoopError
    from visionloop.records import Card, Prediction

__version__ = "0.1.0"
__all__ = [
    "Card",
    "ImageError",
    "Model",
    "Prediction",
    "VisionLoopError",
    "WorkspaceTables",
    "__version__",
    "load",
    "open_workspace",
]

_HOMES = {
    **dict.fromkeys(("Model", "WorkspaceTables", "load", "open_workspace"), "visionloop.api"),
    **dict.fromkeys(("ImageError", "VisionLoopError"), "visionloop.errors"),
    **dict.fromkeys(("Card", "Prediction"), "visionloop.records"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'visionloop' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
