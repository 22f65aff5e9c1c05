"""Commands about the workspace itself and its store: new, doctor, store."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import app

if TYPE_CHECKING:
    from visionloop.store import ObjectStore
    from visionloop.store.setup import Fact

store_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(store_app, name="store")


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    example: Annotated[
        str, typer.Option(help="cats-and-dogs, digits, dog-breeds, fourteen-classes, horses-or-humans.")
    ] = "digits",
    name: Annotated[str | None, typer.Option(help="Name of dataset, model and experiment.")] = None,
) -> None:
    """Make a workspace of your own: params.yaml, dvc.yaml, git and dvc ready.

    Examples:

      visionloop new ~/pets --example horses-or-humans --name pets

      visionloop new /tmp/digits
    """
    from visionloop.workspace import make_workspace

    home = make_workspace(folder, example, name=name)
    print(f"made {home} from the example {example}")
    readme = home / "README.md"
    if readme.is_file():
        print(f"read {readme} for the next step; params.yaml holds what you can change")


@app.command()
def doctor() -> None:
    """Check versions, store, MLflow, disk, processor, GPU, and the ledger against MLflow's alias; say what to do.

    Examples:

      visionloop doctor
    """
    from visionloop.doctor import examine
    from visionloop.workspace import open_workspace

    workspace = open_workspace()
    findings = examine(workspace)
    width = max(len(f.subject) for f in findings)
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'LOOK'}  {finding.subject:<{width}}  {finding.found}")
        if not finding.ok:
            print(f"      {'':<{width}}  -> {finding.todo}")
    if any(not f.ok for f in findings):
        raise typer.Exit(2)


@store_app.callback()
def store(typer_context: typer.Context) -> None:
    """Say what the object store is: address, versioning, encryption, what happens to unfinished uploads.

    Examples:

      visionloop store

      visionloop store init
    """
    if typer_context.invoked_subcommand:
        return
    from visionloop.store.setup import describe_store

    facts = []
    for fact in describe_store(_open_store()):
        facts.append(fact)
        print(_describe(fact))
    if not all(fact.ok for fact in facts):
        print("`visionloop store init` sets what is missing")


@store_app.command()
def init() -> None:
    """Make the store ready: the folder, or the bucket with versions, encryption, no public access.

    It can be run again at any time: what is set already stays as it is.

    Examples:

      visionloop store init

      VISIONLOOP_STORE=s3://my-bucket/visionloop visionloop store init
    """
    from visionloop.store.setup import init_store, list_dvc_commands

    opened = _open_store()
    for fact in init_store(opened):
        print(_describe(fact))
    print("to keep DVC's cache there too:")
    for line in list_dvc_commands(opened):
        print(f"  {line}")


def _open_store() -> "ObjectStore":
    from visionloop.settings import load_settings
    from visionloop.store import open_store

    return open_store(load_settings(os.environ).store_url)


def _describe(fact: "Fact") -> str:
    return f"{'ok ' if fact.ok else '-- '} {fact.subject:<20} {fact.found}"
