"""Commands about the workspace as a whole and its store: start, new, doctor, store."""

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import Json, Quiet, app, print_json, say, say_next

if TYPE_CHECKING:
    from visionloop.store import ObjectStore
    from visionloop.store.setup import Fact
    from visionloop.words import Summary
    from visionloop.workspace import Workspace

BUILT_IN = "digits"  # the example whose images come with the installation

store_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(store_app, name="store")


@app.command()
def start(
    photos: Annotated[
        str | None,
        typer.Argument(
            metavar="PHOTOS", help="A folder, table, zip, video or address, as `visionloop ingest` reads it."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The workspace; made if it is not there.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of dataset, model and experiment, of a new workspace.")] = None,
    *,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """From photos to a judged model that can be served, in one command: new, ingest, train, gate, promote.

    Without PHOTOS: the same for the workspace one is in. What was stopped goes on; what is done already is not done
    again. The photos become a source in params.yaml, so more of them are found the next time. The workspace of
    ~/pets is ./pets-model unless FOLDER is given.

    Examples:

      visionloop start ~/photos/pets

      visionloop start pets.zip ~/models/pets

      cd ~/models/pets && visionloop start
    """
    from visionloop.cli.progress import print_line
    from visionloop.cli.waiting import tell_when_stopped
    from visionloop.data.manifest import latest_version
    from visionloop.errors import SourceError
    from visionloop.retrain import bring_up_to_date
    from visionloop.workspace import clear_folder, open_workspace

    was_there, existed = True, folder is not None and folder.exists()
    tell = (lambda line: None) if quiet or as_json else print_line
    if photos is not None:
        folder, was_there = _open_for(photos, folder, name, tell)
    workspace = open_workspace(folder)
    try:
        with tell_when_stopped():
            summary = bring_up_to_date(workspace, tell=tell)
    except SourceError:
        if not was_there and latest_version(workspace.store, workspace.name) is None:
            clear_folder(workspace.settings.home, keep=existed)
            print("nothing was ingested: the workspace is removed again", file=sys.stderr)
        raise
    _tell_summary(workspace, summary, quiet=quiet, as_json=as_json)


def _tell_summary(workspace: "Workspace", summary: "Summary", *, quiet: bool, as_json: bool) -> None:
    """Tell what came of it, and what is next. Raises NotPromoted."""
    from visionloop.up.board import Board, name_server
    from visionloop.words import make_refusal, render_summary

    summary = replace(summary, commands=name_server(summary.commands, Board(workspace.settings.hidden_dir)))
    if as_json:
        print_json(vars(summary))
    else:
        print(render_summary(summary, shutil.get_terminal_size().columns if sys.stdout.isatty() else 140))
    if summary.is_not_promoted:
        raise make_refusal(summary.verdict, summary.rules, again=summary.outcome == "unchanged")
    there = "" if workspace.settings.home == Path.cwd() else f"cd {workspace.settings.home} && "
    say_next(f"`{there}visionloop predict PHOTO`, or `{there}visionloop up` for pages", quiet=quiet or as_json)


def _open_for(photos: str, folder: Path | None, name: str | None, tell: Callable[[str], None]) -> tuple[Path, bool]:
    """Return the workspace for photos, made if it is not there, with the photos as a source; and if it was there."""
    from visionloop.cli.ingest import make_source, save_source
    from visionloop.settings import PARAMS_FILE
    from visionloop.workspace import make_name, make_workspace

    source = make_source(photos, {}, Path.cwd())
    home = folder or Path(f"{make_name(Path(photos).stem)}-model")
    was_there = (home / PARAMS_FILE).is_file()
    if not was_there:
        home = make_workspace(home, name=name or make_name(source.name))
        tell(f"made the workspace {home}, for git too: after a `git commit` each model names the commit it is of")
    if save_source(home, source):
        tell(f"{photos} is its source {source.name} (kind {source.kind}), in params.yaml")
    return home, was_there


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    example: Annotated[
        str | None,
        typer.Option(
            help="cats-and-dogs, digits, dog-breeds, fourteen-classes, horses-or-humans; default: photos of your own."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of dataset, model and experiment; default: from the folder or example.")
    ] = None,
) -> None:
    """Make a workspace of your own: params.yaml, dvc.yaml, git and dvc ready.

    Without --example it trains a head on a pretrained EfficientNet-Lite0, whose weights come with the installation.

    Examples:

      visionloop new ~/pets

      visionloop new ~/breeds --example dog-breeds --name breeds
    """
    from visionloop.pipeline import is_without_git
    from visionloop.workspace import make_workspace

    home = make_workspace(folder, example, name=name)
    say(f"made {home}" + (f" from the example {example}" if example else ""))
    if is_without_git(home):
        print("git is not installed, or refuses this folder: dvc works without it, and no history is kept")
    say(f"{home}/README.md tells of it, params.yaml holds what you can change, .env.example where it runs")
    there = "" if home == Path.cwd() else f"cd {folder} && "
    photos = "visionloop start" if example == BUILT_IN else "visionloop ingest PHOTOS --save && visionloop start"
    say_next(f"`{there}{photos}`")


@app.command()
def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="First mend the champion's bundle and MLflow's alias; no champion moves.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check versions, store, MLflow, disk, processor, GPU, ledger, the champion's bundle and its alias; say what to do.

    --fix puts damaged files of the champion's bundle back into the store, from a copy on this machine, and points
    MLflow's alias `champion` where the ledger says. It moves nothing else.

    Examples:

      visionloop doctor

      visionloop doctor --fix

      visionloop doctor --json | jq '.findings[] | select(.ok | not)'
    """
    from visionloop.cli.waiting import show_waiting
    from visionloop.doctor import examine
    from visionloop.errors import VisionLoopError
    from visionloop.promotion.restore import mend
    from visionloop.workspace import open_workspace

    workspace = open_workspace()
    mended = []
    if fix:
        try:
            with show_waiting("mending", quiet=quiet or as_json):
                mended = mend(workspace) or ["nothing to mend"]
        except VisionLoopError as exc:
            mended = [f"not mended: {exc}"]
    for line in [] if as_json else mended:
        print(f"fix   {line}", flush=True)
    with show_waiting("looking at everything", quiet=quiet or as_json):
        findings = examine(workspace)
    is_well = all(f.ok for f in findings)
    if as_json:
        print_json({"ok": is_well, "mended": mended, "findings": [vars(f) for f in findings]})
        raise typer.Exit(0 if is_well else 2)
    width = max(len(f.subject) for f in findings)
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'LOOK'}  {finding.subject:<{width}}  {finding.found}")
        if not finding.ok:
            print(f"      {'':<{width}}  -> {finding.todo}")
    if not is_well:
        say_next("what the lines with LOOK say, then `visionloop doctor` again", quiet=quiet)
        raise typer.Exit(2)
    say_next("`visionloop status` shows the state of the loop", quiet=quiet)


@store_app.callback()
def store(typer_context: typer.Context, as_json: Json = False) -> None:
    """Say what the object store is: address, versioning, encryption, what happens to unfinished uploads.

    Examples:

      visionloop store

      visionloop store init
    """
    if typer_context.invoked_subcommand:
        return
    from visionloop.store.setup import describe_store

    is_ready = _tell_facts(describe_store(_open_store()), as_json=as_json)
    todo = (
        "`visionloop doctor` looks at all the rest"
        if is_ready
        else "`visionloop store init` sets what is missing, as far as this store can"
    )
    say_next(todo, quiet=as_json)


@store_app.command()
def init(as_json: Json = False) -> None:
    """Make the store ready: the folder, or the bucket with versions, encryption, no public access.

    It can be run again at any time: what is set already stays as it is.

    Examples:

      visionloop store init

      VISIONLOOP_STORE=s3://my-bucket/visionloop visionloop store init
    """
    from visionloop.store.setup import init_store, list_dvc_commands

    opened = _open_store()
    _tell_facts(init_store(opened), as_json=as_json)
    if as_json:
        return
    print("to keep DVC's cache there too:")
    for line in list_dvc_commands(opened):
        print(f"  {line}")
    say_next("`visionloop ingest PHOTOS`")


@store_app.command()
def accept() -> None:
    """Go on with a store that lacks what this workspace has used: a new one on purpose, or an older copy.

    A pin that the store does not hold is taken away (git still has it), and what was seen of its ledger is forgotten.
    The store that was used before is not touched. Not needed after all of a store was copied to another address.

    Examples:

      VISIONLOOP_STORE=s3://another/store visionloop store accept
    """
    from visionloop.data.known_store import accept_store
    from visionloop.workspace import open_workspace

    workspace = open_workspace()
    given_up = accept_store(workspace)
    for what in given_up:
        print(f"given up: {what}")
    if not given_up:
        print(f"nothing to do: {workspace.store.url} holds all that this workspace knows")
    if not workspace.settings.pin_path.is_file():
        say_next(f"`visionloop ingest` makes or finds the dataset in {workspace.store.url}")
    else:
        say_next("`visionloop doctor`")


def _open_store() -> "ObjectStore":
    from visionloop.settings import load_settings
    from visionloop.store import open_store

    return open_store(load_settings(os.environ).store_url)


def _tell_facts(found: "Iterable[Fact]", *, as_json: bool) -> bool:
    """Tell each fact once it is known, or all as JSON; return whether all is as it should be."""
    facts = []
    for fact in found:
        facts.append(fact)
        if not as_json:
            print(_describe(fact), flush=True)
    is_ready = all(fact.ok for fact in facts)
    if as_json:
        print_json({"ok": is_ready, "facts": [vars(fact) for fact in facts]})
    return is_ready


def _describe(fact: "Fact") -> str:
    return f"{'ok ' if fact.ok else '-- '} {fact.subject:<20} {fact.found}"
