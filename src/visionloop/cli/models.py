"""Commands about models: gate, approve, register, promote, rollback, history, lineage, compare."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import Json, Quiet, app, print_json, say, say_next
from visionloop.records import Decision, Interval
from visionloop.words import (
    align,
    describe_champion,
    describe_decision,
    describe_registered,
    make_refusal,
    shorten_path,
)
from visionloop.workspace import Workspace, get_now, get_user, open_workspace

if TYPE_CHECKING:
    from visionloop.predictor import Predictor
    from visionloop.promotion.report import RetrainFacts

MODELS = "champion, candidate, a bundle's folder, NAME@champion, NAME@3, s3://..., or the id of an MLflow run."


@app.command()
def gate(*, quiet: Quiet = False, as_json: Json = False) -> None:
    """Judge the candidate against the champion on the same test images.

    Exit code 3: refused, inconclusive, or waiting for `visionloop approve`.

    Examples:

      visionloop gate

      visionloop gate && visionloop register && visionloop promote --why "more images"

      visionloop gate --json | jq .verdict
    """
    from visionloop.cli.waiting import make_progress
    from visionloop.data.manifest import load_pin
    from visionloop.pipeline import compute_state
    from visionloop.promotion.decide import gate as run_gate

    workspace = open_workspace()
    settings = workspace.settings
    pin = load_pin(settings.pin_path, workspace.name)
    state = compute_state(settings.home, workspace.params, pin.digest, candidate_dir=settings.candidate_dir)
    progress = make_progress("answered", "images", quiet=quiet or as_json, only_slow=True)
    decision = run_gate(workspace, state=state, now=get_now(), on_progress=progress)
    page = f"with pictures: {shorten_path(settings.decisions_dir / 'latest.html', settings.home, Path.cwd())}"
    _tell_decision(decision, page, as_json=as_json)
    say_next("`visionloop register`, then `visionloop promote`", quiet=quiet or as_json)


@app.command()
def approve(
    why: Annotated[str, typer.Option(help="The reason, which is kept.", show_default=False)],
    number: Annotated[int | None, typer.Argument(help="The decision; default: the last one.")] = None,
    as_json: Json = False,
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
    _tell_decision(decision, as_json=as_json)
    say_next("`visionloop register`, then `visionloop promote`; a retrain does both", quiet=as_json)


def _tell_decision(decision: Decision, *more: str, as_json: bool) -> None:
    """Print a decision. Raises NotPromoted unless it passed."""
    if as_json:
        print_json(decision.to_json())
    else:
        print(*describe_decision(decision), *more, sep="\n")
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
    say_next("`visionloop promote`")


@app.command()
def promote(
    why: Annotated[str | None, typer.Option(help="The reason, which is kept; default: passed the gate.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also a model that was rolled back from; wants --why.")
    ] = False,
    *,
    as_json: Json = False,
) -> None:
    """Make the registered candidate the champion: a ledger entry, and MLflow's alias `champion`.

    A model that was rolled back from stays down until `--again` takes it back, after `visionloop gate` has found
    nothing else against it. `--again` registers it where it is not.

    Examples:

      visionloop promote --why "500 new images of mules"

      visionloop promote --again --why "the camera was dirty, not the model bad"
    """
    from visionloop.errors import SettingsError
    from visionloop.promotion.promote import explain_engines
    from visionloop.promotion.promote import promote as run_promote

    if again and not (why and why.strip()):
        todo = 'Say why it should serve after all: `visionloop promote --again --why "..."`.'
        raise SettingsError("visionloop promote --again", "has no --why", "a reason, kept in the ledger", todo)
    workspace = open_workspace()
    entry = run_promote(workspace, by=get_user(), why=why or "passed the gate", now=get_now(), again=again)
    if as_json:
        print_json(entry.to_json())
        return
    print(describe_champion(entry))
    if told := explain_engines(workspace, entry):
        print(told)
    say_next("`visionloop predict PHOTO`, or `visionloop serve`; servers that run follow by themselves")


@app.command()
def rollback(
    to: Annotated[int | None, typer.Option(help="A ledger entry; default: the champion before this one.")] = None,
    why: Annotated[str, typer.Option(help="The reason, which is kept.")] = "rolled back",
    *,
    as_json: Json = False,
) -> None:
    """Put an earlier champion back, after checking its bundle. The server follows within seconds.

    Examples:

      visionloop rollback --why "confuses mules with horses"

      visionloop rollback --to 3
    """
    from visionloop.promotion.promote import rollback as run_rollback

    entry = run_rollback(open_workspace(), to=to, by=get_user(), why=why, now=get_now())
    if as_json:
        print_json(entry.to_json())
        return
    print(describe_champion(entry))
    say_next("`visionloop history`; servers that run follow by themselves, and a retrain leaves the other one down")


@app.command()
def history(
    last: Annotated[int, typer.Option(min=1, help="How many, the newest.")] = 100,
    *,
    as_json: Json = False,
) -> None:
    """Show promotions and rollbacks: when, from which bundle to which, by what verdict, who and why.

    What does not belong into the ledger is named, with exit code 2.

    Examples:

      visionloop history

      visionloop history --last 1000

      visionloop history --json | jq -r .entries[0].bundle
    """
    from visionloop.data.known_store import check_store
    from visionloop.promotion.ledger import find_verdict, read_ledger, require_sound

    workspace = open_workspace()
    check_store(workspace)
    ledger = read_ledger(workspace.store, workspace.name)
    shown = ledger.entries[-last:][::-1]
    left = len(ledger.entries) - len(shown)
    newest_first = [(entry, find_verdict(workspace.store, workspace.name, entry)) for entry in shown]
    if as_json:
        entries = [
            {**one.to_json(), "verdict": verdict, "champion": one is ledger.champion} for one, verdict in newest_first
        ]
        found = {"entries": entries, "num_before": left, "problems": ledger.problems}
        print_json({"name": workspace.name, **found})
        newest_first = []
    elif not newest_first:
        print(f"{workspace.name} has no champion yet")
    for entry, verdict in newest_first:
        star = "*" if entry is ledger.champion else " "
        at, trained_on = entry.at[:16].replace("T", " "), entry.dataset.get("version", "?")
        say(
            f"{star} {entry.number:>4}  {at}  {entry.action:<8}  {(entry.previous or 'none')[:12]:>12} ->"
            f" {entry.bundle[:12]}  model {entry.model_version:<4}  dataset {trained_on}  {verdict:<19}"
            f"  {entry.by}: {entry.why}"
        )
    if newest_first and left:
        print(f"and {left:,} before them (--last {len(ledger.entries)})")
    require_sound(ledger, workspace.name)
    todo = "`visionloop lineage champion`" if ledger.entries else "`visionloop start` makes one"
    if len(ledger.entries) > 1:
        todo = "`visionloop rollback --to NUMBER` puts an earlier one back"
    say_next(todo, quiet=as_json)


@app.command()
def lineage(
    what: Annotated[str, typer.Argument(help="A model (champion, candidate, NAME@3, digest) or an image.")],
    as_json: Json = False,
) -> None:
    """Follow a model back to its images, or an image forward to the models that used it.

    An image is a file, the first letters of its sha256, or the place that it came from.

    Examples:

      visionloop lineage champion

      visionloop lineage photo.jpg
    """
    from visionloop.lineage import ModelOrigin, describe_origin, describe_path, trace

    found = trace(open_workspace(), what)
    if as_json:
        print_json(found.to_json())
        return
    if isinstance(found, ModelOrigin):
        lines, todo = describe_origin(found), "`visionloop datasets show`"
    else:
        lines, todo = describe_path(found), "`visionloop lineage champion`"
    for line in lines:
        say(line)
    say_next(todo)


@app.command()
def compare(
    one: Annotated[str, typer.Argument(help=MODELS)],
    other: Annotated[str, typer.Argument(help=MODELS)],
    out: Annotated[Path, typer.Option(help="Where to write the page (HTML).")] = Path("compared.html"),
    *,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Let two models answer the test side of the pinned version, side by side. Nothing is stored or promoted.

    Examples:

      visionloop compare models/candidate champion

      visionloop compare pets@3 pets@2 --out 3-against-2.html
    """
    from visionloop.cli.waiting import make_progress
    from visionloop.promotion.decide import compare_models
    from visionloop.promotion.evidence import make_page
    from visionloop.workfolder import write_file

    workspace = open_workspace()
    names = (one, other)
    models = (_load_any(workspace, one), _load_any(workspace, other))
    progress = make_progress("answered", "images", quiet=quiet or as_json)
    facts = compare_models(workspace, models, names, now=get_now(), on_progress=progress)
    write_file(out, make_page(workspace.store, facts).encode())
    if as_json:
        print_json({"names": names, **facts.decision.to_json(), "page": str(out)})
        return
    for line in describe_comparison(facts):
        say(line)
    say(f"the images that only one of them has right, classes and more: {out}")
    say_next("`visionloop gate` decides about models/candidate, `visionloop shadow start` tries one live", quiet=quiet)


