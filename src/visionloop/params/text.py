"""The text of a YAML file to its value: YAML 1.2, so that 1e-3 is a number, 010 is ten, and `on` and `yes` are words.

A text comes from anybody: no tag of it makes anything but plain values, a key that stands twice is an error, and its
size is limited, also that of what its aliases stand for.
"""

import re
from typing import Any

from visionloop.errors import ParamsError

MAX_CHARS = 200_000
MAX_VALUES = 100_000  # with all that aliases repeat


def parse_yaml(text: str, where: str = "params.yaml") -> Any:
    """Return the value of a YAML text.

    Raises:
        ParamsError: it is no YAML, has a key twice, a tag of its own, or is too large; it names the line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    todo = "Edit the file."
    if len(text) > MAX_CHARS:
        raise ParamsError(where, f"has {len(text):,} characters", f"at most {MAX_CHARS:,}", todo)
    try:
        value = YAML(typ="safe", pure=True).load(text)
        _check_size(value, where)
    except DuplicateKeyError as exc:
        key = re.search(r'duplicate key "(.*?)" with', str(exc.problem))
        found = f"has the key {key[1] if key else ''!r} a second time"
        raise ParamsError(f"{where}{_name_line(exc)}", found, "each key once", todo) from exc
    except MarkedYAMLError as exc:
        raise ParamsError(f"{where}{_name_line(exc)}", f"is not YAML ({exc.problem})", "keys and values", todo) from exc
    except (YAMLError, ValueError, TypeError, RecursionError) as exc:
        if isinstance(exc, ParamsError):
            raise
        reason = " ".join(str(exc).split())[:120]
        raise ParamsError(where, f"is not YAML ({reason})", "keys and values", todo) from exc
    return value


def _name_line(exc: Any) -> str:
    return f" line {exc.problem_mark.line + 1}" if exc.problem_mark else ""


def _check_size(value: Any, where: str) -> None:
    """Raise ParamsError if a value holds too many values, each counted as often as it is named, or holds itself."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def count(one: Any) -> int:
        if not isinstance(one, dict | list):
            return 1
        if id(one) in above:
            raise ParamsError(where, "has an alias inside of what it stands for", "plain values", "Edit the file.")
        if id(one) not in sizes:
            above.add(id(one))
            inner = one.values() if isinstance(one, dict) else one
            sizes[id(one)] = 1 + sum(count(each) for each in inner)
            above.remove(id(one))
        return sizes[id(one)]

    if (number := count(value)) > MAX_VALUES:
        raise ParamsError(where, f"stands for {number:,} values", f"at most {MAX_VALUES:,}", "Edit the file.")


def has_conflict_marks(text: str) -> bool:
    """Say whether a file is as git leaves it where two sides of a merge differ."""
    lines = text.splitlines()
    return any(line.startswith("<<<<<<< ") for line in lines) and any(line.startswith(">>>>>>> ") for line in lines)
