"""The command `forget`: images out of the dataset and out of every copy, for good."""

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionloop.cli.app import Json, Quiet, app, print_json, say_next
from visionloop.cli.waiting import show_waiting
from visionloop.errors import SettingsError
from visionloop.workspace import get_now, get_user, open_workspace

if TYPE_CHECKING:
    from visionloop.forget import Everything, Forgotten, Wanted
    from visionloop.workspace import Workspace

SHOWN = 10
LOOK_FIRST = "See first what goes: --dry-run."
NEXT = "`visionloop start` trains without them; `similar`, `suspects` and `map` need it, or `visionloop prepare`, first"


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
    as_json: Json = False,
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
    from visionloop.forget import forget as run_forget
    from visionloop.forget import resolve_images

    workspace = open_workspace()
    check_store(workspace)
    name, quiet = workspace.name, quiet or as_json
    tell_lines = _tell_nothing if as_json else _print_lines
    wanted = resolve_images(workspace.store, name, images or [], origin or [])
    facts = describe_for_machines(name, wanted)
    tell_lines(describe_wanted(name, wanted))
    if wanted.sha256s and (dry_run or not yes):
        facts |= _find_copies(workspace, wanted, tell_lines, quiet=quiet)
    is_gone = facts.get("copies") == [] and not (wanted.records or wanted.others)
    if dry_run or not wanted.sha256s:
        tell_lines(["nothing was changed"] if wanted.sha256s else [])
        if as_json:
            print_json(facts)
        todo = "the same without --dry-run" if wanted.sha256s else "`visionloop forget SHA256 --dry-run`"
        say_next(todo, quiet=quiet or is_gone)
        return
    if not yes and not is_gone:
        if as_json:
            raise SettingsError("visionloop forget --json", "asks nothing", "--yes with it", LOOK_FIRST)
        confirm()
    with show_waiting("forgetting", quiet=quiet) as tell:
        tell_gone = (lambda line: None) if quiet else (lambda line: tell(f"removing {line}"))
        done = run_forget(workspace, wanted, now=get_now(), by=get_user(), why=why, tell=tell_gone)
    if not is_gone or done.pin_moved:
        tell_lines(describe_done(name, done))
    if as_json:
        version = done.version.version if done.version else None
        print_json({**facts, "version": version, "left": [vars(left) for left in done.left]})
    say_next(NEXT, quiet=quiet or is_gone)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _tell_nothing(lines: Iterable[str]) -> None:
    pass


def _find_copies(
    workspace: "Workspace", wanted: "Wanted", tell_lines: Callable[[Iterable[str]], None], *, quiet: bool
) -> dict[str, Any]:
    """Look for every copy, tell of them, and return them for machines."""
    from visionloop.forget import find_everything

    with show_waiting("looking for every copy", quiet=quiet):
        found = find_everything(workspace, wanted.sha256s, gone=frozenset(wanted.again))
    tell_lines(describe_found(workspace.name, wanted, found))
    return {"copies": [copy.what for copy in found.copies], "stays": describe_staying(found)}


def describe_done(name: str, done: "Forgotten") -> list[str]:
    """Return what a forget came to, and what is left."""
    from visionloop.words import fit

    lines = []
    if done.version:
        pinned = ", which is pinned now" if done.pin_moved else ""
        lines.append(f"dataset {name} version {done.version.version} holds {done.version.num_images:,} images{pinned}")
    lines.append("left:" if done.left else "nothing is left")
    return lines + [line for left in done.left for line in (f"  - {fit(left.what, 400)}", f"    {left.todo}")]


def describe_for_machines(name: str, wanted: "Wanted") -> dict[str, Any]:
    """Return the images that are asked about."""
    images = [{"sha256": r.sha256, "labels": r.labels, "side": r.side, "origins": r.origins} for r in wanted.records]
    return {"name": name, "images": images, "others": wanted.others, "again": wanted.again}


def describe_wanted(name: str, wanted: "Wanted") -> list[str]:
    """Return the images, the first few one by one."""
    from visionloop.words import fit

    lines = [] if wanted.sha256s else [f"nothing of {name} was forgotten yet, and no image is named"]
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
    lines = ["will be removed, for good:"] if found.copies else ["nothing is left to remove"]
    lines += [f"  - {copy.what}" for copy in found.copies]
    if wanted.records:
        lines.append(f"a new version of {name} will not hold them; older versions that do can no longer be prepared")
    return lines + [f"stays: {what}" for what in describe_staying(found)]


def describe_staying(found: "Everything") -> list[str]:
    """Return what will not go."""
    stays = [f"bundle {held.digest[:12]}, a champion, keeps one" for held in found.kept_bundles]
    stays += [f"dataset {other} of this store holds {len(held):,} too" for other, held in found.holders.items()]
    return [*stays, *found.unclear]


def confirm() -> None:
    """Ask on a terminal; elsewhere only --yes will do. Raises SettingsError, typer.Abort."""
    if not sys.stdin.isatty():
        raise SettingsError("visionloop forget", "there is no terminal to ask on", "--yes", LOOK_FIRST)
    typer.confirm("This cannot be undone. Forget them?", abort=True)
