"""The command `ingest`: from any place into the store, once or as a declared source."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionloop.cli.app import Json, Quiet, app, print_json, say_next
from visionloop.cli.waiting import make_progress, tell_when_stopped
from visionloop.settings import PARAMS_FILE, load_settings
from visionloop.words import align, cut, describe_pull, describe_rejected, fit
from visionloop.workspace import get_now, open_workspace

if TYPE_CHECKING:
    from visionloop.data.acceptance import Answered
    from visionloop.ingest.dry_run import Outline
    from visionloop.ingest.pull import PullReport
    from visionloop.params import Params, Source
    from visionloop.records import ImageRecord
    from visionloop.workspace import Workspace

MANY_CLASSES = 200
NEXT = "`visionloop start` trains and judges, `visionloop datasets show` looks at the images"
TABLE_OPTIONS = {
    "image": "image-column",
    "label": "label-column",
    "separator": "separator",
    "no_label": "no-label",
    "sides": "sides",
}
SECRET = re.compile(r"://[^/@\s]*:[^/@\s$]+@")
What = Annotated[
    str | None,
    typer.Argument(
        metavar="WHAT", help="A folder, table, zip, video, http(s):// or s3:// address, or module:function."
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of this source; default: made from WHAT.")]
Pattern = Annotated[
    str | None, typer.Option(help="Where the label is: in names, '{label}.*.jpg', or in folders, '{side}/{label}/'.")
]
ImageColumn = Annotated[str | None, typer.Option(help="Column of a table that names the image.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of a table that holds the label.")]
Separator = Annotated[
    str | None, typer.Option(help="What divides several labels in one cell of a table; `none`: a cell is one class.")
]
NoLabel = Annotated[
    list[str] | None, typer.Option(help="A text that stands for no label, as NA; '': only an empty cell does.")
]
Sides = Annotated[
    str | None, typer.Option(help="What 0, 1, 2 mean in the split column of a table: train,val,test; `none`: no sides.")
]
Unlabelled = Annotated[
    list[str] | None, typer.Option(help="A folder whose images come in for prediction only; may be given again.")
]
Table = Annotated[str | None, typer.Option(help="The table that holds the labels, inside a folder, a zip or a bucket.")]
Encoding = Annotated[str | None, typer.Option(help="Encoding of a table, or of names in a zip, that is not UTF-8.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be taken, and write nothing. No image is opened.")
]
Save = Annotated[bool, typer.Option("--save", help="Add the source to params.yaml, to pull it every time.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Read everything again; mend what is missing or damaged in the store.")
]
NewClasses = Annotated[
    bool, typer.Option("--allow-new-classes", help="Take in new classes, though they look like a mistake.")
]
Relabel = Annotated[
    bool, typer.Option("--relabel", help="Known images get the labels that their sources give them now.")
]
Prune = Annotated[
    bool, typer.Option("--prune", help="Take images out that are no longer in their source (a drop brings them back).")
]


@app.command()
def ingest(
    what: What = None,
    *,
    name: Name = None,
    pattern: Pattern = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    separator: Separator = None,
    no_label: NoLabel = None,
    sides: Sides = None,
    unlabelled: Unlabelled = None,
    table: Table = None,
    encoding: Encoding = None,
    dry_run: DryRun = False,
    save: Save = False,
    verify: Verify = False,
    allow_new_classes: NewClasses = False,
    relabel: Relabel = False,
    prune: Prune = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Take images into the store as a new dataset version, and pin it. Without WHAT: from the sources of params.yaml.

    What cannot be used is put into quarantine, counted and named. Run it again at any time, also when it was stopped:
    what is there already is not read or stored twice.

    Examples:

      visionloop ingest

      visionloop ingest ~/photos/horses-or-humans

      visionloop ingest ~/cats-and-dogs --pattern '{label}.*.jpg' --save

      visionloop ingest labels.csv --label-column breed --dry-run

      visionloop ingest --relabel --prune

      visionloop ingest s3://bucket/photos --name warehouse
    """
    given: dict[str, Any] = {"name": name, "pattern": pattern, "table": table, "encoding": encoding, "sides": sides}
    given |= {"image_column": image_column, "label_column": label_column, "separator": separator, "save": save or None}
    given |= {"no_label": no_label or None, "unlabelled": unlabelled or None}
    if dry_run:
        _print_dry_run(what, given, quiet=quiet, as_json=as_json)
        return
    workspace = _open_known()
    tell: Callable[[str], None] = (lambda line: None) if as_json else print
    if what is None:
        sources, text = _list_declared(workspace, given, verify=verify), ""
    else:
        sources = [source := make_source(what, given, Path.cwd())]
        text = make_params_text(workspace.settings.home, source) if save else ""
        tell(f"{'a' if save else 'a one-time'} pull of {what} (kind {source.kind}, name {source.name})")
    wanted = {"verify": verify, "allow_new_classes": allow_new_classes, "relabel": relabel, "prune": prune}
    _pull(workspace, sources, wanted, quiet=quiet, as_json=as_json)
    if what is not None:
        tell(_save(workspace, sources[0], text))
    say_next(NEXT, quiet=quiet or as_json)


