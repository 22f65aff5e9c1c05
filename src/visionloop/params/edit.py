"""Change the text of params.yaml: add a source, set keys. Its comments, order and layout stay as they are. Pure."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from visionloop.errors import ParamsError
from visionloop.params import make_params
from visionloop.params.section import parse_yaml

ONE_LINE = 100


def add_source(text: str, source: Mapping[str, Any]) -> str:
    """Return the text with one more source under `ingest.sources`; the text itself if this very source is there.

    What comes of it is read again and compared, so that nothing but the source is new.

    Raises:
        ParamsError: another source has this name, or the text is written in a way that cannot be added to safely;
            the error holds what to write by hand.
    """
    before = _load(text)
    sources = _list_sources(before)
    if dict(source) in sources:
        return text
    if any(isinstance(other, Mapping) and _name(other) == _name(source) for other in sources):
        found = f"a source is named {_name(source)!r} already"
        raise ParamsError("params.yaml ingest.sources", found, "a name of its own for each", "Choose one with --name.")
    wanted = {**before, "ingest": {**(before.get("ingest") or {}), "sources": [*sources, dict(source)]}}
    newline = "\r\n" if "\r\n" in text else "\n"
    try:
        added = _insert(text.replace("\r\n", "\n"), dict(source)).replace("\n", newline)
        if _load(added) != wanted:
            raise ValueError("something else changed")
        make_params(wanted)
    except (ValueError, AttributeError, IndexError, yaml.YAMLError) as exc:
        if isinstance(exc, ParamsError):
            raise
        raise ParamsError(
            "params.yaml ingest.sources",
            "is written in a way that cannot be added to safely",
            "a list, one source a line",
            f"Add it by hand: - {make_flow(source)}",
        ) from exc
    return added


def set_keys(text: str, values: Mapping[str, Any]) -> str:
    """Return the text with other values of dotted keys, as `{"train.batch_size": 16}`; keys that are missing are added.

    What comes of it is read again and compared, so that nothing else is changed.

    Raises:
        ParamsError: the text is written in a way that cannot be changed safely; the error holds what to write by hand.
    """
    wanted, newline = _load(text), "\r\n" if "\r\n" in text else "\n"
    changed = text.replace("\r\n", "\n")
    try:
        for key, value in values.items():
            parts = key.split(".")
            changed = _set_key(changed, parts, value)
            wanted = _with_key(wanted, parts, value)
        changed = changed.replace("\n", newline)
        if _load(changed) != wanted:
            raise ValueError("something else changed")
        make_params(wanted)
    except (ValueError, AttributeError, IndexError, TypeError, yaml.YAMLError) as exc:
        if isinstance(exc, ParamsError):
            raise
        lines = ", ".join(f"{key}: {make_scalar(value)}" for key, value in values.items())
        raise ParamsError(
            "params.yaml",
            "is written in a way that cannot be changed safely",
            "one key a line",
            f"Write by hand: {lines}",
        ) from exc
    return changed


def make_scalar(value: Any) -> str:
    """Return a value as YAML writes it, so that every reader takes a number for a number: 1.0e-05, null, none."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa + (".0" if e and "." not in mantissa else "") + e + exponent
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n...\n").strip()


def _with_key(value: dict[str, Any], parts: list[str], new: Any) -> dict[str, Any]:
    first, *rest = parts
    return {**value, first: _with_key(value.get(first) or {}, rest, new) if rest else new}


def _set_key(text: str, parts: list[str], value: Any) -> str:
    """Return the text with one key set. Raises ValueError, or an error that means as much."""
    node = yaml.compose(text, yaml.SafeLoader)
    key_node: Any = None
    for depth, part in enumerate(parts):
        key_node, found = _find(node, part) if isinstance(node, yaml.MappingNode) else (None, None)
        if key_node is None:
            return _add_key(text, node, parts[depth:], value)
        if depth < len(parts) - 1 and not isinstance(found, yaml.MappingNode):
            return _add_below(text, key_node, found, parts[depth + 1 :], value)
        node = found
    if not isinstance(node, yaml.ScalarNode) or node.style in {"|", ">"}:
        raise ValueError("no plain value")
    start, end = node.start_mark.index, node.end_mark.index
    space = "" if start < end or text[start - 1 : start] == " " else " "  # a key without a value: `key:`
    return f"{text[:start]}{space}{make_scalar(value)}{text[end:]}"


def _add_key(text: str, mapping: Any, parts: list[str], value: Any) -> str:
    """Write a key as the last of a mapping."""
    if mapping.flow_style:
        end = mapping.end_mark.index
        inside = text[: end - 1].rstrip()
        comma = "" if not mapping.value or inside.endswith(",") else ","
        space = "" if inside.endswith("{") else " "
        nested = make_scalar(value)
        for part in reversed(parts[1:]):
            nested = f"{{{part}: {nested}}}"
        return f"{inside}{comma}{space}{parts[0]}: {nested}{text[end - 1 :]}"
    return _insert_after(text, _find_end(text, mapping), _make_lines(parts, value, mapping.start_mark.column))


