"""The tree of exceptions. Every error a user can cause is one of these; anything else is our bug.

    VisionLoopError                       exit code 2, one line on stderr
    ├── ParamsError        (ValueError)       params.yaml
    ├── SettingsError      (ValueError)       the environment
    ├── SourceError        (ValueError)       a source of images that cannot be read
    ├── ImageError         (ValueError)       one image; quarantined, never stops a run
    ├── DatasetError       (ValueError)       versions, the pin, prepared data
    ├── StoreError         (OSError)          the object store
    │   └── ObjectMissing  (LookupError)
    ├── DiskError          (OSError)          a file or a folder of this machine, or its full disk
    ├── BundleError        (ValueError)       a model bundle that is refused
    ├── TrainingError      (RuntimeError)
    ├── TrackingError      (ConnectionError)  MLflow; transient
    ├── PromotionError     (RuntimeError)     ledger and registry
    ├── NotPromoted        (RuntimeError)     exit code 3: refused or inconclusive at the gate
    ├── PipelineError      (RuntimeError)     dvc and its stages
    ├── BusyError          (RuntimeError)     another process holds the lock
    │   └── LeaseHeld                         another retrain of this name is under way, somewhere
    ├── LeaseLost          (RuntimeError)     another retrain has taken over from this one
    └── ServingError       (RuntimeError)     the server cannot start

Errors are raised where files, networks and users' input are read. They say where, what was found, what was expected,
and what to do.
"""

import contextlib
import errno
import re
import shutil
from collections.abc import Sequence
from typing import Any

SHOWN = 5
FULL = (errno.ENOSPC, errno.EDQUOT)
PACKAGE_OF = {"sklearn": "scikit-learn", "PIL": "pillow", "botocore": "boto3"}
EXTRA = re.compile(r"extra == ['\"]([a-z0-9-]+)['\"]")


def escape_text(text: str) -> str:
    """Return a text that a terminal only shows: what is not printable is escaped, as in a file's hostile name."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class VisionLoopError(Exception):
    """An error that says where it is, what was found, what was expected and what to do.

    `str()` gives one line: `where: found; expected X. What to do.`
    """

    exit_code = 2
    transient = False

    def __init__(self, where: str, found: str, expected: str = "", todo: str = "") -> None:
        super().__init__(where, found, expected, todo)
        self.where, self.found, self.expected, self.todo = where, found, expected, todo

    @property
    def code(self) -> str:
        """The error's kind in snake case, for machines: `params_error`."""
        name = type(self).__name__
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        text = text.rstrip(".") + "."
        return escape_text(" ".join(f"{text} {self.todo}".split()))


class ParamsError(VisionLoopError, ValueError):
    """params.yaml is missing, malformed, or has a bad key or value."""


class SettingsError(VisionLoopError, ValueError):
    """The environment names something that cannot be used."""


class SourceError(VisionLoopError, ValueError):
    """A source of images is missing, empty or unusable as a whole."""


class ImageError(VisionLoopError, ValueError):
    """One image cannot be used. `reason_code` is stable, for counting: `not_an_image`, `too_large`, ..."""

    def __init__(
        self, where: str, found: str, expected: str = "", todo: str = "", *, reason_code: str = "not_an_image"
    ) -> None:
        super().__init__(where, found, expected, todo)
        self.reason_code = reason_code


class DatasetError(VisionLoopError, ValueError):
    """A dataset version, its pin or the prepared data is missing or does not fit."""


class StoreError(VisionLoopError, OSError):
    """The object store cannot be read or written."""


class ObjectMissing(StoreError, LookupError):
    """An object that should be in the store is not."""


class DiskError(VisionLoopError, OSError):
    """A file or a folder of this machine cannot be read or written, or its disk is full."""


class BundleError(VisionLoopError, ValueError):
    """A model bundle is damaged, incomplete or answers differently from its golden answers."""


class TrainingError(VisionLoopError, RuntimeError):
    """Training cannot start or cannot go on."""


