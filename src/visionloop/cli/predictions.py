"""The command `predictions`: what the servers answered, and what people said of it: count, show, export, tidy."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionloop.cli.app import Json, app, print_json, say, say_next
from visionloop.errors import DiskError, ImageError, SettingsError, VisionLoopError
from visionloop.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    import pyarrow as pa

predictions_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(predictions_app, name="predictions")

SHOWN = 3
UNITS = {"d": "days", "h": "hours", "m": "minutes"}
TEXT_COLUMNS = ("classes", "probs", "labels", "feedback_labels")  # lists, which are one text each in a .csv

Since = Annotated[str, typer.Option(metavar="TIME", help="2026-11-28, 2026-11-28T14:00 (UTC), or 7d, 24h, 30m ago.")]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="The same; not with it. Default: now.")]


@predictions_app.callback()
def predictions(
    typer_context: typer.Context,
    since: Since = "14d",
    as_json: Json = False,
) -> None:
    """Count, day by day (UTC), what the servers of this workspace answered, and the feedback on it.

    Examples:

      visionloop predictions

      visionloop predictions show --since 1h

      visionloop predictions export last-week.parquet --since 7d

      visionloop predictions export cameras.csv --since 2026-11-01 --until 2026-11-08 --images kept/

      visionloop predictions tidy
    """
    if typer_context.invoked_subcommand:
        return
    from visionloop.data.prediction_log import read_feedback

    workspace = open_workspace()
    window = parse_window(since, None)
    feedback = read_feedback(workspace.store, workspace.name, window[0]).table
    asked = find_asked(feedback["request_id"].to_pylist(), window)
    unmatched = set(asked)
    tables = leave_out(_read(workspace, window, Day.COLUMNS), unmatched)
    days = count_days(tables, set(feedback["request_id"].to_pylist()))
    if as_json:
        print_json({"name": workspace.name, "days": [vars(one) for one in days]})
    elif days:
        for one in days:
            print(one.describe())
    else:
        print(f"no answer of {workspace.name} since {window[0]:%Y-%m-%d %H:%M}")
    tell_unmatched(unmatched, asked)
    if not as_json:
        tell_delay(workspace)
    todo = "`visionloop monitor` judges them, `visionloop predictions show` shows the newest"
    say_next(todo if days else "`visionloop serve` answers, and writes it down", quiet=as_json)


@predictions_app.command()
def show(
    since: Since = "24h",
    until: Until = None,
    most: Annotated[int, typer.Option(min=1, help="So many at most, the newest.")] = 20,
    *,
    as_json: Json = False,
) -> None:
    """Show single answers, the newest last, with the newest feedback on each.

    Examples:

      visionloop predictions show

      visionloop predictions show --since 2026-11-28T14:00 --until 2026-11-28T15:00 --most 100
    """
    import pyarrow as pa

    from visionloop.data.prediction_log import join_feedback, read_feedback

    workspace = open_workspace()
    window = parse_window(since, until)
    newest: Any = None
    columns = ("request_id", "time", "prediction", "confidence", "abstained", "model_version", "image_kept")
    for rows in _read(workspace, window, columns):
        newest = pa.concat_tables([newest, rows]) if newest is not None else rows
        newest = newest.sort_by("time")[-most:] if len(newest) > most else newest.sort_by("time")
    answers: list[dict[str, Any]] = []
    if newest is not None and len(newest):
        feedback = read_feedback(workspace.store, workspace.name, window[0]).table
        answers = join_feedback(newest, feedback).to_pylist()
    if as_json:
        print_json({"name": workspace.name, "answers": [make_plain(row) for row in answers]})
    elif not answers:
        print(f"no answer between {window[0]:%Y-%m-%d %H:%M} and {window[1]:%Y-%m-%d %H:%M} UTC")
    for row in [] if as_json else answers:
        print(describe_row(row))
    if not as_json and until is None:
        tell_delay(workspace)
    say_next("`visionloop review` asks for the labels worth having", quiet=as_json)


@predictions_app.command()
def export(
    out: Annotated[Path, typer.Argument(help="A .parquet or .csv file.")],
    *,
    since: Since = "7d",
    until: Until = None,
    images: Annotated[Path | None, typer.Option(help="Write the kept images of the window into this folder.")] = None,
) -> None:
    """Write the answers of a window of time into one file, with the newest feedback on each. A .csv has no embeddings.

    Examples:

      visionloop predictions export last-week.parquet

      visionloop predictions export today.csv --since 24h --images kept/
    """
    from visionloop.data.prediction_log import PREDICTIONS, join_feedback, read_feedback
    from visionloop.workfolder import check_place

    workspace = open_workspace()
    if out.suffix not in (".parquet", ".csv"):
        raise SettingsError(f"--out {out}", f"ends with {out.suffix!r}", ".parquet or .csv", "Name such a file.")
    window = parse_window(since, until)
    feedback = read_feedback(workspace.store, workspace.name, window[0]).table
    columns = [name for name in PREDICTIONS.columns if name != "embedding" or out.suffix == ".parquet"]
    check_place(out, f"--out {out}")
    asked = find_asked(feedback["request_id"].to_pylist(), window)
    unmatched, num_kept, files = set(asked), 0, set[str]()

    def read() -> "Iterator[pa.Table]":
        nonlocal num_kept
        yield join_feedback(PREDICTIONS.make_schema().empty_table().select(columns), feedback)
        for rows in leave_out(_read(workspace, window, columns), unmatched):
            num_kept += sum(map(bool, rows["image_kept"].to_pylist()))
            files.update(write_images(workspace, rows, images) if images else ())
            yield join_feedback(rows, feedback)

    try:
        number = write_tables(out, read())
    except OSError as exc:
        if isinstance(exc, VisionLoopError):
            raise
        found = f"cannot be written ({exc.strerror or exc})"
        raise DiskError(exc.filename or str(out), found, "a file on a disk with free space", "Name another.") from exc
    kept = f"; the images of {num_kept:,} of them are {len(files):,} files in {images}" if images else ""
    say(f"{number:,} answers in {out}{kept}")
    tell_unmatched(unmatched, asked)
    say_next("`visionloop monitor` judges what was served")


@predictions_app.command()
def tidy() -> None:
    """Merge the small parts of finished days, and remove what is older than `serve.log_days`.

    Safe at any time, also while servers write: run it once a day. A monitor run does the same.

    Examples:

      visionloop predictions tidy
    """
    from visionloop.data.prediction_log import tidy as run_tidy

    workspace = open_workspace()
    keep_days = workspace.params.serve.log_days
    done = run_tidy(workspace.store, workspace.name, now=datetime.now(UTC), keep_days=keep_days)
    print(f"{done.num_merged:,} parts merged, {done.num_expired:,} objects older than {keep_days} days removed")
    say_next("`visionloop predictions`")


@dataclass
class Day:
    """What was answered on one day."""

    COLUMNS = ("request_id", "time", "prediction", "confidence", "abstained", "model_version", "image_kept")

    day: str
    num_answers: int = 0
    num_abstained: int = 0
    num_kept: int = 0
    num_feedback: int = 0
    mean_confidence: float = 0.0
    predictions: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)

    def count(self, row: dict[str, Any], *, has_feedback: bool) -> None:
        """Add an answer."""
        self.num_answers += 1
        self.num_abstained += bool(row["abstained"])
        self.num_kept += bool(row["image_kept"])
        self.num_feedback += has_feedback
        self.mean_confidence += ((row["confidence"] or 0.0) - self.mean_confidence) / self.num_answers
        self.predictions[row["prediction"] or "(none)"] += 1
        self.versions[row["model_version"] or "(a path)"] += 1

    def describe(self) -> str:
        """Return the day as one line."""
        commonest = ", ".join(f"{name} {number:,}" for name, number in self.predictions.most_common(SHOWN))
        more = f", {len(self.predictions) - SHOWN:,} more" if len(self.predictions) > SHOWN else ""
        return (
            f"{self.day}  {self.num_answers:>9,} answers  confidence {self.mean_confidence:.2f}"
            f"  don't know {self.num_abstained / max(1, self.num_answers):5.1%}  {self.num_feedback:,} with feedback"
            f"  {self.num_kept:,} with kept image  version {', '.join(sorted(self.versions))}: {commonest}{more}"
        )


def count_days(tables: "Iterable[pa.Table]", with_feedback: set[str]) -> list[Day]:
    """Count answers day by day."""
    days: dict[date, Day] = {}
    for rows in tables:
        for row in rows.to_pylist():
            day = row["time"].date()
            days.setdefault(day, Day(day.isoformat())).count(row, has_feedback=row["request_id"] in with_feedback)
    return [days[day] for day in sorted(days)]


def parse_window(since: str, until: str | None, now: datetime | None = None) -> tuple[datetime, datetime]:
    """Return the start and the end of a window of time, in UTC. Raises SettingsError."""
    now = now or datetime.now(UTC)
    start, end = _parse_time("--since", since, now), _parse_time("--until", until, now) if until else now
    if start >= end:
        raise SettingsError(f"--since {since}", f"is not before {end:%Y-%m-%d %H:%M} UTC", "an earlier time")
    return start, end


def _parse_time(option: str, text: str, now: datetime) -> datetime:
    try:
        if match := re.fullmatch(r"(\d{1,6})([dhm])", text):
            return now - timedelta(**{UNITS[match[2]]: int(match[1])})
        time = datetime.fromisoformat(text)
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError) as exc:
        expected = "a day like 2026-11-28, a time like 2026-11-28T14:00, or 7d, 24h, 30m"
        raise SettingsError(option, f"got {text[:60]!r}", expected) from exc


def describe_row(row: dict[str, Any]) -> str:
    """Return an answer as one line."""
    said = row["feedback_labels"]
    judged = "" if said is None else f"  people say {', '.join(said) or 'no label'}"
    doubt = "?" if row["abstained"] else " "
    kept = "  image kept" if row["image_kept"] else ""
    return (
        f"{row['time']:%Y-%m-%d %H:%M:%S}  {row['request_id']:<24} {doubt} {row['prediction'] or '(no label)'}"
        f"  {row['confidence'] or 0.0:6.1%}  version {row['model_version'] or '-'}{kept}{judged}"
    )


def make_plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return an answer with its times as texts."""
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in row.items()}


