"""Templates for labels in file names: what they take, what they refuse, and that they take linear time."""

import re
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from visionloop.errors import SourceError
from visionloop.ingest.paths.pattern import Match, make_pattern

PIECES = ("{label}", "{group}", "{number}", "*", "a", "1", "_", "/", ".")
AS_EXPRESSION = {"*": "[^/]*?", "{number}": "[0-9]+?"}


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("{label}.*.jpg", "cat.0.jpg", Match("cat")),
        ("{label}.*.jpg", "deep/below/cat.0.JPG", Match("cat")),
        ("{label}.*.jpg", "cat.0.png", None),
        ("{label}.*.jpg", "1.jpg", None),
        ("{label}.*", "cat.0.jpg", Match("cat")),
        ("{label}_{number}", "american_bulldog_10.jpg", Match("american_bulldog")),
        ("{label}{number}", "cat12.jpg", Match("cat")),
        ("{label}-{group}", "cat-p1.jpg", Match("cat", None, "p1")),
        ("{side}/{label}-{group}_*", "Training/cat-p1_7.png", Match("cat", "train", "p1")),
        ("{side}/{label}.jpg", "elsewhere/cat.jpg", Match("cat", None)),
        ("val2017/{label}/*", "val2017/cat/x/y.jpg", None),
        ("*/{label}.*", "a/cat.1.jpg", Match("cat")),
        ("*/{label}.*", "cat.1.jpg", None),
        ("{label}.*", ".jpg", None),
        ("{label} ({number})", "tabby cat (3).jpeg", Match("tabby cat")),
    ],
)
def test_match(text: str, path: str, expected: Match | None) -> None:
    assert make_pattern(text, "source x").match(path) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, too long or not printable"),
        ("a\nb{label}", "is empty, too long or not printable"),
        ("x" * 501, "is empty, too long or not printable"),
        ("*.jpg", r"names no label; expected \{label\} in it"),
        ("{label", r"has \{label; expected \{label\}, \{side\}"),
        ("{breed}.jpg", r"has \{breed\}; expected"),
        ("label}", r"has a \} without its \{"),
        ("{label}.{label}", r"names \{label\} twice"),
        ("{label}{group}", "has two fields side by side"),
        ("{label}*", "has two fields side by side"),
        ("../{label}.jpg", "leaves the source"),
        ("/data/{label}.jpg", "leaves the source"),
        ("a\\{label}.jpg", "leaves the source"),
    ],
)
def test_unusable_template_is_refused(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        make_pattern(text, "source x")


def test_a_template_becomes_an_expression_without_second_tries() -> None:
    found = make_pattern("*x{label}_{number}y*.jpg", "source x").expression.pattern
    assert found == r"(?>[^/]*?x)(?>(?P<label>[^/]+?)_(?>[0-9]+?y))[^/]*?(?i:\.jpg)"


@settings(max_examples=200)
@example(["{label}", "/"], "1/1", "/.{}")
@example(["{label}", "/"], "1/", "/.{}")
@example(["{label}", "/"], "1", "/.{}")
@example(["{label}", "/", "a"], "1/a.1", "/.{}")
@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=7),
    st.text("a1_/.", max_size=12),
    st.sampled_from(["{}/.x", "/.{}"]),
)
def test_match_is_that_of_a_lazy_expression(pieces: list[str], path: str, frame: str) -> None:
    # A slash: held against the whole path. The frame's end is at the end, or before, so that a field may end it.
    text, path = "p" + frame.format("".join(pieces)), "p" + frame.format(path)
    try:
        pattern = make_pattern(text, "source x")
    except SourceError:
        return
    assume("**/" not in text)  # any number of folders: tested below
    fields = [p for p in pieces if p.startswith("{") and p != "{number}"]
    parts = [AS_EXPRESSION.get(p) or (f"(?P<{p[1:-1]}>[^/]+?)" if p in fields else re.escape(p)) for p in pieces]
    before, after = map(re.escape, f"p{frame}".split("{}"))
    found = re.fullmatch(f"{before}{''.join(parts)}{after}".removesuffix("/"), cut_path(text, path))
    expected = Match(found["label"], None, found.groupdict().get("group")) if found else None
    assert pattern.match(path) == expected


def cut_path(text: str, path: str) -> str:
    """Return what of a path a template is held against: its first folders, the path without suffix, or all of it."""
    if text.endswith("/"):
        *folders, _ = path.split("/", text.count("/"))
        return "/".join(folders) if len(folders) == text.count("/") else ""
    return path if "." in text.rpartition("/")[2] else re.sub(r"(?<=[^/])\.[^./]*$", "", path)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("*a*a*a*a*a*a*a*a*a*a{label}b.jpg", "a" * 4000 + ".jpg"),
        ("*a*a*a*a*a*a*a*a*a*a{label}b.jpg", "a" * 100_000 + "b.jpg"),
        ("{label}{number}", "1" * 4000 + "x"),
        ("{label}{number}1{number}1{number}1{number}x", "1" * 4000 + "y"),
        ("{label}_{number}_{number}_{number}_{number}", "_1" * 2000 + "_"),
        ("{label}-{number}{number}{number}{number}{number}{number}", "-1" * 2000),
        ("*/*/*/{label}-*-*-*-*", "a/a/a/" + "-" * 4000 + "/"),
    ],
)
def test_a_hostile_name_takes_no_time(text: str, path: str) -> None:
    pattern = make_pattern(text, "source x")
    started = time.process_time()
    assert pattern.match(path) is None
    assert time.process_time() - started < 0.5  # plain lazy fields would take longer than the universe is old


@pytest.mark.parametrize(
    ("text", "path", "label", "side"),
    [
        ("**/{label}/", "a/b/cat/1.jpg", "cat", None),
        ("**/{label}/", "cat/1.jpg", "cat", None),
        ("{side}/**/{label}/", "test/a/b/cat/1.jpg", "cat", "test"),
        ("{side}/**/{label}/", "test/cat/1.jpg", "cat", "test"),
        ("{label}/**/{side}/", "cat/images/x/te/1.jpg", "cat", "test"),
        ("**/{label}/*.jpg", "a/cat/1.JPG", "cat", None),
        ("**/{side}_{label}/*/", "x/y/val_cat/z/1.png", "cat", "val"),
    ],
)
def test_two_stars_and_a_slash_are_any_number_of_folders(text: str, path: str, label: str, side: str | None) -> None:
    match = make_pattern(text, "source x").match(path)
    assert match is not None
    assert (match.label, match.side) == (label, side)


@pytest.mark.parametrize(
    ("text", "path"),
    [("**/{label}/", "1.jpg"), ("{side}/**/{label}/", "cat/1.jpg"), ("**/{label}/*.jpg", "cat/1.png")],
)
def test_two_stars_need_the_folders_that_are_named(text: str, path: str) -> None:
    assert make_pattern(text, "source x").match(path) is None
