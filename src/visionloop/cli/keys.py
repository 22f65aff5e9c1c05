"""The commands `keys`: who may ask the server for what."""

from pathlib import Path
from typing import Annotated

import typer

from visionloop.cli.app import Json, app, print_json, say_next

keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys_app, name="keys")


@keys_app.callback()
def keys() -> None:
    """Make, list and revoke the keys of the server. Without any, all who reach the server may ask it.

    Examples:

      visionloop keys new --role predict --name camera-3

      visionloop keys list

      visionloop keys revoke camera-3
    """


@keys_app.command("new")
def make_key(
    name: Annotated[str, typer.Option(help="Whose it is, as it will stand in the log.")],
    role: Annotated[list[str], typer.Option(help="predict, feedback or admin; give it several times for several.")],
    rate: Annotated[
        float | None, typer.Option(help="Images a second at most; default: serve.rate_per_s of params.yaml.")
    ] = None,
) -> None:
    """Make a key and print it, this once: only its sha256 is kept.

    Examples:

      visionloop keys new --role predict --name camera-3

      visionloop keys new --role predict --role feedback --name desk --rate 5
    """
    from visionloop.serving.keys import add_key
    from visionloop.workspace import get_now, get_user

    text = add_key(_find_file(), name=name, roles=role, rate_per_s=rate, now=get_now(), by=get_user())
    print(text)


@keys_app.command("list")
def list_keys(as_json: Json = False) -> None:
    """List all keys with their roles, also the revoked ones. The keys themselves are known to their holders alone.

    Examples:

      visionloop keys list

      visionloop keys list --json
    """
    from visionloop.serving.keys import read_keys

    found = read_keys(path := _find_file())
    if as_json:
        listed = [{name: value for name, value in vars(key).items() if name != "sha256"} for key in found]
        print_json({"keys": listed, "open_to_all": not path.exists()})
        return
    for key in found:
        rate = "" if key.rate_per_s is None else f"  {key.rate_per_s:g}/s"
        state = f"revoked {key.revoked_at}" if key.revoked_at else "valid"
        print(f"{key.name:<20} {','.join(key.roles):<16}  made {key.made_at} by {key.made_by}  {state}{rate}")
    if not path.exists():
        print("no key was made: all who reach the server may ask it")
    say_next("`visionloop keys new --role predict --name WHO`, or `visionloop keys revoke WHO`")


@keys_app.command("revoke")
def revoke(name: Annotated[str, typer.Argument(help="Its name, as `visionloop keys list` shows it.")]) -> None:
    """Make a key invalid for ever. Servers that run refuse it from their next request on.

    Examples:

      visionloop keys revoke camera-3
    """
    from visionloop.serving.keys import revoke_key
    from visionloop.workspace import get_now

    revoke_key(_find_file(), name, now=get_now())
    print(f"the key {name} is revoked")
    say_next("`visionloop keys list`")


def _find_file() -> Path:
    import os

    from visionloop.settings import load_settings

    return load_settings(os.environ).keys_path
