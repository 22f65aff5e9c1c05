"""Change the text of params.yaml: add a source, set keys. Its comments, order and layout stay as they are.

ruamel.yaml writes a text back nearly as it was. What it lays out otherwise (indents, blanks, long lines) stays as the
user wrote it: only the lines in which its text before the change and its text after it differ are carried over.
"""

import io
import os
import re
import shutil
from collections.abc import Callable, Mapping
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionloop.errors import ParamsError
from visionloop.params import make_params
from visionloop.params.text import parse_yaml

if TYPE_CHECKING:
    from ruamel.yaml import YAML

ONE_LINE = 100
PLACE = "params.yaml"


def add_source(text: str, source: Mapping[str, Any]) -> str:
    """Return the text with one more source under `ingest.sources`; the text itself if this very source is there.

    What comes of it is read again and compared, so that nothing but the source is new.

    Raises:
        ParamsError: another source has this name, or the text is written in a way that cannot be added to safely;
            the error holds what to write by hand.
    """
    before = _load(text)
    sources = list((before.get("ingest") or {}).get("sources") or [])
    if dict(source) in sources:
        return text
    if any(isinstance(other, Mapping) and _name(other) == _name(source) for other in sources):
        found = f"a source is named {_name(source)!r} already"
        raise ParamsError(f"{PLACE} ingest.sources", found, "a name of its own for each", "Choose one with --name.")
    added = _edit(text, ["ingest", "sources"], [*sources, dict(source)], lambda tree: _append(tree, dict(source)))
    if added is None:
        raise ParamsError(
            f"{PLACE} ingest.sources",
            "is written in a way that cannot be added to safely",
            "a list, one source a line",
            f"Add it by hand: - {make_flow(source)}",
        )
    make_params(_load(added))
    return added


def set_keys(text: str, values: Mapping[str, Any]) -> str:
    """Return the text with other values of dotted keys, as `{"train.batch_size": 16}`; keys that are missing are added.

    What comes of it is read again and compared, so that nothing else is changed.

    Raises:
        ParamsError: the text is written in a way that cannot be changed safely; the error holds what to write by hand.
    """
    for key, value in values.items():
        parts = key.split(".")
        changed = _edit(text, parts, value, partial(_set, parts=parts, value=value))
        if changed is None:
            lines = ", ".join(f"{key}: {make_scalar(value)}" for key, value in values.items())
            raise ParamsError(
                PLACE,
                "is written in a way that cannot be changed safely",
                "one key a line",
                f"Write by hand: {lines}",
            )
        text = changed
    make_params(_load(text))
    return text


def make_scalar(value: Any) -> str:
    """Return a value as YAML writes it, so that every reader takes a number for a number: 1.0e-05, null, none."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa + (".0" if e and "." not in mantissa else "") + e + exponent
    return "null" if value is None else make_flow({"": value}).partition(": ")[2].removesuffix("}")


def make_flow(source: Mapping[str, Any]) -> str:
    """Return a source on one line: `{kind: folder, path: photos, name: photos}`."""
    from ruamel.yaml.comments import CommentedMap

    tree = CommentedMap(source)
    tree.fa.set_flow_style()
    return _dump(_make_yaml(""), tree).strip()


def write_params(path: Path, text: str) -> None:
    """Replace params.yaml as a whole, keeping its mode; a link stays one."""
    path = path.resolve()
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
    shutil.copymode(path, staged)
    os.replace(staged, path)


def _load(text: str) -> dict[str, Any]:
    value = parse_yaml(text)
    if not isinstance(value, dict):
        raise ParamsError(PLACE, f"holds a {type(value).__name__}", "sections with keys", "Edit the file.")
    return value


def _name(source: Mapping[str, Any]) -> str:
    return str(source.get("name", source.get("kind")))


def _with_key(value: Mapping[str, Any], parts: list[str], new: Any) -> dict[str, Any]:
    first, *rest = parts
    return {**value, first: _with_key(value.get(first) or {}, rest, new) if rest else new}


def _edit(text: str, parts: list[str], value: Any, change: Callable[[Any], None]) -> str | None:
    """Return the text after a change of its tree; None unless that key alone has changed, to `value`."""
    from ruamel.yaml.error import YAMLError

    newline = "\r\n" if "\r\n" in text else "\n"
    plain = text.replace("\r\n", "\n").removesuffix("\n") + "\n"
    yaml, known = _make_yaml(plain), _load(text)
    try:
        wanted = _with_key(known, parts, value)
        tree = yaml.load(plain)
        before = _dump(yaml, tree)
        change(tree)
        changed = _carry_over(plain, before, _dump(yaml, tree))
        fits = _load(changed) == wanted
    except (ValueError, LookupError, TypeError, AttributeError, YAMLError):
        return None
    return changed.replace("\n", newline) if fits else None


def _make_yaml(text: str) -> "YAML":
    """Return ruamel's reader and writer of texts with their layout, which indents as this text does."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1_000_000
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    indented = re.search(r"^( +)[^\s#-]", text, re.MULTILINE)
    step = len(indented[1]) if indented else 2
    below = re.search(r"^( *)[\w-]+:[^\n]*\n(?: *#.*\n|[ \t]*\n)*( *)- ", text, re.MULTILINE)
    offset = len(below[2]) - len(below[1]) if below else 2
    yaml.indent(mapping=step, sequence=offset + 2, offset=offset)
    return yaml


