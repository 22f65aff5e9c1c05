"""The commands that watch what is served, and how the loop is: monitor, triggers, metrics."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import Json, app, print_json, say_next
from visionloop.errors import SettingsError
from visionloop.words import align, shorten_path
from visionloop.workspace import get_now, get_user, open_workspace

if TYPE_CHECKING:
    from visionloop.params import Params

TRIGGERS = """Is a retrain due, and what was decided before.

Examples:

  visionloop triggers decide && visionloop start
"""
triggers_app = typer.Typer(help=TRIGGERS, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(triggers_app, name="triggers")

NOT_DUE = 3
EXIT_CODES = {"broken": 4, "service": 4, "drift": 3, "quality": 3}
DUE = "`visionloop triggers decide` says whether a retrain is due"
ASK = "`visionloop review --serve` asks for the labels worth having"
NO_IMAGES = "`serve.keep_images` in params.yaml keeps images that `visionloop review` can ask about"
BY_HAND = "`schedule.monitor` in params.yaml judges the next window by itself under `visionloop up`"
MEND = "`visionloop predictions show` shows what was asked; mend that or the server, then `visionloop monitor --again`"
IS_CHANGED = ("drift", "quality")


@app.command()
def monitor(
    at: Annotated[str | None, typer.Option(help="A time in the window, ISO 8601; default: the last one over.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Judge it anew: new labels may have come.")] = False,
    accept: Annotated[bool, typer.Option("--accept", help="Take the window for normal; wants --why.")] = False,
    why: Annotated[str, typer.Option(help="The reason, which is kept.")] = "",
    *,
    everything: Annotated[bool, typer.Option("--all", help="Judge all windows that were missed.")] = False,
    as_json: Json = False,
) -> None:
    """Watch what is served: judge a window of the prediction log.

    Is the data sound, are the images like before, is the accuracy by labels high enough, is the service well? The
    report goes to the store, with its numbers as Parquet, and to monitoring/latest.html.
    Windows that were missed since the last one that was judged are judged first, the newest 14 of them.

    Exit code 3: drift or too low an accuracy, for which a retrain may help. 4: broken data or a bad service, for which
    it does not. Of several windows that are judged now the highest counts.

    Examples:

      visionloop monitor

      visionloop monitor --at 2026-11-28 --again

      visionloop monitor --accept --why "the winter has begun"
    """
    from visionloop.data.known_store import check_store
    from visionloop.monitoring.alert import send_unsent
    from visionloop.monitoring.judge import describe_late, describe_verdict
    from visionloop.monitoring.watch import accept_window, find_missed, watch_window, write_copies
    from visionloop.up.metrics import write_metrics

    if accept and not why.strip():
        raise SettingsError("visionloop monitor --accept", "has no --why", "a reason, kept with the window", "Say why.")
    if everything and (at or again or accept):
        raise SettingsError("visionloop monitor --all", "is with --at, --again or --accept", "it alone", "Drop them.")
    workspace, now = open_workspace(), datetime.now(UTC)
    check_store(workspace)
    missed, left_out = ([], 0) if at or again or accept else find_missed(workspace, now=now, everything=everything)
    late = []
    for start in missed:
        late.append(watch_window(workspace, now=now, at=start)[0])
        print(describe_late(late[-1]), file=sys.stderr if as_json else sys.stdout)
    if left_out:
        print(f"LOOK: {left_out} older windows were missed: --all judges them too", file=sys.stderr)
    verdict, _ = watch_window(workspace, now=now, at=None if at is None else read_time(at), again=again)
    path = write_copies(workspace, verdict)
    if as_json:
        print_json(verdict.to_json())
    shown = [f"with pictures: {shorten_path(path, workspace.settings.home, Path.cwd())}"] if path else []
    for line in [] if as_json else [*describe_verdict(verdict), *shown]:
        print(line)
    if accept:
        accept_window(workspace, verdict.window, by=get_user(), why=" ".join(why.split()), now=get_now())
        print("accepted: later windows are compared with it too", file=sys.stderr if as_json else sys.stdout)
    for note in send_unsent(workspace, os.environ, now=now):
        print(f"note: {note}", file=sys.stderr)
    write_metrics(workspace, now=now)
    say_next(name_next(verdict.verdict, workspace.params), quiet=as_json)
    raise typer.Exit(0 if accept else max(EXIT_CODES.get(one.verdict, 0) for one in (*late, verdict)))


def name_next(verdict: str, params: "Params") -> str:
    """Return what to do after a verdict: what the settings allow, and what they lack."""
    if verdict in ("broken", "service"):
        return MEND
    steps = [NO_IMAGES if params.serve.keep_images == "none" else ASK]
    steps += [DUE] if verdict in IS_CHANGED else []
    return "; ".join(steps if params.schedule.monitor else [*steps, BY_HAND])


@app.command()
def metrics(
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve them to Prometheus; 0: a free port.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: whoever reaches this machine.")] = "127.0.0.1",
) -> None:
    """Show the loop's figures for Prometheus: dataset, champion, last decision, drift, labels and alerts that wait.

    They are read from the store: a retrain or a `monitor` is over before anybody could ask it. With --port they are
    served at /metrics until Ctrl-C, and read every 30 seconds. The server has figures of its own.

    Exit code 2: something cannot be read, which is said; the rest is printed.

    Examples:

      visionloop metrics

      visionloop metrics --port 9101
    """
    from visionloop.up.metrics import Figures, make_server
    from visionloop.up.overview import read_overview

    workspace = open_workspace()
    if port is not None:
        with make_server(workspace, host, port) as server:
            print(f"figures of {workspace.name} on http://{host}:{server.server_port}/metrics", flush=True)
            server.serve_forever()
    figures, overview = Figures(), read_overview(workspace, now=datetime.now(UTC))
    figures.take(overview)
    print(figures.text, end="")
    for problem in overview.problems:
        print(f"error: {problem}", file=sys.stderr)
    raise typer.Exit(2 if overview.problems else 0)


@triggers_app.command("decide")
def decide_now(
    hand: Annotated[str, typer.Option(metavar="WHY", help="A person wants a retrain: nothing holds it back.")] = "",
    webhook: Annotated[str, typer.Option(metavar="WHY", help="Another system has called; kept until a retrain.")] = "",
    *,
    as_json: Json = False,
) -> None:
    """Decide by `triggers` in params.yaml whether a retrain is due, and keep the decision; nothing is started.

    Each "retrain" but by --hand counts in `max_per_week`, also if nobody runs one then: ask where you start it.

    Exit code 0: it is due. 3: it is not.

    Examples:

      visionloop triggers decide && visionloop start

      visionloop triggers decide --webhook "the menu of the canteen has changed"
    """
    from visionloop.data.known_store import check_store
    from visionloop.monitoring.due import decide_retrain
    from visionloop.monitoring.triggers import RETRAIN, Look, describe_looks

    workspace = open_workspace()
    check_store(workspace)
    decision = decide_retrain(workspace, now=datetime.now(UTC), by=get_user(), hand=hand, webhook=webhook)
    if as_json:
        print_json(decision.to_json())
    else:
        print(f"{decision.outcome}: {decision.why}")
        for line in describe_looks(Look.from_json(look) for look in decision.looks):
            print(line)
    is_due = decision.outcome == RETRAIN
    say_next("`visionloop start`" if is_due else "`visionloop triggers history` shows the ones before", quiet=as_json)
    if not is_due:
        raise typer.Exit(NOT_DUE)


@triggers_app.command("history")
def history_of_triggers(
    last: Annotated[int, typer.Option(min=1, help="How many, the newest.")] = 30,
    *,
    as_json: Json = False,
) -> None:
    """List what the triggers decided, newest first, also each "no".

    Examples:

      visionloop triggers history --last 100
    """
    from visionloop.data.known_store import check_store
    from visionloop.monitoring.due import read_decisions

    workspace = open_workspace()
    check_store(workspace)
    found = read_decisions(workspace.store, workspace.name, last)[::-1]
    if as_json:
        print_json({"decisions": [one.to_json() for one in found]})
        return
    if not found:
        print("nothing was decided yet")
    else:
        rows = [[f"{d.number}", d.at[:16].replace("T", " "), f"dataset {d.dataset}", d.outcome, d.why] for d in found]
        for line in align(rows):
            print(line)
    say_next("`visionloop triggers decide`")


def read_time(text: str) -> datetime:
    """Return a time, of UTC where it names no zone. Raises SettingsError."""
    from visionloop.up.overview import parse_time

    if (time := parse_time(text)) is None:
        expected = "a time, like 2026-11-28 or 2026-11-28T06:00"
        raise SettingsError("visionloop monitor --at", f"got {text[:40]!r}", expected)
    return time
