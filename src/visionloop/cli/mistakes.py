"""A command line that is not understood, told as every other error: what was typed, what fits, an example to copy."""

import difflib
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any

import typer

from visionloop.errors import SettingsError, shorten
from visionloop.secrets import mask

LONGEST = 60
IN_PARAMS = {"start", "retrain", "ingest", "prepare", "embed", "train", "evaluate", "gate", "tune", "lr-find"}
PLAINER = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid integer": "a whole number",
}


def describe_mistake(exc: typer.TyperException, root: Any, typed: Sequence[str]) -> SettingsError:
    """Return typer's error about the words `typed` as one of ours, which is one line with a way out."""
    words, command = _find_command(root, typed)
    path, param = " ".join(words), getattr(exc, "param", None)
    message = " ".join(exc.message.split()).rstrip(".")
    if found := re.match(r"No such command '(.*?)'\.?(?: Did you mean|$)", exc.message):
        return _describe_command(words, command, found[1])
    if option := getattr(exc, "option_name", None):
        return _describe_option(words, command, _clean(option), message)
    if param is not None:
        return _describe_param(path, command, exc, message)
    if found := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", exc.message):
        if swallowed := _find_swallowed(command, typed):
            option, other = swallowed
            said = next(_lower(one.help) for one in command.params if option in one.opts)
            todo = f"Say `{path} {option} {_clean(found[1])}`, without {other}."
            return SettingsError(f"{path} {option}", f"is followed by {other}", f"its value: {said}", todo)
        takes = [_name(one) for one in command.params if one.param_type_name == "argument"]
        expected = f"{' '.join(takes)} alone" if takes else "options alone"
        return SettingsError(path, f"got {_clean(found[1])!r} too", expected, _show_example(command, path))
    return SettingsError(path, message, "", f"`{path} --help` tells more.")


def _find_swallowed(command: Any, typed: Sequence[str]) -> tuple[str, str] | None:
    """Return an option with a value, and the option that was typed where its value should be."""
    takes_value = {name: not getattr(one, "is_flag", False) for one in command.params for name in one.opts}
    return next(
        (pair for pair in itertools.pairwise(typed) if takes_value.get(pair[0]) and pair[1] in takes_value), None
    )


def _find_command(root: Any, typed: Sequence[str]) -> tuple[list[str], Any]:
    """Return the command that some words name, as far as they name one, and its words."""
    words, command = ["visionloop"], root
    for word in typed:
        if child := getattr(command, "commands", {}).get(word):
            words.append(word)
            command = child
    return words, command


def _describe_command(words: Sequence[str], group: Any, typed: str) -> SettingsError:
    path, name = " ".join(words), _clean(typed)
    near = difflib.get_close_matches(typed, group.commands, n=2)
    if len(words) == 1 and not near and os.path.exists(typed):
        todo = f"`visionloop start {name}` makes a model of photos, `visionloop predict {name}` asks the champion."
        return SettingsError(f"{path} {name}", "is no command, but a file or folder", "a command first", todo)
    expected = " or ".join(f"`{path} {one}`" for one in near)
    if not near:
        expected = "one of its commands" if len(words) == 1 else f"one of {shorten(list(group.commands), 10)}"
    return SettingsError(f"{path} {name}", "is no command", expected, f"`{path} --help` lists all.")


def _describe_option(words: Sequence[str], command: Any, option: str, message: str) -> SettingsError:
    path = " ".join(words)
    where, helps = f"{path} {option}", f"`{path} --help` lists all."
    if "does not take" in message:
        return SettingsError(where, "has a value", "none: it is a switch", f"Say `{option}` alone.")
    if "requires" in message:
        said = next((_lower(one.help) for one in command.params if option in one.opts), "")
        return SettingsError(where, "has no value", f"one after it: {said}", _show_example(command, path, option))
    names = sorted({name for one in command.params for name in one.opts if name.startswith("--")} | {"--help"})
    near = difflib.get_close_matches(option, names, n=2)
    if near:
        return SettingsError(where, "is no option", " or ".join(near), helps)
    params = "What changes results is set in params.yaml. " if words[-1] in IN_PARAMS else ""
    return SettingsError(where, "is no option", f"one of {shorten(names, 10)}", params + helps)


def _describe_param(path: str, command: Any, exc: Any, message: str) -> SettingsError:
    name = _name(exc.param)
    if not exc.message:
        return SettingsError(path, f"{name} is missing", _lower(exc.param.help), _show_example(command, path, name))
    value, expected = _find_value(exc), message.removeprefix("Input should be ").split(", unable")[0]
    if value is None:
        return SettingsError(f"{path} {name}", message, "", _show_example(command, path, name))
    if found := re.search(r"is not one of (.*)", message):
        choices = [one.strip(" '\"") for one in found[1].split(",")]
        near = difflib.get_close_matches(value, choices, n=1)
        others = ", ".join(one for one in choices if one not in near)
        expected = f"{near[0]}, or one of {others}" if near else f"one of {others}"
    for typed, plain in PLAINER.items():
        expected = expected.replace(typed, plain)
    return SettingsError(f"{path} {name}", f"got {_clean(value)!r}", expected, _show_example(command, path, name))


def _find_value(exc: BaseException) -> str | None:
    """Return the value that pydantic refused, if it was pydantic that did."""
    errors = getattr(exc.__cause__, "errors", None)
    return str(errors()[0].get("input", "")) if callable(errors) and errors() else None


def _show_example(command: Any, path: str, name: str = "") -> str:
    """Return an example of a command's help as a sentence: the first with an option, where one is asked about."""
    examples = [line.strip() for line in (command.help or "").partition("Examples:")[2].splitlines() if line.strip()]
    fitting = [line for line in examples if name in line or not name.startswith("--")]
    return f"For example `{fitting[0]}`." if fitting else f"`{path} --help` tells more."


def _name(param: Any) -> str:
    """Return what people type of an option, or how the help calls an argument."""
    return str(param.opts[0] if param.param_type_name == "option" else param.metavar or param.name.upper())


def _lower(text: str | None) -> str:
    """Return the first sentence of a help text, to go on with after `expected`."""
    sentence = (text or "").split(". ")[0].rstrip(".")
    return sentence if sentence[1:2].isupper() else sentence[:1].lower() + sentence[1:]


def _clean(text: str) -> str:
    """Return words of the command line as they can be printed on one line, without the login of an address."""
    shown = "".join(char if char.isprintable() else "?" for char in mask(text))
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."