def find_asked(request_ids: Iterable[str], window: tuple[datetime, datetime]) -> list[str]:
    """Return the ids of a feedback whose answers are of a window of time, if there are such answers."""
    from visionloop.data.prediction_log import read_request_time

    times = ((one, read_request_time(one)) for one in request_ids)
    return [one for one, asked_at in times if asked_at is None or window[0] <= asked_at < window[1]]


def leave_out(tables: "Iterable[pa.Table]", unmatched: set[str]) -> "Iterator[pa.Table]":
    """Pass answers on, and take their ids out of a set."""
    for rows in tables:
        unmatched.difference_update(rows["request_id"].to_pylist())
        yield rows


def tell_unmatched(unmatched: set[str], asked: list[str]) -> None:
    """Say how much feedback is on no answer."""
    if number := sum(one in unmatched for one in asked):
        why = "of a list each result has its own id; answers of the last moments may still be on their way"
        print(f"{number:,} of the feedback match{'es' if number == 1 else ''} no answer ({why})", file=sys.stderr)


def tell_delay(workspace: Workspace) -> None:
    """Say which answers a window up to now may lack."""
    delay = f"{workspace.params.serve.log_flush_s:g} s"
    print(
        f"answers of the last {delay} may be missing: a server sends them so often (serve.log_flush_s)", file=sys.stderr
    )


