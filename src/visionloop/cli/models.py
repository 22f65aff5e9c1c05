"""Commands about models: gate, register, promote, rollback, history."""

from typing import Annotated

import typer

from visionloop.cli.app import app
from visionloop.words import describe_champion, describe_decision, describe_registered, make_refusal
from visionloop.workspace import get_now, get_user, open_workspace


@app.command()
def gate() -> None:
    """Judge the candidate against the champion on the same test images. Exit code 3: refused or inconclusive.

    Examples:

      visionloop gate

      visionloop gate && visionloop register && visionloop promote --why "more images"
    """
    from visionloop.data.manifest import load_pin
    from visionloop.pipeline import compute_state
    from visionloop.promotion.decide import gate as run_gate

    workspace = open_workspace()
    settings = workspace.settings
    pin = load_pin(settings.pin_path, workspace.name)
    state = compute_state(settings.home, workspace.params, pin.digest, candidate_dir=settings.candidate_dir)
    decision = run_gate(workspace, state=state, now=get_now())
    for line in describe_decision(decision):
        print(line)
    if decision.verdict != "passed":
        raise make_refusal(decision.verdict, [rule.to_json() for rule in decision.rules])


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
    why: Annotated[str, typer.Option(help="The reason, kept in the ledger.")] = "passed the gate",
) -> None:
    """Make the registered candidate the champion: a ledger entry, and MLflow's alias `champion`.

    Examples:

      visionloop promote --why "500 new images of mules"
    """
    from visionloop.promotion.promote import promote as run_promote

    workspace = open_workspace()
    entry = run_promote(workspace, by=get_user(), why=why, now=get_now())
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
    """Show every promotion and rollback: who, when, why, from what.

    Examples:

      visionloop history
    """
    from visionloop.data.known_store import check_store
    from visionloop.promotion.ledger import read_history

    workspace = open_workspace()
    check_store(workspace)
    entries = read_history(workspace.store, workspace.name)
    if not entries:
        print(f"{workspace.name} has no champion yet; `python flows/retrain.py` makes one")
    for entry in reversed(entries):
        star = "*" if entry is entries[-1] else " "
        at, trained_on = entry.at[:16].replace("T", " "), entry.dataset.get("version", "?")
        print(
            f"{star} {entry.number:>4}  {at}  {entry.action:<8}  bundle {entry.bundle[:12]}"
            f"  model {entry.model_version:<4}  dataset {trained_on}  {entry.by}: {entry.why}"
        )