class TrackingError(VisionLoopError, ConnectionError):
    """MLflow cannot be reached or refuses."""

    transient = True


class PromotionError(VisionLoopError, RuntimeError):
    """The ledger or the registry does not allow this step."""


class NotPromoted(VisionLoopError, RuntimeError):
    """The gate refused the candidate, or was inconclusive."""

    exit_code = 3


class PipelineError(VisionLoopError, RuntimeError):
    """dvc, or a stage run by it, failed."""


class BusyError(VisionLoopError, RuntimeError):
    """Another process is doing the same work."""

    transient = True


class LeaseHeld(BusyError):
    """Another retrain of the same name is under way, on this machine or on another one."""

    transient = False


class LeaseLost(VisionLoopError, RuntimeError):
    """This retrain is no longer the one that may promote."""


class ServingError(VisionLoopError, RuntimeError):
    """The server cannot start."""


def format_bytes(number: float) -> str:
    """Return `9.2 KB`, `1.4 GB`: three digits or so."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def make_full_disk_error(where: str, folder: str) -> DiskError:
    """Return the error of a full disk, with how much of that folder's is free now."""
    free = ""
    with contextlib.suppress(OSError):
        free = f", {format_bytes(shutil.disk_usage(folder).free)} free"
    todo = "Free some; the same command goes on with what is done."
    return DiskError(where, f"cannot be written (no space left on the disk of {folder}{free})", "free space", todo)


def shorten(names: Sequence[str], shown: int = SHOWN) -> str:
    """Join names, sorted, cut at five: `a, b, c, d, e and 12 more`."""
    ordered = sorted(names)
    text = ", ".join(ordered[:shown])
    return text + (f" and {len(ordered) - shown} more" if len(ordered) > shown else "")


def find_missing_extra(error: ImportError) -> SettingsError | None:
    """Return the error of a library that is not installed, with the extra that brings it; None: not one of ours.

    Where a folder bears the library's name (`mlflow/`), Python imports that, and a name in it is missing.
    """
    import importlib.metadata

    library = (error.name or "").partition(".")[0]
    package = PACKAGE_OF.get(library, library).replace("_", "-").lower()
    if not package:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(package)
        return None
    try:
        required = importlib.metadata.requires("visionloop") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    extras = [
        match[1] for line in required if re.match(rf"{re.escape(package)}\b", line) and (match := EXTRA.search(line))
    ]
    if not extras:
        return None
    last = ("all", "dev", "mlflow-server")  # they bring more than a command needs
    extra = min(extras, key=lambda name: (name in last, extras.index(name)))
    return SettingsError(package, "is not installed", "it for this command", f"Run `{describe_install(extra)}`.")


def describe_install(extras: str) -> str:
    """Return the command that adds an extra, or several by commas, to visionloop as it was installed here.

    It is on no package index: it came from a clone, a wheel or a repository, which the installer has noted (PEP 610).
    """
    import importlib.metadata
    import importlib.util
    import json
    import shlex
    from urllib.parse import unquote, urlsplit

    told: dict[str, Any] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        told = json.loads(importlib.metadata.distribution("visionloop").read_text("direct_url.json") or "{}")
    url, vcs, folder = str(told.get("url", "")), told.get("vcs_info"), told.get("dir_info")
    if vcs:
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    what = f"visionloop[{extras}]{f' @ {url}' if url else ''}"
    if folder is not None:
        what = f"{unquote(urlsplit(url).path)}[{extras}]"
    is_editable = bool(folder and folder.get("editable"))
    installer = "pip" if importlib.util.find_spec("pip") else "uv pip"
    return f"{installer} install {'-e ' * is_editable}{shlex.quote(what)}"


def require_installed(library: str) -> None:
    """Raise SettingsError, which names the extra, if a library of an extra is not installed: before work is begun."""
    if missing := find_missing_extra(ModuleNotFoundError(name=library)):
        raise missing


def describe_first_line(exc: BaseException, length: int = 160) -> str:
    """Return the first line of what an exception says, cut; the name of its class if it says nothing."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:length]