def write_images(workspace: Workspace, rows: "pa.Table", folder: Path) -> set[str]:
    """Write the kept images of some answers into a folder, each once; return the names of their files."""
    from visionloop.data.prediction_log import read_kept_image
    from visionloop.errors import ObjectMissing

    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for row in rows.select(["time", "image_sha256", "image_kept"]).to_pylist():
        sha256 = str(row["image_sha256"])
        if not row["image_kept"] or sha256 in names:
            continue
        try:
            data = read_kept_image(workspace.store, workspace.name, row["time"].date(), sha256)
        except ObjectMissing:  # forgotten, or on its way
            continue
        names[sha256] = f"{sha256}.{find_suffix(data)}"
        (folder / names[sha256]).write_bytes(data)
    return set(names.values())


def find_suffix(data: bytes) -> str:
    """Return the end of a file's name by the format of an image; `bin` where it is not known."""
    from visionloop.data.encoded import parse_encoded
    from visionloop.data.export import SUFFIXES

    try:
        return SUFFIXES.get(parse_encoded(data, "image").kind, "bin")
    except ImageError:
        return "bin"


def write_tables(out: Path, tables: "Iterator[pa.Table]") -> int:
    """Write tables as one file, whole or not at all; return how many rows it has."""
    from pyarrow import csv
    from pyarrow.parquet import ParquetWriter

    first = next(tables)
    staged = out.with_name(f".{out.name}.writing")
    number = 0
    try:
        if out.suffix == ".csv":
            first = _flatten(first)
            writer: Any = csv.CSVWriter(staged, first.schema)
        else:
            writer = ParquetWriter(staged, first.schema, compression="zstd")
        with writer:
            writer.write_table(first)
            for rows in tables:
                writer.write_table(_flatten(rows) if out.suffix == ".csv" else rows.cast(first.schema))
                number += len(rows)
        staged.replace(out)
    finally:
        staged.unlink(missing_ok=True)
    return number


def _flatten(rows: "pa.Table") -> "pa.Table":
    """Return rows whose lists are texts, joined by |."""
    import pyarrow as pa

    for name in set(TEXT_COLUMNS) & set(rows.column_names):
        values = [None if value is None else "|".join(map(str, value)) for value in rows[name].to_pylist()]
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values, pa.string()))
    return rows


def _read(workspace: Workspace, window: tuple[datetime, datetime], columns: Iterable[str]) -> "Iterator[pa.Table]":
    """Yield the answers of a window, part by part; say at the end which parts are damaged."""
    from visionloop.data.day_table import DayReader
    from visionloop.data.known_store import check_store
    from visionloop.data.prediction_log import PREDICTIONS
    from visionloop.errors import shorten

    check_store(workspace)
    reader = DayReader(PREDICTIONS, workspace.store, workspace.name)
    yield from reader.read(*window, list(columns))
    if reader.damaged:
        print(f"passed over, because they are damaged: {shorten(sorted(reader.damaged))}", file=sys.stderr)
