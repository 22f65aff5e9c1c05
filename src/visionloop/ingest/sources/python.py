"""A function of the user's own that yields records: the door for what has no source here, a NoSQL collection, a queue.

Its module lies in the workspace or is installed. `python_records.py` checks each record by itself.
"""

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any

from visionloop.errors import SourceError, VisionLoopError
from visionloop.ingest.sources.item import Cursor, Item, Reading
from visionloop.ingest.sources.python_records import Records
from visionloop.params import PythonSource
from visionloop.records import Rejected


def read_python(source: PythonSource, reading: Reading) -> Iterator[Item | Rejected | Cursor]:
    """Call the function with `options` (and `cursor`, if it takes one) and yield what its records say.

    Raises:
        SourceError: there is no such function, it cannot be called so, or it raised: with its file and line.
    """
    where = f"source {source.name} {source.function}"
    records = Records(source, reading)
    known = set(sys.modules)
    try:
        with _workspace_on_path(reading.home):
            function = _load(source.function, reading.home, where)
            produced = _start(function, source, reading, where)
        number = 0
        while True:
            # The workspace is on the path only while the function runs, not while its records are at work.
            with _workspace_on_path(reading.home):
                try:
                    record = next(produced)
                except StopIteration:
                    return
                except (Exception, SystemExit) as exc:
                    raise _translate(exc, where, f"failed after {number:,} records") from exc
            number += 1
            yield records.read(number, record)
    finally:
        _forget_modules(known, reading.home)


@contextmanager
def _workspace_on_path(home: Path) -> Iterator[None]:
    """Let modules of the workspace be imported, and no longer than this lasts."""
    entry = str(home)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _forget_modules(known: set[str], home: Path) -> None:
    """Drop what was imported from the workspace: another one may have a module of the same name."""
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(home):
            del sys.modules[name]


def _load(function: str, home: Path, where: str) -> Callable[..., Any]:
    """Import a function. Raises SourceError."""
    name, _, attribute = function.partition(":")
    invalidate_caches()
    try:
        found = getattr(import_module(name), attribute, None)
    except (Exception, SystemExit) as exc:
        missing = exc.name or "" if isinstance(exc, ModuleNotFoundError) else ""
        if missing and f"{name}.".startswith(f"{missing}."):
            expected = f"{name.replace('.', '/')}.py in the workspace, or an installed module"
            raise SourceError(where, f"no module {name!r}", expected, "Write it, or edit `function`.") from exc
        raise _translate(exc, where, "cannot be imported") from exc
    if not callable(found):
        raise SourceError(where, f"no function {attribute!r} in {name}", "its name", "Write it, or edit `function`.")
    return found  # type: ignore[no-any-return]


def _start(function: Callable[..., Any], source: PythonSource, reading: Reading, where: str) -> Iterator[Any]:
    """Call the function and return what it iterates over. Raises SourceError."""
    arguments = dict(source.options)
    try:
        signature = inspect.signature(function)
        if "cursor" in signature.parameters:
            arguments["cursor"] = reading.cursor
        signature.bind(**arguments)
    except (TypeError, ValueError) as exc:
        found = f"cannot be called with its `options` ({exc})"
        raise SourceError(where, found, "options that are its arguments", "Edit `options`, or the function.") from exc
    try:
        return iter(function(**arguments))
    except (Exception, SystemExit) as exc:
        if isinstance(exc, TypeError) and exc.__traceback__ and exc.__traceback__.tb_next is None:
            raise SourceError(where, f"does not yield records ({exc})", "an iterable of dicts", "Edit it.") from exc
        raise _translate(exc, where, "failed") from exc


def _translate(exc: BaseException, where: str, found: str) -> SourceError:
    """Say in one line what the user's code raised, and where: the last line of it that is no library's."""
    if isinstance(exc, SyntaxError):
        place = f"{Path(exc.filename or '').name} line {exc.lineno}"
    else:
        frames = traceback.extract_tb(exc.__traceback__)
        own = [f for f in frames if "site-packages" not in f.filename and f.filename not in (__file__, "<frozen>")]
        own = [f for f in own if not f.filename.startswith(("<frozen", sys.base_prefix))]
        place = f"{Path(own[-1].filename).name} line {own[-1].lineno}" if own else "its code"
    text = str(exc) if not isinstance(exc, VisionLoopError) else exc.found
    text = re.sub(r"//[^/@\s]*@", "//***@", " ".join(text.split()))[:200]
    reason = f"{type(exc).__name__}: {text}" if text else type(exc).__name__
    return SourceError(f"{where}, {place}", f"{found} ({reason})", "records", "Mend the function.")
