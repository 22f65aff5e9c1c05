"""Templates for labels in file names: what they take, what they refuse, and that they take linear time."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloop.errors import SourceError
from visionloop.ingest.paths.layout import Match, make_pattern

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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), st.text("a1_/.", max_size=10))
def test_match_is_that_of_a_lazy_expression(pieces: list[str], path: str) -> None:
    text = "/" + "".join(pieces)  # a slash and a dot: held against the whole path, as it stands
    text = f"{text[1:]}/.x"
    try:
        pattern = make_pattern(text, "source x")
    except SourceError:
        return
    fields = [p for p in pieces if p.startswith("{") and p != "{number}"]
    parts = [
        AS_EXPRESSION.get(p) or (f"(?P<{p[1:-1]}>[^/]+?)" if p in fields else re.escape(p)) for p in [*pieces, "/.x"]
    ]
    found = re.fullmatch("".join(parts), f"{path}/.x")
    expected = Match(found["label"], None, found.groupdict().get("group")) if found else None
    assert pattern.match(f"{path}/.x") == expected


def test_a_hostile_name_takes_no_time() -> None:
    pattern = make_pattern("*a*a*a*a*a*a*a*a*a*a{label}b.jpg", "source x")
    started = time.process_time()
    assert pattern.match("a" * 4000 + ".jpg") is None
    assert pattern.match("a" * 100_000 + "b.jpg") is None
    assert time.process_time() - started < 0.5  # a backtracking matcher would take longer than the universe is old