def describe_comparison(facts: "RetrainFacts") -> list[str]:
    """Return two models' figures as a table, then what the rules of the gate say of the first."""
    from visionloop.promotion.report import format_interval

    decision = facts.decision
    rows = [["", *facts.names]]
    for name in decision.metrics:
        sides = (decision.metrics, decision.champion_metrics)
        both = [Interval.from_json(figures[name]) for figures in sides if name in figures]
        rows.append([name, *(format_interval(name, interval) for interval in both)])
    lines = [f"{decision.num_test:,} test images of dataset version {decision.dataset['version']}", *align(rows)]
    return [*lines, "the rules of the gate, as if the first were a candidate:", *describe_decision(decision)[1:-1]]


def _load_any(workspace: Workspace, address: str) -> "Predictor":
    """Open a model: `champion`, an address, or the id of an MLflow run."""
    from visionloop.predictor import Predictor
    from visionloop.promotion.models import find_bundle_of_run, load_candidate, load_champion, load_model

    if Path(address).absolute() == workspace.settings.candidate_dir:
        return load_candidate(workspace)
    if address == "champion":
        return load_champion(workspace)
    if not re.fullmatch("[0-9a-f]{32}", address) or Path(address).is_dir():
        return load_model(address, lambda: workspace)
    found = find_bundle_of_run(workspace, address)
    if isinstance(found, Path):
        return Predictor.load(found)
    return Predictor.fetch(workspace.store, found, workspace.settings.hidden_dir / "bundles")
