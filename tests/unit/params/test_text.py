"""The text of params.yaml: YAML 1.2, each key once, no tag that makes anything, no size that fills the memory."""

from pathlib import Path

import pytest

from visionloop.errors import ParamsError
from visionloop.params import load_params, make_params
from visionloop.params.text import MAX_CHARS, MAX_VALUES, parse_yaml


def test_numbers_and_words_are_those_of_yaml_1_2() -> None:
    text = "a: 1e-3\nb: 010\non: all\nyes: no\nc: 0x1F\nd: .5\ne: 2.0e-3\nf: 12:30\ng: ~\nh: true\ni: '5'\n"
    assert parse_yaml(text) == {
        "a": 0.001,
        "b": 10,
        "on": "all",
        "yes": "no",
        "c": 31,
        "d": 0.5,
        "e": 0.002,
        "f": "12:30",
        "g": None,
        "h": True,
        "i": "5",
    }


def test_a_rate_in_scientific_notation_is_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("name: pets\ntrain: {learning_rate: 1e-3, on: train}\n")
    assert load_params(path).train.learning_rate == 0.001


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "name: a\ntrain:\n  seed: 1\n  way: knn\n  seed: 2\n",
            "p.yaml line 5: has the key 'seed' a second time; expected each key once. Edit the file.",
        ),
        ("a: 1\nb: {c: [}\n", "p.yaml line 2: is not YAML (expected the node content, but found '}')"),
        ("a: *nope\n", "p.yaml line 1: is not YAML (found undefined alias 'nope')"),
        ("a: 1\n---\nb: 2\n", "p.yaml line 2: is not YAML"),
        ("a: \x00\n", "p.yaml: is not YAML (unacceptable character #x0000"),
        ("a: 2001-99-99\n", "p.yaml: is not YAML (month must be in 1..12)"),
        ("a: &a [*a]\n", "p.yaml: has an alias inside of what it stands for; expected plain values"),
        ("[" * 1_000, "p.yaml: is not YAML (maximum recursion depth"),
    ],
    ids=["twice", "brackets", "alias", "documents", "nul", "date", "itself", "deep"],
)
def test_a_mistake_is_one_line_with_its_place(text: str, line: str) -> None:
    with pytest.raises(ParamsError) as caught:
        parse_yaml(text, "p.yaml")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!mine"])
def test_a_tag_makes_nothing(tag: str, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"line 1: is not YAML \(could not determine a constructor for the tag"):
        parse_yaml(f"a: {tag} ['{tmp_path}/made']\n")
    assert not (tmp_path / "made").exists()


def test_aliases_that_stand_for_millions_are_refused() -> None:
    layers = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    with pytest.raises(ParamsError, match=rf"stands for [0-9,]{{14,}} values; expected at most {MAX_VALUES:,}"):
        parse_yaml("a0: &a0 [x]\n" + layers)
    assert parse_yaml("a: &a {b: 1}\nc: *a\n") == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with path.open("wb") as file:
        file.write(b"name: pets\n")
        file.truncate(10 << 30)
    with pytest.raises(ParamsError, match=rf"params\.yaml: has [0-9,]+ characters; expected at most {MAX_CHARS:,}"):
        load_params(path)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("{0: cat, 1: 2}", {"0": "cat", "1": "2"}),
        ("{1.0: a, 2.5: b}", {"1": "a", "2.5": "b"}),
        ("{no: yes}", {"no": "yes"}),
    ],
)
def test_numbers_stand_for_names_of_classes(text: str, labels: dict[str, str]) -> None:
    params = make_params(parse_yaml(f"name: a\ningest: {{label_map: {text}, expect: {{classes: [0, 1, 2021-05-01]}}}}"))
    assert params.ingest.label_map == labels
    assert params.ingest.expect.classes == ("0", "1", "2021-05-01")
    source = {"kind": "video", "path": "x", "label": 3}
    assert make_params({"name": "a", "ingest": {"sources": [source]}}).ingest.sources[0].label == "3"


def test_what_is_no_text_says_that_quotes_are_wanted() -> None:
    with pytest.raises(ParamsError, match=r'expect\.classes\.0: got True; expected text: write it in quotes, "True"'):
        make_params(parse_yaml("name: a\ningest: {expect: {classes: [true]}}"))
    with pytest.raises(ParamsError, match=r'name: got 3; expected text: write it in quotes, "3"'):
        make_params(parse_yaml("name: 3"))


@pytest.mark.parametrize(("text", "number"), [("1e-05", 1e-5), ("2e-3", 2e-3), ("1E-4", 1e-4), ("1.0e-3", 1e-3)])
def test_numbers_as_dvc_writes_them(text: str, number: float) -> None:
    assert make_params(parse_yaml(f"name: a\ntrain: {{learning_rate: {text}}}")).train.learning_rate == number