def _add_below(text: str, key_node: Any, empty: Any, parts: list[str], value: Any) -> str:
    """Write keys below one that has no value yet."""
    if empty.start_mark.index != empty.end_mark.index:
        raise ValueError("a value where a section should be")
    return _insert_after(text, key_node.end_mark.index, _make_lines(parts, value, key_node.start_mark.column + 2))


def _make_lines(parts: list[str], value: Any, indent: int) -> str:
    lines = [f"{' ' * (indent + 2 * depth)}{part}:\n" for depth, part in enumerate(parts)]
    return "".join(lines)[:-1] + f" {make_scalar(value)}\n"


def make_flow(source: Mapping[str, Any]) -> str:
    """Return a source on one line: `{kind: folder, path: photos, name: photos}`."""
    dumped = yaml.safe_dump(
        dict(source), default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True
    )
    return str(dumped).strip()


def _load(text: str) -> dict[str, Any]:
    value = parse_yaml(text)
    if not isinstance(value, dict):
        raise ParamsError("params.yaml", f"holds a {type(value).__name__}", "sections with keys", "Edit the file.")
    return value


def _list_sources(value: Mapping[str, Any]) -> list[Any]:
    ingest = value.get("ingest") or {}
    return list(ingest.get("sources") or [])


def _name(source: Mapping[str, Any]) -> str:
    return str(source.get("name", source.get("kind")))


def _insert(text: str, source: dict[str, Any]) -> str:
    """Return the text with the source written in. Raises ValueError, or an error that means as much."""
    root = yaml.compose(text, yaml.SafeLoader)
    ingest_key, ingest = _find(root, "ingest")
    if ingest_key is None:
        end = text if text.endswith("\n") else text + "\n"
        return f"{end}\ningest:\n  sources:\n{_make_item(source, 4)}"
    sources_key, sources = _find(ingest, "sources") if isinstance(ingest, yaml.MappingNode) else (None, None)
    if sources_key is None:
        return _insert_key(text, ingest_key, ingest, source)
    if isinstance(sources, yaml.SequenceNode) and sources.flow_style:
        return _insert_into_flow(text, sources_key, ingest, sources, source)
    if isinstance(sources, yaml.SequenceNode):
        return _insert_after(text, _find_end(text, sources), _make_item(source, sources.start_mark.column))
    return _insert_after(text, sources_key.end_mark.index, _make_item(source, sources_key.start_mark.column + 2))


def _find(node: Any, key: str) -> tuple[Any, Any]:
    """Return the nodes of a key and its value in a mapping, or None twice."""
    return next(((k, v) for k, v in node.value if k.value == key), (None, None))


def _insert_key(text: str, ingest_key: Any, ingest: Any, source: dict[str, Any]) -> str:
    """Write `sources` as the first key of the section."""
    if not isinstance(ingest, yaml.MappingNode):
        return _insert_after(text, ingest_key.end_mark.index, f"  sources:\n{_make_item(source, 4)}")
    start = ingest.start_mark.index
    if ingest.flow_style:
        rest = ", " if ingest.value else ""
        return f"{text[: start + 1]}sources: [{make_flow(source)}]{rest}{text[start + 1 :]}"
    indent = ingest.start_mark.column
    return f"{text[:start]}sources:\n{_make_item(source, indent + 2)}{' ' * indent}{text[start:]}"


def _insert_into_flow(text: str, key: Any, ingest: Any, sources: Any, source: dict[str, Any]) -> str:
    start, end = sources.start_mark.index, sources.end_mark.index
    if not sources.value and not ingest.flow_style:
        # `sources: [] # a comment` becomes a list below that line.
        emptied = text[: key.end_mark.index] + ":" + text[end:]
        return _insert_after(emptied, key.end_mark.index, _make_item(source, key.start_mark.column + 2))
    inside = text[start + 1 : end - 1].rstrip()
    comma = ", " if sources.value and not inside.endswith(",") else " " if sources.value else ""
    return f"{text[: start + 1]}{inside}{comma}{make_flow(source)}{text[end - 1 :]}"


def _find_end(text: str, node: Any) -> int:
    """Return where the last scalar below a node ends: a block node itself ends only where the next one begins."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    end: int = node.end_mark.index
    return len(text[:end].rstrip()) if getattr(node, "style", None) in {"|", ">"} else end


def _insert_after(text: str, place: int, lines: str) -> str:
    """Insert whole lines below the line of a place; comments at the end of that line stay there."""
    end = text.find("\n", place)
    return f"{text[: end + 1]}{lines}{text[end + 1 :]}" if end >= 0 else f"{text}\n{lines}"


def _make_item(source: dict[str, Any], indent: int) -> str:
    """Return a source as an item of a block list: on one line, or a line a key if it is long."""
    line = f"{' ' * indent}- {make_flow(source)}\n"
    if len(line) <= ONE_LINE:
        return line
    block = str(yaml.safe_dump(source, sort_keys=False, width=float("inf"), allow_unicode=True)).splitlines()
    return "".join(f"{' ' * indent}{'- ' if number == 0 else '  '}{one}\n" for number, one in enumerate(block))


def write_params(path: Path, text: str) -> None:
    """Replace params.yaml as a whole, keeping its mode; a link stays one."""
    import shutil

    path = path.resolve()
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
    shutil.copymode(path, staged)
    os.replace(staged, path)
