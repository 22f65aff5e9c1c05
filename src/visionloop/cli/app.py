"""The typer application. The files of commands import it and add theirs; `run.py` imports them all."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from visionloop.errors import escape_text
from visionloop.lifetime import GUARDIAN_VARIABLE

FIRST_HOUR = """visionloop keeps an image classifier up to date. The first hour:

  visionloop start PHOTOS      from a folder of photos to a judged model
  visionloop predict PHOTO     ask it
  visionloop serve             the same over HTTP, with a page to drop photos on
  visionloop suspects          which labels are probably wrong
  visionloop doctor            what is wrong here, and what to do

`visionloop --help` lists all commands in the order of their use.
Each has `--help` with examples.
`visionloop --install-completion` lets the shell complete them.
"""

# `visionloop --help` lists the commands in the order in which they are used.
GROUPS = {
    "From photos to a model": ("start", "retrain", "new"),
    "Images": ("ingest", "datasets", "suspects", "similar", "map", "forget", "store"),
    "Training, step by step": ("prepare", "embed", "train", "evaluate", "lr-find", "tune", "runs", "explain"),
    "The verdict": ("gate", "approve", "register", "promote", "rollback", "history", "compare", "lineage"),
    "Answers": ("serve", "predict", "export", "keys"),
    "The loop": ("predictions", "monitor", "review", "triggers", "schedule", "shadow", "metrics"),
    "What runs here": ("up", "status", "down", "ui", "doctor"),
}


class CommandList(TyperGroup):
    """The commands in groups, each with its first sentence; without a command the five of the first hour."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the options before the command; a mistake there is an error of ours."""
        self.typed = tuple(args)
        with self._told_as_ours():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Read the command and its options, and run it; a mistake in them is an error of ours."""
        with self._told_as_ours():
            return super().invoke(ctx)

    @contextlib.contextmanager
    def _told_as_ours(self) -> Iterator[None]:
        """Raise SettingsError for what typer says of a command line, but its help where a group has no command."""
        try:
            yield
        except typer.TyperException as exc:
            from visionloop.cli.mistakes import describe_mistake

            if exc.message.startswith("Usage: "):
                raise
            raise describe_mistake(exc, self, self.typed) from None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as ever; without any argument say how to begin."""
        if not args and not ctx.resilient_parsing:
            typer.echo(FIRST_HOUR, nl=False)
            ctx.exit()
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section a group."""
        for title, names in GROUPS.items():
            rows = [(name, _find_first_sentence(self.commands[name])) for name in names if name in self.commands]
            with formatter.section(title):
                formatter.write_dl(rows, col_max=12)


app = typer.Typer(
    name="visionloop",
    cls=CommandList,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        from visionloop import __version__

        print(f"visionloop {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Say which version this is.")
    ] = False,
) -> None:
    """Keeps an image classifier up to date: ingest, train, judge, promote, serve."""


Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]

ADDRESSES = "A folder, NAME@champion, NAME@3 or s3://..."  # of a model

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say the result alone: no progress, no next command.")]


def say(line: str) -> None:
    """Print a line with words that somebody has typed, here or elsewhere, so that a terminal only shows them."""
    print(escape_text(line))


def say_next(words: str, *, quiet: bool = False) -> None:
    """End a command with what people do next; not where dvc or a flow runs it."""
    if not quiet and not os.environ.get("DVC_STAGE") and not os.environ.get(GUARDIAN_VARIABLE):
        print(f"next: {words}", flush=True)


def print_json(value: Mapping[str, Any]) -> None:
    """Print the one object of --json: indented on a terminal, else on one line. What is no number becomes null."""
    print(json.dumps(_clean(value), indent=2 if sys.stdout.isatty() else None))


def _clean(value: Any) -> Any:
    """Return a value without NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _find_first_sentence(command: Any) -> str:
    paragraph = " ".join((command.help or "").split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")
