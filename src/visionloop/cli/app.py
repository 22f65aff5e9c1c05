"""The typer application. The files of commands import it and add theirs; `run.py` imports them all."""

import typer

# What `visionloop --help` lists first: the way from photos to a served model.
FIRST = (
    *("start", "new", "ingest", "prepare", "embed", "train", "evaluate"),
    *("gate", "register", "promote", "serve", "predict"),
)

app = typer.Typer(
    name="visionloop",
    help="Keeps an image classifier up to date: ingest, train, judge, promote, serve.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
