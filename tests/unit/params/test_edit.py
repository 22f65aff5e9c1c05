"""A source added to the text of params.yaml: comments stay, nothing else changes, and what is unclear is refused."""

from typing import Any

import pytest

from visionloop.errors import ParamsError
from visionloop.params import make_params
from visionloop.params.edit import add_source
from visionloop.params.text import parse_yaml

SHORT = {"kind": "folder", "path": "photos", "name": "photos"}
LONG = {
    "kind": "sql",
    "url": "sqlite:///pets.db",
    "query": "select path, label from images where label is not null and width > 32 order by id",
    "name": "db",
}
ITEM = "- {kind: folder, path: photos, name: photos}\n"
TEXTS = {
    "no section": ("name: a\n", f"name: a\n\ningest:\n  sources:\n    {ITEM}"),
    "no line end": ("name: a", f"name: a\n\ningest:\n  sources:\n    {ITEM}"),
    "empty list": (
        "name: a\ningest:\n  sources: [] # or this\n  max_rejected_ratio: 0.1\n",
        f"name: a\ningest:\n  sources:    # or this\n    {ITEM}  max_rejected_ratio: 0.1\n",
    ),
    "no value": (
        "name: a\ningest:\n  sources: # none\ntrain: {seed: 1}\n",
        f"name: a\ningest:\n  sources: # none\n    {ITEM}train: {{seed: 1}}\n",
    ),
    "empty section": (
        "name: a\ningest: # later\ntrain: {seed: 1}\n",
        f"name: a\ningest: # later\n  sources:\n    {ITEM}train: {{seed: 1}}\n",
    ),
    "other keys": (
        "name: a\ningest:\n   # limits\n   max_rejected_ratio: 0.1 # more\n",
        f"name: a\ningest:\n   sources:\n     {ITEM}   # limits\n   max_rejected_ratio: 0.1 # more\n",
    ),
    "list": (
        "name: a\ningest:\n  sources:\n    - kind: digits # one\n    # two\n  max_rejected_ratio: 0.1\n",
        f"name: a\ningest:\n  sources:\n    - kind: digits # one\n    {ITEM}    # two\n  max_rejected_ratio: 0.1\n",
    ),
    "list to the left": (
        "name: a\ningest:\n  sources:\n  - kind: digits\n",
        f"name: a\ningest:\n  sources:\n  - kind: digits\n  {ITEM}",
    ),
    "block scalar": (
        "name: a\ningest:\n  sources:\n    - kind: sql\n      url: x://\n      query: |\n        a\n\n  # end\n",
        "name: a\ningest:\n  sources:\n    - kind: sql\n      url: x://\n      query: |\n        a\n"
        f"    {ITEM}\n  # end\n",
    ),
    "flow": (
        "name: a\ningest: {sources: [{kind: digits}], max_rejected_ratio: 0.1}\n",
        "name: a\ningest: {sources: [{kind: digits}, {kind: folder, path: photos, name: photos}], "
        "max_rejected_ratio: 0.1}\n",
    ),
    "lines of another layout": (
        "name:   a\ntrain: {seed: 1,\n  max_epochs: 2}\ningest:\n  sources:\n    -   kind:   digits\n"
        "serve:\n   poll_s: 2.0\n",
        "name:   a\ntrain: {seed: 1,\n  max_epochs: 2}\ningest:\n  sources:\n    -   kind:   digits\n"
        f"    {ITEM}serve:\n   poll_s: 2.0\n",
    ),
    "end of document": (
        "---\nname: 'a' # mine\n...\n",
        f"---\nname: 'a' # mine\n\ningest:\n  sources:\n    {ITEM}...\n",
    ),
    "windows": (
        "name: a\r\ningest:\r\n  sources: []\r\n",
        f"name: a\ningest:\n  sources:\n    {ITEM}".replace("\n", "\r\n"),
    ),
}


@pytest.mark.parametrize(("before", "after"), TEXTS.values(), ids=TEXTS)
def test_a_source_is_written_in(before: str, after: str) -> None:
    assert add_source(before, SHORT) == after


@pytest.mark.parametrize("place", ["ingest: # later\n", "ingest: # later\n  sources: # mine\n    # or these\n"])
def test_comments_stay(place: str) -> None:
    text = f"# first\nname: 'a' # quoted\n{place}# last\ntrain:\n  clip_norm: # none\n"
    added = add_source(text, SHORT).splitlines()
    added.remove(next(line for line in added if "photos" in line))
    assert [line for line in added if line != "  sources:"] == text.splitlines()


@pytest.mark.parametrize(("before", "after"), TEXTS.values(), ids=TEXTS)
def test_nothing_else_changes(before: str, after: str) -> None:
    for source in (SHORT, LONG):
        was, now = parse_yaml(before), parse_yaml(add_source(before, source))
        assert now["ingest"]["sources"] == [*((was.get("ingest") or {}).get("sources") or []), source]
        for value in (was, now):
            (value.get("ingest") or {}).pop("sources", None)
        assert {**now, "ingest": now["ingest"] or None} == {**was, "ingest": was.get("ingest") or None}


def test_a_long_source_takes_a_line_a_key() -> None:
    text = add_source("name: a\n", LONG)
    assert "    - kind: sql\n      url: sqlite:///pets.db\n      query: select path" in text
    assert make_params(parse_yaml(text)).ingest.sources[0].name == "db"


def test_the_same_source_is_not_added_twice() -> None:
    once = add_source("name: a\n", SHORT)
    assert add_source(once, SHORT) == once


@pytest.mark.parametrize("name", ["photos", "digits"])
def test_a_name_that_is_taken(name: str) -> None:
    text = "name: a\ningest:\n  sources:\n    - kind: digits\n    - {kind: folder, path: x, name: photos}\n"
    with pytest.raises(ParamsError, match=rf"a source is named '{name}' already.*Choose one with --name"):
        add_source(text, {**SHORT, "name": name})


@pytest.mark.parametrize(
    "text",
    [
        "name: a\ningest:\n  sources: [\n    {kind: digits}, # one\n  ]\n",
        "name: a\nx: &s [{kind: digits}]\ningest:\n  sources: *s\n",
    ],
    ids=["comment in brackets", "alias"],
)
def test_what_cannot_be_added_to_safely_is_refused(text: str) -> None:
    with pytest.raises(ParamsError, match=r"cannot be added to safely.*Add it by hand: - \{kind: folder, path: photos"):
        add_source(text, SHORT)


@pytest.mark.parametrize(("text", "found"), [("- a\n", "holds a list"), ("", "holds a NoneType")])
def test_a_text_that_is_no_params(text: str, found: str) -> None:
    with pytest.raises(ParamsError, match=found):
        add_source(text, SHORT)


def test_a_source_that_params_refuse() -> None:
    bad: dict[str, Any] = {**SHORT, "path": ""}
    with pytest.raises(ParamsError, match=r"ingest\.sources.*path"):
        add_source("name: a\n", bad)