def _list_declared(workspace: "Workspace", given: Mapping[str, Any], *, verify: bool) -> "list[Source]":
    from visionloop.ingest.pull import check_sources

    _check_alone(given)
    return list(check_sources(workspace.params, workspace.store, verify=verify))


def _save(workspace: "Workspace", source: "Source", text: str) -> str:
    """Write the params that declare a source, if they are wanted, and say so; else tell how."""
    from visionloop.params.edit import write_params

    if not text:
        return "to pull it on every run, say --save"
    write_params(workspace.settings.params_path, text)
    return f"source {source.name} is in params.yaml: every `visionloop ingest` and retrain pulls it"


def _open_known() -> "Workspace":
    """Open the workspace, and see that its store is the one it knows, before anything is said of the sources."""
    from visionloop.data.known_store import check_store_for_pull

    workspace = open_workspace()
    check_store_for_pull(workspace)
    return workspace


def _pull(
    workspace: "Workspace", sources: "Sequence[Source]", wanted: Mapping[str, bool], *, quiet: bool, as_json: bool
) -> None:
    from visionloop.ingest.pull import pull
    from visionloop.pipeline import refresh_code

    refresh_code(workspace.settings.home, workspace.params)
    with tell_when_stopped():
        report = pull(
            workspace,
            sources=sources,
            now=get_now(),
            env=os.environ,
            tell=(lambda line: None) if quiet or as_json else print,
            on_progress=make_progress("checked", "images", quiet=quiet or as_json),
            **wanted,
        )
    if as_json:
        print_json(_describe_pull_json(report))
        return
    for line in describe_pull(report):
        print(line)


def _describe_pull_json(report: "PullReport") -> dict[str, Any]:
    """Return what a pull brought, for machines."""
    numbers = {name: getattr(report, name) for name in ("num_seen", "num_read", "num_added", "num_taken_out")}
    rejected = [one.to_json() for one in report.rejected]
    said = {"rejected_rows": rejected, "notes": report.notes, "remarks": report.remarks}
    return {"changed": report.changed, "pinned": report.pin.version, **report.version.to_json(), **numbers, **said}


def _describe_outline(outline: "Outline") -> list[str]:
    """Tell what a pull of a source would bring: images by class and side, some of their names, and what is left."""
    from visionloop.data.manifest import NOT_UNUSABLE
    from visionloop.ingest.dry_run import UNLABELLED

    labels = sorted(outline.counts, key=lambda label: (label == UNLABELLED, label))
    num_classes = sum(label != UNLABELLED for label in labels)
    sides = sorted({side for counts in outline.counts.values() for side in counts})
    shown = labels[:MANY_CLASSES]
    rows = [
        [cut(label), *(f"{outline.counts[label][side]:,}" for side in sides), f"{outline.counts[label].total():,}"]
        for label in shown
    ]
    lines = [f"source {outline.source}: {outline.num_images:,} images of {num_classes:,} classes would be offered"]
    lines += [f"  {line}" for line in align([["class", *sides, "all"], *rows])] if rows else []
    lines += [f"  and {len(labels) - len(shown):,} more classes"] if len(labels) > len(shown) else []
    lines += [f"  {cut(label)}: {', '.join(map(fit, outline.samples[label]))}" for label in shown]
    lines += describe_rejected(outline.rejected, NOT_UNUSABLE)
    lines.append(f"files passed over: {outline.passed.num_files:,}")
    return lines


def _print_dry_run(what: str | None, given: Mapping[str, Any], *, quiet: bool, as_json: bool) -> None:
    """Print what a pull would bring. The workspace is not opened: that would write into it."""
    from visionloop.ingest.dry_run import describe_differences, outline_source
    from visionloop.ingest.item import SourceContext
    from visionloop.ingest.labels import load_corrections, make_label_rules
    from visionloop.ingest.pull import check_sources
    from visionloop.params import load_params

    settings = load_settings(os.environ, None)
    params = load_params(settings.params_path)
    if what is None:
        _check_alone(given)
    sources = check_sources(params) if what is None else [make_source(what, given, Path.cwd())]
    several = params.task == "multilabel"
    context = SourceContext(
        settings.home,
        settings.hidden_dir,
        os.environ,
        params.ingest,
        tell=(lambda line: None) if as_json else print,
        several=several,
        answered=_load_answered(settings.store_url, params, sources),
    )
    records, path = _load_newest(settings.store_url, params.name), params.ingest.corrections
    rules = make_label_rules(params, load_corrections(context.resolve(path)) if path else [])
    found = []
    for source in sources:
        outline = outline_source(source, context)
        lines = describe_differences(outline, source, records, rules)
        found.append({**_describe_outline_json(outline), "kind": source.kind, "notes": lines})
        for line in [] if as_json else (*_describe_outline(outline), *lines):
            print(line)
    if as_json:
        print_json({"name": params.name, "sources": found})
        return
    print("a dry run: nothing was read or written")
    say_next("the same without --dry-run takes them in", quiet=quiet)


