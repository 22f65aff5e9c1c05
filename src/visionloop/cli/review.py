"""The command `review`: asks people for the labels worth having, and accepts what they say."""

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import Json, app, print_json, say, say_next
from visionloop.workspace import get_user, open_workspace

if TYPE_CHECKING:
    from visionloop.data.acceptance import Settled
    from visionloop.data.answers import Batch
    from visionloop.workspace import Workspace

SHOWN = 10
By = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Who answers; kept with each label. Default: the user; --take wants it."),
]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="Port of the page; 0 takes a free one.")]


@app.command()
def review(
    serve: Annotated[bool, typer.Option("--serve", help="Ask on a page, on this machine alone.")] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the batch as a table, to be filled in.")
    ] = None,
    take: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take the answers of such a table; wants --by.")
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Let what was said into the dataset.")] = False,
    *,
    by: By = None,
    port: Port = 0,
    only: Annotated[str | None, typer.Option("--from", metavar="NAME", help="Accept of one person or client.")] = None,
    count: Annotated[int | None, typer.Option(min=1, max=10_000, help="Images of a new batch.")] = None,
    new: Annotated[
        bool, typer.Option("--new", help="Make another batch, though the last one is not answered.")
    ] = False,
    allow_new: Annotated[
        bool, typer.Option("--allow-new-classes", help="Take in new classes, though they look like a mistake.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask for the labels worth having: of images that the server kept, those that are unsure, or new, and some by lot.

    Without an option it makes a batch, or shows the one that is not answered yet, and what waits to be accepted. The
    answers lie in the store: several people may give them, on several machines. Labels enter the dataset by `visionloop
    ingest`, once they are accepted and `ingest.sources` has `- kind: review` (or `- kind: feedback`). For people with a
    spreadsheet, --csv writes the same list with its pictures, and --take reads it back, filled in.

    Examples:

      visionloop review --serve --by ann

      visionloop review --csv ask.csv

      visionloop review --take ask.csv --by ann

      visionloop review --accept
    """
    from visionloop.data.known_store import check_store
    from visionloop.errors import SettingsError

    named = [
        name for name, given in (("--serve", serve), ("--csv", csv), ("--take", take), ("--accept", accept)) if given
    ]
    if len(named) > 1:
        raise SettingsError("visionloop review", f"got {' and '.join(named)}", "one of them", "Run it once for each.")
    if take is not None and by is None:
        raise SettingsError("visionloop review --take", "has no --by", "who has answered", "Say --by NAME.")
    if only is not None and not accept:
        raise SettingsError("--from", "is there without --accept", "both", "Say --accept --from NAME.")
    workspace = open_workspace()
    check_store(workspace)
    if accept:
        _accept(workspace, only, as_json=as_json)
    elif take is not None:
        _take(workspace, take, by or "", allow_new=allow_new)
    else:
        asked = Asking(by or get_user(), count, new, serve, port, csv, as_json)
        _ask(workspace, asked)


@dataclass(frozen=True)
class Asking:
    """How people are asked: of which batch, and where."""

    by: str
    count: int | None
    is_new: bool
    serve: bool
    port: int
    csv: Path | None
    as_json: bool


def _ask(workspace: "Workspace", asked: Asking) -> None:
    from visionloop.cli.predictions import tell_delay
    from visionloop.errors import DatasetError
    from visionloop.monitoring.answer_sheet import check_name, write_sheet
    from visionloop.monitoring.ask import ask

    by, path = check_name(asked.by), asked.csv
    now = datetime.now(UTC)
    try:
        batch = ask(workspace, now=now, by=get_user(), count=asked.count, is_new=asked.is_new)
    except DatasetError:  # nothing to ask about, and yet labels of clients may wait
        for line in [] if asked.as_json else describe_waiting(workspace):
            print(line)
        raise
    if asked.as_json:
        print_json(batch.to_json())
        return
    for line in describe_batch(workspace, batch):
        print(line)
    if batch.until == now.isoformat():  # it was made now
        tell_delay(workspace)
    if path is not None:
        gone = write_sheet(workspace, batch, path.expanduser())
        if gone:
            print(f"{_count(gone, 'image')} without a picture: gone from the store")
        say(f"{path} holds them, and {path.with_suffix('')} their pictures")
        say_next(f"fill in its column `label`, then `visionloop review --take {path} --by NAME`")
    elif asked.serve:
        serve_page(workspace, batch, by=by, port=asked.port)
    else:
        say_next("`visionloop review --serve` asks on a page, `visionloop review --csv ask.csv` by a table")


def serve_page(workspace: "Workspace", batch: "Batch", *, by: str, port: int = 0) -> None:
    """Show a batch on a page until Ctrl-C."""
    from visionloop.monitoring.answer_sheet import check_name
    from visionloop.monitoring.review_page import ReviewPage

    by = check_name(by)
    is_at_once = by in workspace.params.review.accept_at_once
    todo = "`visionloop ingest`" if is_at_once else "`visionloop review --accept`, then `visionloop ingest`"
    page = ReviewPage(workspace, batch, by=by, port=port, after=f"Run {todo}.")
    print(f"\nopen {page.url}", flush=True)
    print("for you alone: who has this address can answer. Each answer is stored at once; Ctrl-C ends.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        page.serve()
    print(f"\n{_tell_stored(page.num_stored, by)}")
    if page.num_stored:
        say_next(todo)


def _take(workspace: "Workspace", path: Path, by: str, *, allow_new: bool) -> None:
    from visionloop.errors import SourceError
    from visionloop.monitoring.answer_sheet import take_sheet

    taken = take_sheet(workspace, path.expanduser(), by=by, allow_new=allow_new)
    if not taken.num_new and not taken.num_known:
        found = f"has no answer in {_count(taken.num_empty, 'row')}"
        raise SourceError(
            f"--take {path}", found, "one in the column `label`", "Fill it in, save it, and take it again."
        )
    known = f", {taken.num_known:,} {'was' if taken.num_known == 1 else 'were'} known" if taken.num_known else ""
    without = "row has" if taken.num_empty == 1 else "rows have"
    print(f"{_tell_stored(taken.num_new, by)}{known}; {taken.num_empty:,} {without} none")
    if by in workspace.params.review.accept_at_once:
        say_next(f"{_tell_ingest(workspace, {'review'})}; they need no word (review.accept_at_once)")
    else:
        say_next("`visionloop review --accept` lets them into the dataset")


def _tell_stored(number: int, by: str) -> str:
    return f"{_count(number, 'answer')} of {by} {'is' if number == 1 else 'are'} stored"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _accept(workspace: "Workspace", only: str | None, *, as_json: bool) -> None:
    from visionloop.data.acceptance import accept, check_giver
    from visionloop.data.answers import RANDOM

    place, now = (workspace.store, workspace.name, workspace.params.review), datetime.now(UTC)
    if only is not None:
        check_giver(*place, only, now=now)
    settled = accept(*place, by=get_user(), now=now, only=only)
    if as_json:
        held = {"conflicts": settled.conflicts, "over_quota": settled.over_quota, "gone": settled.gone}
        accepted = [{**one.to_json(), "is_doubtful": one.is_doubtful} for one in settled.labels]
        print_json({"accepted": accepted, **held})
        return
    givers = [who for one in settled.labels for who in one.who]
    shown = ", ".join(f"{givers.count(who):,} by {who}" for who in sorted(set(givers)))
    print(f"accepted: {_count(len(settled.labels), 'label')}{f' ({shown})' if shown else ''}")
    for line in [*describe_labels(settled), *describe_held(settled, workspace)]:
        print(line)
    if settled.labels:
        drawn = sum(one.reason == RANDOM and one.probability is not None for one in settled.labels)
        print(
            f"{drawn:,} of them, drawn by lot, may come into test by their hash; the others go to train and val alone"
        )
    wanted = {"feedback" if one.client is not None else "review" for one in settled.labels}
    say_next(_tell_ingest(workspace, wanted) if settled.labels else "`visionloop review --serve` asks for more")


def _tell_ingest(workspace: "Workspace", wanted: set[str]) -> str:
    """Say how accepted labels get into the dataset: by a source of their kind, which may be missing."""
    missing = sorted(wanted - {source.kind for source in workspace.params.ingest.sources})
    if not missing:
        return "`visionloop ingest` takes them"
    lines = " and ".join(f"`- kind: {kind}`" for kind in missing)
    return f"add {lines} under ingest.sources in params.yaml, then `visionloop ingest` takes them"


def describe_labels(settled: "Settled") -> list[str]:
    """Tell each label: who gave it, and what the model had answered. Those that the model contradicts come first."""
    from visionloop.words import align, cut

    rows = []
    for one in sorted(settled.labels, key=lambda one: (not one.is_doubtful, one.sha256)):
        sure = "" if one.confidence is None else f" {one.confidence:.3f}"
        model = f"{'had' if one.kind == 'suspects' else 'model:'} {cut(', '.join(one.before)) or 'none'}"
        doubt = "LOOK: the model was sure of another label" if one.is_doubtful else ""
        rows.append([one.sha256[:12], cut(", ".join(one.labels)), f"by {', '.join(one.who)}", model + sure, doubt])
    more = [f"  and {len(rows) - SHOWN:,} more (all: --accept --json)"] if len(rows) > SHOWN else []
    return [*(f"  {line}" for line in (align(rows[:SHOWN]) if rows else [])), *more]


def describe_batch(workspace: "Workspace", batch: "Batch") -> list[str]:
    """Tell what a batch holds and how far it is, and what waits to be accepted."""
    from visionloop.monitoring.ask import describe_reasons, measure_progress
    from visionloop.words import align, cut

    progress = measure_progress(workspace, batch)
    lines = [
        f"batch {batch.number} of {batch.at[:16].replace('T', ' ')}: {_count(len(batch.images), 'image')} "
        f"({describe_reasons(batch.images)}), {progress.num_answered:,} answered"
    ]
    left = [one for one in batch.images if one.sha256 not in progress.answered]
    rows = [[one.reason, f"{one.confidence:.2f}", cut(", ".join(one.model)), one.sha256[:12]] for one in left]
    lines += ["still open:"] if rows and progress.num_answered else []
    lines += [f"  {line}" for line in align(rows[:SHOWN])]
    lines += [f"  and {len(rows) - SHOWN:,} more"] if len(rows) > SHOWN else []
    return [*lines, *describe_waiting(workspace)]


def describe_waiting(workspace: "Workspace") -> list[str]:
    """Tell which labels would be accepted now, and which are held."""
    from visionloop.data.acceptance import look

    lines = []
    settled = look(workspace.store, workspace.name, workspace.params.review, now=datetime.now(UTC))
    if settled.labels:
        wait = "waits" if len(settled.labels) == 1 else "wait"
        lines.append(f"{_count(len(settled.labels), 'label')} {wait}: `visionloop review --accept`")
    return [*lines, *describe_labels(settled), *describe_held(settled, workspace)]


def describe_held(settled: "Settled", workspace: "Workspace") -> list[str]:
    """Tell what is not accepted, and why."""
    lines = []
    for sha256, said in [*settled.conflicts.items()][:SHOWN]:
        lines.append(f"held: people disagree on {sha256[:12]} ({said}); `--accept --from NAME` takes one's word")
    if len(settled.conflicts) > SHOWN:
        lines.append(f"held: people disagree on {len(settled.conflicts) - SHOWN:,} more")
    for client, number in sorted(settled.over_quota.items()):
        most = workspace.params.review.client_quota
        name = f"client {client}" if client else "clients without a key"
        lines.append(f"held: {number:,} labels of {name} are over review.client_quota ({most:,} a day)")
    if settled.echoes:
        lines.append(f"never a label: {settled.echoes:,} that repeat the model's answer, and nobody stands for them")
    if settled.num_not_ours:
        lines.append(f"not images of ours: {settled.num_not_ours:,}")
    if settled.gone:
        lines.append(f"held: {len(settled.gone):,} images are gone from the store")
    return lines
