"""The command `datasets`: list the versions, look into one, compare two, take one back, write one as plain files."""

import os
from collections import Counter
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, cast

import typer

from visionloop.cli.app import Json, Quiet, app, print_json, say, say_next
from visionloop.cli.waiting import make_progress
from visionloop.workspace import Workspace, get_now, open_workspace

if TYPE_CHECKING:
    from visionloop.data.drop import Dropped
    from visionloop.data.leaks import Leaks
    from visionloop.data.rows import Tally
    from visionloop.records import DatasetVersion, LedgerEntry, Pin, Rejected

datasets_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(datasets_app, name="datasets")

MOST_SOURCES = 12
Format = StrEnum("Format", ("folders", "webdataset"))


class Side(StrEnum):
    """The sides of a dataset."""

    train = "train"
    val = "val"
    test = "test"
    excluded = "excluded"


@datasets_app.callback()
def datasets(typer_context: typer.Context, as_json: Json = False) -> None:
    """List the dataset versions; the pinned one has a star. `show`, `diff` and `export` look closer;
    `drop` takes a mistake back.

    Examples:

      visionloop datasets

      visionloop datasets show 2

      visionloop datasets diff 1 2

      visionloop datasets drop 2

      visionloop datasets export 2 ~/pets-2
    """
    if typer_context.invoked_subcommand:
        return
    from visionloop.data.known_store import check_store
    from visionloop.data.manifest import list_versions

    workspace = open_workspace()
    check_store(workspace)
    versions = list_versions(workspace.store, workspace.name)
    pinned = _find_pinned(workspace)
    if as_json:
        listed = [{**version.to_json(), "pinned": version.version == pinned} for version in versions]
        print_json({"name": workspace.name, "versions": listed})
        return
    if not versions:
        print(f"no version of {workspace.name} yet")
        say_next("`visionloop ingest PATH` makes one")
        return
    num_before, digest_before = 0, ""
    for version in versions:
        star = "*" if version.version == pinned else " "
        num_gone = num_before + version.num_added - version.num_images
        change = f"+{version.num_added:,}" + (f" -{num_gone:,}" if num_gone else "")
        change = "same" if version.digest == digest_before else change
        leaks = f"  {version.num_leaks:,} leaks" if version.num_leaks else ""
        print(
            f"{star} {version.version:>4}  {version.digest[:12]}  {version.created_at[:16].replace('T', ' ')}"
            f"  {version.num_images:>9,} images  {change:<10}  {len(version.classes):>4} classes"
            f"  {version.num_rejected:,} quarantined{leaks}"
        )
        num_before, digest_before = version.num_images, version.digest
    last = versions[-1].version
    compares = f", `visionloop datasets diff {last - 1}` tells what the last one brought" if len(versions) > 1 else ""
    say_next(f"`visionloop datasets show {last}`{compares}")


