"""The commands `triggers decide` and `triggers history`: is a retrain due, and what was decided before."""

from typing import Annotated

import typer

from visionloop.cli.app import Json, app, print_json, say_next

HELP = """Is a retrain due, and what was decided before.

Examples:

  visionloop triggers decide && visionloop start
"""
triggers_app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(triggers_app, name="triggers")
NOT_DUE = 3


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
    from datetime import UTC, datetime

    from visionloop.data.known_store import check_store
    from visionloop.monitoring.due import decide_retrain
    from visionloop.monitoring.triggers import RETRAIN, Look, describe_looks
    from visionloop.workspace import get_user, open_workspace

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
    from visionloop.words import align
    from visionloop.workspace import open_workspace

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
