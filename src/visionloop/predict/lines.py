"""The lines of a watched camera: for people, and appended to a file as JSON."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from visionloop.errors import DiskError, SourceError
from visionloop.records import encode_line

Line = dict[str, Any]  # see `live.py`


def format_time(seconds: float) -> str:
    """Return seconds since 1970 as a line has them: `2026-11-29T10:00:00.250Z`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe_line(line: Line) -> str:
    """Return a line of a camera for people, by the clock of this machine."""
    kind = line["kind"]
    at = f"{datetime.fromisoformat(line.get('since') or line.get('at') or line['time']).astimezone():%H:%M:%S}"
    if kind == "lost":
        return f"{at}  lost: {line['why']}; trying again"
    if kind == "back":
        return f"{at}  back after {format_length(line['after_s'])}"
    if kind == "waiting":
        why = ": it sends nothing" if line["bytes"] == 0 else ""
        return f"{at}  connected, no picture yet after {line['after_s']:.0f} s{why}"
    if kind == "end":
        return describe_end(line)
    said = _say(line["prediction"], line["abstained"])
    if kind == "frame":
        return f"{at}  {said} {line['confidence']:.0%}"
    before = line["before_s"]
    after = f" (after {format_length(before)} of {_say(line['before'], line['before_abstained'])})" if before else ""
    doubt = f": {line['abstained']}" if line["abstained"] else f" {line['confidence']:.0%}"
    return f"{at}  {said}{doubt}{after}"


def describe_end(line: Line) -> str:
    """Return what a watch came to."""
    frames, passed, lost = line["frames"], line["passed_over"], line["lost"]
    parts = [f"{frames:,} frame{'s' * (frames != 1)} in {format_length(line['duration_s'])}"]
    if passed:
        parts.append(f"{passed:,} passed over: an answer took {line['network_ms']:.0f} ms")
    parts += [f"{line['changes']:,} change{'s' * (line['changes'] != 1)}"]
    parts += [f"lost {lost:,} time{'s' * (lost != 1)}"] if lost else []
    seen = ", ".join(f"{name} {format_length(seconds)}" for name, seconds in list(line["seconds"].items())[:8])
    return f"{'; '.join(parts)}" + (f"; seen: {seen}" if seen else "")


def _say(prediction: str, abstained: str | None) -> str:
    return "don't know" if abstained else prediction or "no label"


@contextlib.contextmanager
def open_lines(path: Path) -> Iterator[IO[str]]:
    """Open a file that lines are appended to. Raises SourceError, DiskError."""
    if path.suffix.lower() != ".jsonl":
        raise SourceError("--out", f"got {path.name!r}", "a file that ends in .jsonl, as a stream has no last row")
    try:
        file = path.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise DiskError(
            f"--out {path}", f"cannot be written ({exc.strerror})", "a file in a folder that is there"
        ) from exc
    try:
        yield file
    finally:
        try:
            file.close()
        except OSError as exc:  # it tries once more to write the line that has failed
            raise _make_error(file, exc) from exc


def write_line(file: IO[str], line: Line) -> None:
    """Append a line, so that whoever follows the file has it at once. Raises DiskError."""
    try:
        file.write(encode_line(line) + "\n")
        file.flush()
    except OSError as exc:
        raise _make_error(file, exc) from exc


def _make_error(file: IO[str], exc: OSError) -> DiskError:
    return DiskError(f"--out {file.name}", f"cannot be written ({exc.strerror})", "free space", "Make room.")


def format_length(seconds: float) -> str:
    """Return a length of time for people: 12.3 s, 0:02:31."""
    return f"{seconds:.1f} s" if seconds < 59.95 else str(timedelta(seconds=round(seconds)))
