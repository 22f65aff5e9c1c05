"""Commands about data: ingest, datasets."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import app
from visionloop.cli.context import Context, get_now, make_progress, open_context

if TYPE_CHECKING:
    from visionloop.ingest.pull import PullReport
    from visionloop.records import DatasetVersion, Rejected


@app.command()
def ingest(
    path: Annotated[Path | None, typer.Argument(help="A folder per class, with or without split folders.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of this source; default: the folder's.")] = None,
) -> None:
    """Take images into the store as a new dataset version, and pin it. Without PATH: from the sources of params.yaml.

    A file that cannot be used is put into quarantine, counted and named; the others go in. Run it again at any time:
    what is there already is not stored twice.

    Examples:

      visionloop ingest

      visionloop ingest ~/photos/horses-or-humans
    """
    from visionloop.ingest.pull import check_sources, pull
    from visionloop.params import FolderSource
    from visionloop.pipeline import refresh_code

    context = open_context()
    refresh_code(context.settings.home)
    if path is None:
        sources: Sequence[object] = check_sources(context.params)
    else:
        folder = path.expanduser().resolve()
        sources = [FolderSource(kind="folder", path=str(folder), name=name or make_source_name(folder))]
        print(f"a one-time pull of {folder}; to pull it on every run, add it to ingest.sources in params.yaml")
    report = pull(
        context.settings,
        context.params,
        context.store,
        sources=sources,  # type: ignore[arg-type]
        now=get_now(),
        env=os.environ,
        tell=print,
        on_progress=make_progress("checked", "images"),
    )
    for line in describe_pull(report):
        print(line)


def describe_pull(report: "PullReport") -> list[str]:
    """Tell what a pull brought, in a few lines."""
    version = report.version
    what = f"{report.num_added:,} new images" if report.changed else "nothing new"
    lines = [f"dataset {version.name} version {report.pin.version}: {what}, {version.num_images:,} in all"]
    if report.changed:
        lines += describe_counts(version)
    return lines + describe_rejected(report.rejected)


def describe_counts(version: "DatasetVersion") -> list[str]:
    """Return images per side, with the classes of each."""
    lines = []
    for side, classes in version.counts.items():
        shown = ", ".join(f"{name} {count:,}" for name, count in list(classes.items())[:12])
        more = f" and {len(classes) - 12} classes more" if len(classes) > 12 else ""
        lines.append(f"  {side:<8} {sum(classes.values()):>7,}  {shown}{more}")
    return lines


def describe_rejected(rejected: "Sequence[Rejected]", shown: int = 5) -> list[str]:
    """Return the quarantined files, the first few by name."""
    if not rejected:
        return []
    lines = [f"quarantined {len(rejected):,} files that cannot be used:"]
    lines += [f"  {r.code:<14} {r.origin}: {r.reason}" for r in rejected[:shown]]
    return lines + ([f"  and {len(rejected) - shown:,} more"] if len(rejected) > shown else [])


def make_source_name(folder: Path) -> str:
    """Turn a folder's name into a source's name: lower case, digits and dashes."""
    slug = "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in folder.name.lower()).split())
    return slug[:63] or "folder"


datasets_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(datasets_app, name="datasets")


@datasets_app.callback()
def datasets(typer_context: typer.Context) -> None:
    """List the dataset versions; the pinned one has a star.

    Examples:

      visionloop datasets

      visionloop datasets show 2
    """
    if typer_context.invoked_subcommand:
        return
    from visionloop.data.manifest import list_versions

    context = open_context()
    versions = list_versions(context.store, context.params.name)
    if not versions:
        print(f"no version of {context.params.name} yet; `visionloop ingest` makes one")
    pinned = _pinned_version(context)
    for version in versions:
        star = "*" if version.version == pinned else " "
        print(
            f"{star} {version.version:>4}  {version.digest[:12]}  {version.created_at[:16].replace('T', ' ')}"
            f"  {version.num_images:>8,} images  +{version.num_added:,}  {len(version.classes)} classes"
            f"  {version.num_rejected} quarantined"
        )


@datasets_app.command()
def show(
    number: Annotated[int | None, typer.Argument(help="A version; default: the pinned one.")] = None,
) -> None:
    """Show one version: images per side and class, sources, and what was quarantined.

    Examples:

      visionloop datasets show

      visionloop datasets show 2
    """
    from visionloop.data.manifest import load_pin, load_quarantine, load_version

    context = open_context()
    version_number = number if number is not None else load_pin(context.settings.pin_path).version
    version = load_version(context.store, context.params.name, version_number)
    print(f"dataset {version.name} version {version.version}, {version.num_images:,} images, made {version.created_at}")
    print(f"  digest   {version.digest}")
    print(f"  sources  {', '.join(version.sources)}")
    for line in describe_counts(version) + describe_rejected(load_quarantine(context.store, version)):
        print(line)


def _pinned_version(context: Context) -> int | None:
    from visionloop.data.manifest import load_pin
    from visionloop.errors import DatasetError

    try:
        return load_pin(context.settings.pin_path).version
    except DatasetError:
        return None