@datasets_app.command()
def show(
    number: Annotated[int | None, typer.Argument(help="A version; default: the pinned one.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every class and every quarantined file.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Where to write the contact sheet (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """Show one version: images per class and side, sizes, what was quarantined, leaks; and draw 25 of its images.

    Examples:

      visionloop datasets show

      visionloop datasets show 2 --sheet pets.png

      visionloop datasets show --json
    """
    from visionloop.data.leaks import load_leaks
    from visionloop.data.manifest import load_quarantine
    from visionloop.data.parts import iterate_batches
    from visionloop.data.rows import tally_rows
    from visionloop.data.tombstones import load_tombstones

    workspace = open_workspace()
    version = _load_version(workspace, number)
    tally = tally_rows(iterate_batches(workspace.store, version), load_tombstones(workspace.store, version.name))
    rejected, leaks = load_quarantine(workspace.store, version), load_leaks(workspace.store, version)
    if as_json:
        print_json(_describe_json(version, tally, rejected, leaks))
    else:
        for line in _describe_version(version, tally, rejected, leaks, everything=everything):
            print(line)
    if sheet or not as_json:
        for path in _draw(workspace, version, leaks, sheet):
            if not as_json:
                say(f"look at {path}")
    say_next("`visionloop start` trains and judges on the pinned one", quiet=as_json)


@datasets_app.command()
def diff(
    before: Annotated[int, typer.Argument(help="A version.")],
    after: Annotated[int | None, typer.Argument(help="Another one; default: the newest.")] = None,
    as_json: Json = False,
) -> None:
    """Compare two versions: images added, removed and relabelled, classes, sources, what was newly quarantined.

    Examples:

      visionloop datasets diff 1 2

      visionloop datasets diff 1 --json
    """
    from visionloop.data.compare import compare_records
    from visionloop.data.manifest import NOT_UNUSABLE, latest_version, load_quarantine, load_version
    from visionloop.data.parts import iterate_version
    from visionloop.data.tombstones import load_tombstones
    from visionloop.words import describe_diff, describe_rejected

    workspace = open_workspace()
    name = workspace.name
    first = load_version(workspace.store, name, before)
    newest = latest_version(workspace.store, name)
    second = load_version(workspace.store, name, after) if after is not None else newest or first
    changes = compare_records(*(iterate_version(workspace.store, version) for version in (first, second)))
    known = set(load_quarantine(workspace.store, first))
    rejected = [one for one in load_quarantine(workspace.store, second) if one not in known]
    if as_json:
        facts = {"name": name, "before": first.version, "after": second.version}
        print_json({**facts, **changes.to_json(), "rejected": [one.to_json() for one in rejected]})
        return
    print(f"{name} version {first.version} -> {second.version}: {first.num_images:,} -> {second.num_images:,} images")
    new = describe_rejected(rejected, NOT_UNUSABLE)
    for line in [*describe_diff(changes), *(line if line.startswith(" ") else f"new: {line}" for line in new)]:
        print(line)
    if newest and second.version == newest.version:
        forgotten = load_tombstones(workspace.store, name)
        is_forget = any(record.sha256 in forgotten for record in changes.removed)
        back = "" if is_forget else f", `visionloop datasets drop {second.version}` takes it back"
        say_next(f"`visionloop start` retrains{back}")
    else:
        say_next(f"`visionloop datasets show {second.version}`")


@datasets_app.command()
def drop(
    number: Annotated[int | None, typer.Argument(help="The newest version.")] = None,
    source: Annotated[str | None, typer.Option(help="A source of the newest version, instead of all of it.")] = None,
    as_json: Json = False,
) -> None:
    """Take a mistaken ingest back: a new version without what the newest one brought, or without one source.

    The pin moves to it. All other images keep their sides. Earlier versions and the bytes of the images stay
    (`visionloop forget` removes bytes), so a drop can be dropped too.

    Examples:

      visionloop datasets drop 3

      visionloop datasets drop --source warehouse
    """
    from visionloop.data.compare import compare_records
    from visionloop.data.drop import drop_source, drop_version
    from visionloop.data.known_store import check_store
    from visionloop.errors import DatasetError
    from visionloop.ingest.pull import move_pin
    from visionloop.promotion.ledger import read_champion
    from visionloop.words import describe_diff

    workspace = open_workspace()
    store, name, now = workspace.store, workspace.name, get_now()
    if (number is None) == (source is None):
        found = "neither a version nor a source is named" if number is None else "a version and a source are named"
        raise DatasetError("datasets drop", found, "one of them", "Say `drop N` or `drop --source NAME`.")
    check_store(workspace)
    done = drop_source(store, name, source, now=now) if source else drop_version(store, name, int(number or 0), now=now)
    pin = move_pin(workspace.settings, done.after)
    changes = compare_records(done.rows_before, done.rows_after)
    if as_json:
        versions = {"before": done.before.version, "after": done.after.version, "pinned": pin.version}
        print_json({"name": name, **versions, **changes.to_json()})
        return
    for line in describe_diff(changes):
        print(line)
    declared = {one.name for one in workspace.params.ingest.sources}
    for line in _describe_drop(done, pin, declared, read_champion(store, name), source):
        print(line)
    say_next(f"`visionloop start`; or `visionloop datasets drop {done.after.version}` takes this back")


@datasets_app.command()
def export(
    number: Annotated[int, typer.Argument(help="A version.")],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    form: Annotated[
        Format, typer.Option("--format", help="Class folders with tables, or tar shards.")
    ] = Format.folders,
    side: Annotated[list[Side] | None, typer.Option(help="Only this side; may be given several times.")] = None,
    *,
    quiet: Quiet = False,
) -> None:
    """Write a version as plain files: SIDE/CLASS/IMAGE with tables beside them, or WebDataset shards.

    Hugging Face reads the first by `load_dataset("imagefolder", data_dir=DIR)`, the second by "webdataset".

    Examples:

      visionloop datasets export 2 ~/pets-2

      visionloop datasets export 2 ~/pets-shards --format webdataset --side train --side val
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from visionloop.data.export import export_version
    from visionloop.data.parts import iterate_batches
    from visionloop.data.rows import hold_rows
    from visionloop.errors import format_bytes

    workspace = open_workspace()
    version = _load_version(workspace, number)
    sides = {one.value for one in side or Side}
    batches = iterate_batches(workspace.store, version)
    chosen = (batch.filter(pc.is_in(batch["side"], pa.array(sorted(sides)))) for batch in batches)
    workspace.settings.hidden_dir.mkdir(exist_ok=True)
    with TemporaryFile(dir=workspace.settings.hidden_dir) as file:
        done = export_version(
            workspace.store,
            version,
            hold_rows(chosen, cast("BinaryIO", file)),
            Path(os.path.abspath(folder.expanduser())),  # without .., and links stay
            form=form.value,
            on_progress=make_progress("exported", "images", quiet=quiet),
        )
    unlabelled = f", {done.num_unlabelled:,} of them unlabelled" if done.num_unlabelled else ""
    say(f"{done.folder} holds {done.num_images:,} images{unlabelled}, {format_bytes(done.num_bytes)}")
    reader = "imagefolder" if form is Format.folders else "webdataset"
    say_next(f'`datasets.load_dataset("{reader}", data_dir="{done.folder}")` in Python', quiet=quiet)


def _describe_drop(
    drop: "Dropped", pin: "Pin", declared: set[str], champion: "LedgerEntry | None", source: str | None
) -> list[str]:
    """Tell what a drop made, and what may bring the images back or still knows them."""
    before, after = drop.before, drop.after
    kept = {record.sha256 for record in drop.rows_after}
    gone = [record for record in drop.rows_before if record.sha256 not in kept]
    lines = [f"dataset {after.name} version {after.version}: {after.num_images:,} images, without {len(gone):,} others"]
    held = f", which holds the same images as version {after.version}" if pin.version != after.version else ""
    lines.append(f"the pin is on version {pin.version}{held}")
    names = {one for record in gone for one in record.sources} | ({source} if source else set())
    if again := sorted(names & declared):
        lines.append(
            f"params.yaml still names the source {', '.join(again)}: mend it or take it out, or the next ingest brings "
            "its images back"
        )
    if champion and gone and champion.dataset.get("digest") == before.digest:
        lines.append(
            f"the champion, bundle {champion.bundle[:12]}, was trained on version {before.version}, which had them: "
            "retrain, or `visionloop rollback` to the one before"
        )
    return lines


def _describe_version(
    version: "DatasetVersion",
    tally: "Tally",
    rejected: "list[Rejected]",
    leaks: "Leaks",
    *,
    everything: bool,
) -> list[str]:
    from visionloop import words as tables
    from visionloop.data.manifest import NOT_UNUSABLE, is_experiment

    split = version.split
    fractions = " / ".join(map(str, split.get("fractions", ())))
    aside = " (an experiment: its models are not promoted)" if is_experiment(version) else ""
    lines = [
        f"dataset {version.name} version {version.version}, {version.num_images:,} images, made {version.created_at}",
        f"  digest    {version.digest}",
        *_describe_sources(tally.sources),
        *tables.describe_images(tally),
        f"  sides     {split.get('method', 'hash')}, seed {split.get('seed')}, {fractions}{aside}",
        "",
        *tables.describe_classes(tally, everything=everything),
        "",
    ]
    if gone := tally.num_forgotten:
        lines.append(f"{gone:,} of these images were forgotten since: this version cannot be prepared any more")
    shown = len(rejected) if everything else 3
    lines += tables.describe_rejected(rejected, NOT_UNUSABLE, shown=shown)
    return lines + tables.describe_leaks(leaks)


def _describe_json(
    version: "DatasetVersion", tally: "Tally", rejected: "list[Rejected]", leaks: "Leaks"
) -> dict[str, Any]:
    return {
        **version.to_json(),
        "images_per_source": tally.sources,
        "images_per_format": tally.formats,
        "num_bytes": int(tally.num_bytes_n.sum()),
        "rejected_rows": [one.to_json() for one in rejected],
        "leak_rows": [row.to_json() for row in leaks.rows],
    }


def _draw(workspace: Workspace, version: "DatasetVersion", leaks: "Leaks", sheet: Path | None) -> list[Path]:
    """Draw the contact sheet and, if there are any, the worst leaks beside it; return where they are."""
    from visionloop.cli import pictures
    from visionloop.data.parts import iterate_version

    folder = workspace.settings.hidden_dir / "datasets"
    path = sheet.expanduser().absolute() if sheet else folder / f"{version.name}-{version.version:06d}.png"
    if path.suffix.lower() != ".png":
        path = path.with_name(f"{path.name}.png")
    pictures.require_place(path if sheet else None, "--sheet")
    rows = iterate_version(workspace.store, version)
    pictures.write_picture(path, pictures.draw_images(workspace.store, version, rows))
    png = pictures.draw_leaks(workspace.store, leaks)
    if png is None:
        return [path]
    beside = path.with_name(f"{path.stem}-leaks.png")
    pictures.write_picture(beside, png)
    return [path, beside]


def _load_version(workspace: Workspace, number: int | None) -> "DatasetVersion":
    from visionloop.data.known_store import check_store
    from visionloop.data.manifest import load_pin, load_version

    if number is None:
        number = load_pin(workspace.settings.pin_path, workspace.name).version
        check_store(workspace)
    return load_version(workspace.store, workspace.name, number)


def _find_pinned(workspace: Workspace) -> int | None:
    from visionloop.data.manifest import load_pin
    from visionloop.errors import DatasetError

    try:
        pin = load_pin(workspace.settings.pin_path)
    except DatasetError:
        return None
    return pin.version if pin.name == workspace.name else None


def _describe_sources(counts: Counter[str]) -> list[str]:
    """Return images per source; one that several sources have counts for each."""
    text = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())[:MOST_SOURCES])
    more = f" and {len(counts) - MOST_SOURCES:,} more" if len(counts) > MOST_SOURCES else ""
    return [f"  sources   {text}{more}"]