def _dump(yaml: "YAML", tree: Any) -> str:
    sink = io.StringIO()
    yaml.dump(tree, sink)
    return sink.getvalue()


def _set(tree: Any, parts: list[str], value: Any) -> None:
    """Set one key of the tree, with the sections above it. Raises AttributeError where a section is a value."""
    *sections, key = parts
    for section in sections:
        if tree.get(section) is None:
            tree[section] = type(tree)()
        tree = tree[section]
    tree[key] = _make_yaml("").load(make_scalar(value))


def _append(tree: Any, source: dict[str, Any]) -> None:
    """Add a source to the tree's list: on one line, or a line a key if it is long and the list is no line itself."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if "ingest" not in tree:
        tree.update(ingest=None)
        tree.yaml_set_comment_before_after_key("ingest", before="\n")
    if tree["ingest"] is None:
        tree["ingest"] = CommentedMap()
    ingest = tree["ingest"]
    item = CommentedMap(source)
    if len(make_flow(source)) + 6 <= ONE_LINE:
        item.fa.set_flow_style()
    if ingest.get("sources"):
        ingest["sources"].append(item)
    elif "sources" in ingest:
        ingest["sources"] = CommentedSeq([item])
    else:
        ingest.insert(0, "sources", CommentedSeq([item]))


def _carry_over(text: str, before: str, after: str) -> str:
    """Return the text with the lines that differ between `before` and `after`; `before` is the text in ruamel's layout.

    A new line goes below the last key before it: blank lines and comments in between belong to what follows.

    Raises:
        KeyError: a line that changes has another layout in the text.
    """
    lines, old, new = (one.splitlines(keepends=True) for one in (text, before, after))
    head = _count_equal(old, new)
    tail = _count_equal(old[head:][::-1], new[head:][::-1])
    end, added = len(old) - tail, new[head : len(new) - tail]
    theirs, ours = _list_content(old), _list_content(lines)
    blocks = SequenceMatcher(None, list(theirs.values()), list(ours.values())).get_matching_blocks()
    numbers = list(theirs), list(ours)
    places = {numbers[0][i + k]: numbers[1][j + k] for i, j, size in blocks for k in range(size)}
    if head < end:
        first, last = places[head], places[end - 1]
    else:
        last = places[max(number for number in theirs if number < head)]
        first = last + 1
    return "".join([*lines[:first], *added, *lines[last + 1 :]])


def _count_equal(a: list[str], b: list[str]) -> int:
    """Return how many lines are equal from the beginning on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _list_content(lines: list[str]) -> dict[int, str]:
    """Return the lines that are neither blank nor a comment, without their blanks, by their number."""
    bare = ("".join(line.split()) for line in lines)
    return {number: line for number, line in enumerate(bare) if line and not line.startswith("#")}
