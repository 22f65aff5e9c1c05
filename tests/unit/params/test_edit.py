"""params.yaml edited in place: a source added, keys set; everything else stays as it is."""

import time
from pathlib import Path
from typing import Any

import pytest

from visionloop.errors import ParamsError
from visionloop.params import load_params, make_params
from visionloop.params.edit import add_source, make_scalar, set_keys
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


TEXT = """\
# mine
name: pets # the name

train:   # how it learns
  way: frozen
  learning_rate: 2.0e-3 # found by hand
  patience: 5

  neighbours: {k: 5}  # few
gate:
  alpha: 0.05
"""


def test_a_value_is_replaced_and_nothing_else() -> None:
    changed = set_keys(TEXT, {"train.learning_rate": 0.00012})
    assert changed == TEXT.replace("2.0e-3 # found", "0.00012 # found")


def test_a_missing_key_becomes_the_last_of_its_section() -> None:
    changed = set_keys(TEXT, {"train.batch_size": 16, "train.weight_decay": 1e-05})
    added = "  neighbours: {k: 5}  # few\n  batch_size: 16\n  weight_decay: 1.0e-05\ngate:"
    assert added in changed
    assert changed.replace("  batch_size: 16\n  weight_decay: 1.0e-05\n", "") == TEXT


def test_keys_in_brackets_and_below_each_other() -> None:
    changed = set_keys(TEXT, {"train.neighbours.k": 9, "train.neighbours.vote": "distance"})
    assert changed == TEXT.replace("{k: 5}  #", "{k: 9, vote: distance} #")
    flow = "name: pets\ntrain: {way: scratch}\n"
    assert set_keys(flow, {"train.neighbours.k": 7}) == "name: pets\ntrain: {way: scratch, neighbours: {k: 7}}\n"
    assert set_keys("name: pets\ntrain: {}\n", {"train.seed": 1}) == "name: pets\ntrain:\n  seed: 1\n"


def test_a_section_that_is_missing_or_empty() -> None:
    assert set_keys("name: pets\n", {"train.seed": 1}) == "name: pets\ntrain:\n  seed: 1\n"
    assert set_keys("name: pets", {"train.seed": 1}) == "name: pets\ntrain:\n  seed: 1\n"
    assert set_keys("name: pets\ntrain:\n", {"train.seed": 1}) == "name: pets\ntrain:\n  seed: 1\n"
    nested = set_keys("name: pets\n", {"train.neighbours.k": 3})
    assert nested == "name: pets\ntrain:\n  neighbours:\n    k: 3\n"


def test_a_new_key_comes_before_the_blank_lines_and_comments_of_the_next_section() -> None:
    text = "name: pets\ntrain:\n  seed: 1 # luck\n\n# who judges\ngate:\n  alpha: 0.05\n"
    added = "name: pets\ntrain:\n  seed: 1 # luck\n  patience: 7\n\n# who judges\ngate:\n  alpha: 0.05\n"
    assert set_keys(text, {"train.patience": 7}) == added


def test_thousands_of_comments_and_blank_lines_stay_and_take_no_time() -> None:
    text = "name: pets\n" + "# one more\n \n" * 3000 + "train:\n  seed: 1\n"
    started = time.monotonic()
    assert set_keys(text, {"train.seed": 2}) == text.replace("seed: 1", "seed: 2")
    assert time.monotonic() - started < 10


def test_the_examples_change_in_one_line_a_key() -> None:
    for path in Path(__file__).parents[3].glob("src/visionloop/examples/*/params.yaml"):
        text = path.read_text()
        changed = set_keys(text, {"train.seed": 12, "train.ema": 0.5}).splitlines()
        assert len(changed) == len(text.splitlines()) + 1
        assert set(changed) - set(text.splitlines()) == {"  seed: 12", "  ema: 0.5"}
        assert changed.index("  ema: 0.5") == changed.index("  seed: 12") + 1


def test_windows_line_ends_stay() -> None:
    text = TEXT.replace("\n", "\r\n")
    assert set_keys(text, {"train.patience": 7}) == text.replace("patience: 5", "patience: 7")


def test_a_null_is_replaced_and_written() -> None:
    text = "name: pets\ntrain:\n  clip_norm:\n  seed: 1\n"
    assert set_keys(text, {"train.clip_norm": 2.5}) == text.replace("clip_norm:", "clip_norm: 2.5")
    assert set_keys(text, {"train.seed": 2, "train.clip_norm": None}).endswith("seed: 2\n")


@pytest.mark.parametrize(
    "text",
    ["name: pets\ntrain: &a\n  seed: 1\ngate: *a\n", "name: pets\ntrain: 5\n", "name: pets\ntrain: {seed: [1,\n 2]}\n"],
    ids=["alias", "no-section", "list"],
)
def test_what_cannot_be_changed_safely_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ParamsError, match=r"cannot be changed safely; .*Write by hand: train\.seed: 3"):
        set_keys(text, {"train.seed": 3})


def test_a_value_that_params_refuse_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"params\.yaml train\.learning_rate: got 99"):
        set_keys(TEXT, {"train.learning_rate": 99})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-05, "1.0e-05"),
        (2.5e-07, "2.5e-07"),
        (0.001, "0.001"),
        (16, "16"),
        (None, "null"),
        ("none", "none"),
        (True, "true"),
        ("5", "'5'"),
    ],
)
def test_scalars_read_back_as_what_they_were(value: object, text: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from visionloop.params.text import parse_yaml

    assert make_scalar(value) == text
    assert parse_yaml(f"a: {text}") == {"a": value}


def test_the_result_is_read_by_load_params(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "params.yaml"
    path.write_text(set_keys(TEXT, {"train.learning_rate": 1e-05}))
    assert load_params(path).train.learning_rate == 1e-05