def _describe_outline_json(outline: "Outline") -> dict[str, Any]:
    """Return what a pull of a source would bring, for machines."""
    rejected = [one.to_json() for one in outline.rejected]
    numbers = {"num_images": outline.num_images, "num_passed_over": outline.passed.num_files}
    return {"source": outline.source, **numbers, "counts": outline.counts, "rejected": rejected}


def _load_answered(store_url: str, params: "Params", sources: "Sequence[Source]") -> "Answered | None":
    """Return what people said of images, where a source asks for it."""
    from visionloop.data.acceptance import SOURCE_KINDS, load_answered
    from visionloop.store import open_store

    is_asked = any(source.kind in SOURCE_KINDS for source in sources)
    return load_answered(open_store(store_url), params.name, params.review) if is_asked else None


def _load_newest(store_url: str, name: str) -> "Sequence[ImageRecord]":
    """Return the rows of the newest version; none where there is none, or its store is away."""
    from visionloop.data.manifest import latest_version
    from visionloop.data.parts import load_version_records
    from visionloop.errors import StoreError
    from visionloop.store import open_store

    store = open_store(store_url)
    try:
        newest = latest_version(store, name)
        return load_version_records(store, newest) if newest else []
    except StoreError:
        return []


def make_source(what: str, given: Mapping[str, Any], here: Path) -> "Source":
    """Return the source that a word stands for, with what the options say; paths are relative to `here`.

    Raises:
        SourceError: the word means nothing to us, or an option does not fit its kind.
    """
    from visionloop.errors import SourceError
    from visionloop.ingest.sources.guess import guess_source

    local = (here / Path(what).expanduser()).resolve()
    by_pattern, table = bool(given.get("pattern")), given.get("table") if local.is_dir() else None
    text = str(local) if local.exists() else what
    encoding = given.get("encoding")
    source = guess_source(text, given.get("name"), by_pattern=by_pattern, table=table, encoding=encoding)
    if table:
        given = {**given, "table": None, "images": str(local) if "/" in table else None}
    columns = {"image": given.get("image_column"), "label": given.get("label_column")}
    columns |= {key: given.get(key) for key in ("separator", "no_label", "sides")}
    keys = ("pattern", "unlabelled", "table", "images", "encoding")
    wanted: dict[str, Any] = {key: given[key] for key in keys if given.get(key)}
    if any(columns.values()):
        wanted["columns"] = {key: column for key, column in columns.items() if column}
    fields = type(source).model_fields
    for key in wanted:
        if key not in fields:
            named = ["--" + TABLE_OPTIONS[column] for column in wanted["columns"]] if key == "columns" else [f"--{key}"]
            option = " and ".join(named)
            raise SourceError(option, f"{what} is of kind {source.kind}", "a kind that has it", "Leave it out.")
    value = {
        **source.model_dump(mode="json", exclude_defaults=True),
        "kind": source.kind,
        "name": source.name,
        **wanted,
    }
    try:
        validated: Source = type(source).model_validate(value)
    except ValueError as exc:
        found = ", ".join(f"--{key} {wanted[key]}" for key in wanted if key != "columns")
        raise SourceError(
            f"{found}", "does not fit", "a value as `visionloop ingest --help` says", "Change it."
        ) from exc
    return validated


def save_source(home: Path, source: "Source") -> bool:
    """Add a source to the params.yaml of a workspace; say whether it is new there. Raises ParamsError."""
    from visionloop.params.edit import write_params

    path, text = home / PARAMS_FILE, make_params_text(home, source)
    with path.open(encoding="utf-8", newline="") as file:
        is_new = file.read() != text
    if is_new:
        write_params(path, text)
    return is_new


def make_params_text(home: Path, source: "Source") -> str:
    """Return the text of params.yaml with the source added. Raises ParamsError."""
    from visionloop.errors import ParamsError
    from visionloop.params.edit import add_source

    value = source.model_dump(mode="json", exclude_defaults=True)
    value = {"kind": source.kind, **{k: v for k, v in value.items() if k not in {"kind", "name"}}, "name": source.name}
    for key, text in value.items():
        if isinstance(text, str) and SECRET.search(text):
            raise ParamsError(
                f"params.yaml {key}",
                "would hold a password",
                "${NAME} in its place, filled in from the environment",
                "Set a variable, and name it in the address.",
            )
    if "path" in value and (path := Path(value["path"])).is_absolute() and path.is_relative_to(home):
        value["path"] = path.relative_to(home).as_posix()
    with (home / PARAMS_FILE).open(encoding="utf-8", newline="") as file:
        return add_source(file.read(), value)


def _check_alone(given: Mapping[str, object]) -> None:
    """Refuse options that say how to read a WHAT, without one. Raises SourceError."""
    from visionloop.errors import SourceError

    if named := [f"--{key.replace('_', '-')}" for key, value in given.items() if value is not None]:
        raise SourceError(
            ", ".join(named),
            "no WHAT is given",
            "a folder, a table, an address",
            "The sources of params.yaml have their own keys.",
        )
