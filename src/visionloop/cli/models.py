"""Commands about models: gate, approve, register, promote, rollback, history."""

from typing import Annotated

import typer

from visionloop.cli.app import app
from visionloop.words import describe_champion, describe_decision, describe_registered, make_refusal
from visionloop.workspace import get_now, get_user, open_workspace


@app.command()
def gate() -> None:
    """Judge the candidate against the champion on the same test images.

    Exit code 3: refused, inconclusive, or waiting for `visionloop approve`.

    Examples:

      visionloop gate

      visionloop gate && visionloop register && visionloop promote --why "more images"
    """
    from visionloop.data.manifest import load_pin
    from visionloop.pipeline import compute_state
    from visionloop.promotion.decide import gate as run_gate

    workspace = open_workspace()
    settings = workspace.settings
    state = compute_state(settings.home, workspace.params, load_pin(settings.pin_path, workspace.name).digest)
    decision = run_gate(workspace, state=state, now=get_now())
    for line in describe_decision(decision):
        print(line)
    if decision.verdict != "passed":
        raise make_refusal(decision.verdict, [rule.to_json() for rule in decision.rules])


@app.command()
def approve(
    why: Annotated[str, typer.Option(help="The reason, kept with the decision.", show_default=False)],
    number: Annotated[int | None, typer.Argument(help="The decision; default: the last one.")] = None,
) -> None:
    """Let a candidate pass that waits for a person: `gate.approval: required`, or what only a person may allow.

    Examples:

      visionloop approve --why "looked at all changed answers"

      visionloop approve 12 --why "mules are sorted by hand from now on"
    """
    from visionloop.errors import SettingsError
    from visionloop.promotion.decide import approve as run_approve

    why = " ".join(why.split())
    if not why:
        raise SettingsError("visionloop approve --why", "is empty", "a reason, kept with the decision", "Say why.")
    decision = run_approve(open_workspace(), number=number, by=get_user(), why=why, now=get_now())
    for line in describe_decision(decision):
        print(line)
    if decision.verdict != "passed":
        raise make_refusal(decision.verdict, [rule.to_json() for rule in decision.rules])
    print("next: `visionloop register`, then `visionloop promote`; a retrain does both")


@app.command()
def register() -> None:
    """Copy a candidate that passed the gate to the store, and mirror it as an MLflow model version.

    Examples:

      visionloop register
    """
    from visionloop.promotion.promote import register as run_register

    workspace = open_workspace()
    version = run_register(workspace)
    print(describe_registered(workspace.name, version))


@app.command()
def promote(
    why: Annotated[str | None, typer.Option(help="The reason, kept in the ledger; default: passed the gate.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also a model that was rolled back from; wants --why.")
    ] = False,
) -> None:
    """Make the registered candidate the champion: a ledger entry, and MLflow's alias `champion`.

    A model that was rolled back from stays down until `--again` takes it back, after `visionloop gate` has found
    nothing else against it.

    Examples:

      visionloop promote --why "500 new images of mules"

      visionloop promote --again --why "the camera was dirty, not the model bad"
    """
    from visionloop.errors import SettingsError
    from visionloop.promotion.promote import promote as run_promote

    if again and not (why and why.strip()):
        todo = 'Say why it should serve after all: `visionloop promote --again --why "..."`.'
        raise SettingsError("visionloop promote --again", "has no --why", "a reason, kept in the ledger", todo)
    workspace = open_workspace()
    entry = run_promote(workspace, by=get_user(), why=why or "passed the gate", now=get_now(), again=again)
    print(describe_champion(entry))


@app.command()
def rollback(
    to: Annotated[int | None, typer.Option(help="A ledger entry; default: the champion before this one.")] = None,
    why: Annotated[str, typer.Option(help="The reason, kept in the ledger.")] = "rolled back",
) -> None:
    """Put an earlier champion back, after checking its bundle. The server follows within seconds.

    Examples:

      visionloop rollback --why "confuses mules with horses"

      visionloop rollback --to 3
    """
    from visionloop.promotion.promote import rollback as run_rollback

    workspace = open_workspace()
    entry = run_rollback(
        workspace,
        to=to,
        by=get_user(),
        why=why,
        now=get_now(),
    )
    print(describe_champion(entry))


@app.command()
def history() -> None:
    """Show every promotion and rollback: when, from which bundle to which, by what verdict, who and why.

    What does not belong into the ledger is named, with exit code 2.

    Examples:

      visionloop history
    """
    from visionloop.promotion.ledger import find_verdict, read_ledger, require_sound

    workspace = open_workspace()
    ledger = read_ledger(workspace.store, workspace.name)
    if not ledger.entries:
        print(f"{workspace.name} has no champion yet; `python flows/retrain.py` makes one")
    for entry in reversed(ledger.entries):
        star = "*" if entry is ledger.champion else " "
        at, trained_on = entry.at[:16].replace("T", " "), entry.dataset.get("version", "?")
        verdict = find_verdict(workspace.store, workspace.name, entry)
        print(
            f"{star} {entry.number:>4}  {at}  {entry.action:<8}  {(entry.previous or 'none')[:12]:>12} ->"
            f" {entry.bundle[:12]}  model {entry.model_version:<4}  dataset {trained_on}  {verdict:<19}"
            f"  {entry.by}: {entry.why}"
        )
    require_sound(ledger, workspace.name)
