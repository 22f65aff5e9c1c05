"""The command `forget`: images out of the dataset and out of every copy, for good."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import Quiet, app
from visionloop.cli.waiting import show_waiting
from visionloop.workspace import get_now, get_user, open_workspace

if TYPE_CHECKING:
    from visionloop.forget import Everything, Wanted

SHOWN = 10


@app.command()
def forget(
    images: Annotated[list[str] | None, typer.Argument(metavar="SHA256", help="8 digits or more of each.")] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="Images that came from here: 'photos:cats/1.jpg', 'photos:anna/*'.")
    ] = None,
    why: Annotated[str, typer.Option(help="The reason, which is kept.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go and what would be left.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    *,
    quiet: Quiet = False,
) -> None:
    """Forget images for good: a new version without them; their bytes and all copies removed; never taken in again.

    Ends with the list of what is left, such as models that learned from them. Stopped at any point, the same command
    finishes. Without images: finish what was begun anywhere, and remove what this workspace still keeps.

    Examples:

      visionloop forget 3f786850e387 --why "asked by the owner"

      visionloop forget --origin 'photos:anna/*' --dry-run

      visionloop forget
    """
    from visionloop.data.known_store import check_store
    from visionloop.forget import find_everything, resolve_images
    from visionloop.forget import forget as run_forget
    from visionloop.words import fit

    workspace = open_workspace()
    check_store(workspace)
    store, name = workspace.store, workspace.name
    wanted = resolve_images(store, name, images or [], origin or [])
    if not wanted.sha256s:
        print(f"nothing of {name} was forgotten yet, and no image is named")
        return
    for line in describe_wanted(name, wanted):
        print(line)
    if dry_run or not yes:
        with show_waiting("looking for every copy", quiet=quiet):
            found = find_everything(workspace, wanted.sha256s, gone=frozenset(wanted.again))
        for line in describe_found(name, wanted, found):
            print(line)
    if dry_run:
        print("nothing was changed")
        return
    if not yes:
        confirm()
    with show_waiting("forgetting", quiet=quiet) as tell:
        tell_gone = (lambda line: None) if quiet else (lambda line: tell(f"removing {line}"))
        done = run_forget(workspace, wanted, now=get_now(), by=get_user(), why=why, tell=tell_gone)
    if done.version:
        pinned = ", which is pinned now" if done.pin_moved else ""
        print(f"dataset {name} version {done.version.version} holds {done.version.num_images:,} images{pinned}")
    print("left:" if done.left else "nothing is left")
    for left in done.left:
        print(f"  - {fit(left.what, 400)}\n    {left.todo}")


def describe_wanted(name: str, wanted: "Wanted") -> list[str]:
    """Return the images, the first few one by one."""
    from visionloop.words import fit

    lines = []
    if wanted.records:
        noun = "image" if len(wanted.records) == 1 else "images"
        lines.append(f"{len(wanted.records):,} {noun} of dataset {name}:")
        for record in wanted.records[:SHOWN]:
            text = f"{', '.join(record.labels) or '(unlabelled)'}  {(*record.origins, '')[0]}"
            lines.append(f"  {record.sha256[:12]}  {record.side:<8}  {fit(text, 80)}")
        if len(wanted.records) > SHOWN:
            lines.append(f"  and {len(wanted.records) - SHOWN:,} more")
    if wanted.others:
        lines.append(f"{len(wanted.others):,} in the store and in no version: {wanted.others[0][:12]} ...")
    if wanted.again:
        lines.append(f"{len(wanted.again):,} that were forgotten before: looking for what is still there")
    return lines


def describe_found(name: str, wanted: "Wanted", found: "Everything") -> list[str]:
    """Return what will go, and what a person should know before."""
    lines = ["will be removed, for good:"]
    lines += [f"  - {copy.what}" for copy in found.copies] or ["  - nothing that is not gone"]
    if wanted.records:
        lines.append(f"a new version of {name} will not hold them; older versions that do can no longer be prepared")
    lines += [f"stays: bundle {held.digest[:12]}, a champion, keeps one" for held in found.kept_bundles]
    lines += [f"stays: dataset {other} of this store holds {len(held):,} too" for other, held in found.holders.items()]
    return lines + [f"stays: {what}" for what in found.unclear]


def confirm() -> None:
    """Ask on a terminal; elsewhere only --yes will do. Raises SettingsError, typer.Abort."""
    from visionloop.errors import SettingsError

    if not sys.stdin.isatty():
        raise SettingsError(
            "visionloop forget", "there is no terminal to ask on", "--yes", "See first what goes: --dry-run."
        )
    typer.confirm("This cannot be undone. Forget them?", abort=True)
