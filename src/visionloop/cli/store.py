"""Commands about the object store: what it is, and making it ready."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from visionloop.cli.app import app

if TYPE_CHECKING:
    from visionloop.store import ObjectStore
    from visionloop.store.setup import Fact

store_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(store_app, name="store")


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

    return open_store(load_settings(os.environ, Path.cwd()).store_url)


def _describe(fact: "Fact") -> str:
    return f"{'ok ' if fact.ok else '-- '} {fact.subject:<20} {fact.found}"
