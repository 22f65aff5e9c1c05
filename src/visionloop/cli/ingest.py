"""The command `ingest`: from any place into the store, once or as a declared source."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionloop.cli.app import app
from visionloop.cli.progress import make_progress
from visionloop.settings import PARAMS_FILE
from visionloop.words import describe_pull
from visionloop.workspace import get_now, open_workspace

if TYPE_CHECKING:
    from visionloop.params import Source

SECRET = re.compile(r"://[^/@\s]*:[^/@\s$]+@")
What = Annotated[
    str | None,
    typer.Argument(
        metavar="WHAT", help="A folder, table, zip, video, http(s):// or s3:// address, or module:function."
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of this source; default: made from WHAT.")]
Pattern = Annotated[str | None, typer.Option(help="Where the label is in the names of flat files: '{label}.*.jpg'.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column of a table that names the image.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of a table that holds the label.")]
Save = Annotated[bool, typer.Option("--save", help="Add the source to params.yaml, to pull it every time.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Read everything again; mend what is missing or damaged in the store.")
]


@app.command()
def ingest(
    what: What = None,
    *,
    name: Name = None,
    pattern: Pattern = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    save: Save = False,
    verify: Verify = False,
) -> None:
    """Take images into the store as a new dataset version, and pin it. Without WHAT: from the sources of params.yaml.

    What cannot be used is put into quarantine, counted and named. Run it again at any time, also when it was stopped:
    what is there already is not read or stored twice.

    Examples:

      visionloop ingest

      visionloop ingest ~/photos/horses-or-humans

      visionloop ingest ~/cats-and-dogs --pattern '{label}.*.jpg' --save

      visionloop ingest labels.csv --label-column breed

      visionloop ingest s3://bucket/photos --name warehouse
    """
    from visionloop.ingest.pull import check_sources, pull
    from visionloop.pipeline import refresh_code

    workspace = open_workspace()
    given = {"name": name, "pattern": pattern, "image_column": image_column, "label_column": label_column}
    if what is None:
        _check_alone({**given, "save": save or None})
        sources, text = check_sources(workspace.params), ""
    else:
        sources = [source := make_source(what, given, Path.cwd())]
        text = make_params_text(workspace.settings.home, source) if save else ""
        print(f"{'a' if save else 'a one-time'} pull of {what} (kind {source.kind}, name {source.name})")
    refresh_code(workspace.settings.home, workspace.params)
    report = pull(
        workspace,
        sources=sources,
        now=get_now(),
        env=os.environ,
        tell=print,
        on_progress=make_progress("checked", "images"),
        verify=verify,
    )
    for line in describe_pull(report):
        print(line)
    if text:
        from visionloop.params.edit import write_params

        write_params(workspace.settings.params_path, text)
        print(f"source {sources[0].name} is in params.yaml: every `visionloop ingest` and retrain pulls it")
    elif what is not None:
        print("to pull it on every run, say --save")


def make_source(what: str, given: Mapping[str, str | None], here: Path) -> "Source":
    """Return the source that a word stands for, with what the options say; paths are relative to `here`.

    Raises:
        SourceError: the word means nothing to us, or an option does not fit its kind.
    """
    from visionloop.errors import SourceError
    from visionloop.ingest.sources.guess import guess_source

    local = (here / Path(what).expanduser()).resolve()
    source = guess_source(str(local) if local.exists() else what, given.get("name"))
    columns = {"image": given.get("image_column"), "label": given.get("label_column")}
    wanted: dict[str, Any] = {"pattern": given["pattern"]} if given.get("pattern") else {}
    if any(columns.values()):
        wanted["columns"] = {key: column for key, column in columns.items() if column}
    fields = type(source).model_fields
    for key in wanted:
        if key not in fields:
            option = "--pattern" if key == "pattern" else "--image-column and --label-column"
            raise SourceError(f"{option}", f"{what} is of kind {source.kind}", "a kind that has it", "Leave it out.")
    value = {
        **source.model_dump(mode="json", exclude_defaults=True),
        "kind": source.kind,
        "name": source.name,
        **wanted,
    }
    validated: Source = type(source).model_validate(value)
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
