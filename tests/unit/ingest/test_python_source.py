"""A function of the user's own: its records, its errors, and nothing of it left behind."""

import sys
from pathlib import Path
from typing import Any

import pytest

from source_runs import Run, run_source, touch
from visionloop.errors import ImageError, SourceError

HEAD = "from dataclasses import dataclass\nfrom datetime import datetime\nfrom pathlib import Path\n\n\n"


def run(home: Path, code: str, **section: Any) -> Run:
    (home / "own_source.py").write_text(HEAD + code)
    return run_source(home, **{"kind": "python", "function": "own_source:records", **section})


def test_records_of_all_kinds(tmp_path: Path) -> None:
    touch(tmp_path, ["pictures/a.jpg", "other/b.jpg"])
    code = """def records(count):
    yield {"image": b"bytes" * count, "label": 3.0, "id": 7, "side": "Training", "captured_at": datetime(2020, 1, 1)}
    yield {"image": "a", "labels": ["cat", "dog"], "group": "g", "stamp": "v1"}
    yield {"image": Path("other/b.jpg"), "origin": "shelf 1"}
    yield {"image": lambda: b"late", "label": None, "id": "late"}
    yield One(b"x", "cat", "one")


@dataclass
class One:
    image: bytes
    label: str
    id: str
    side: str | None = None
"""
    found = run(tmp_path, code, images="pictures", options={"count": 2})
    assert found.facts() == [
        ("7", ("3",), "train"),
        ("a.jpg", ("cat", "dog"), None),
        ("shelf 1", (), None),
        ("late", (), None),
        ("one", ("cat",), None),
    ]
    assert [item.read(10) for item in found.items] == [b"bytesbytes", b"x", b"x", b"late", b"x"]
    assert found.items[0].captured_at == "2020-01-01T00:00:00+00:00"
    assert (found.items[1].group, found.items[1].stamp) == ("g", "v1")
    assert found.rejected == []


@pytest.mark.parametrize(
    ("record", "code", "reason"),
    [
        ("5", "bad_record", "is a int; expected a dict, a dataclass or a named tuple"),
        ("{}", "bad_record", "has an image of NoneType; expected bytes, a path, a URL"),
        ("{'image': ''}", "bad_record", "has an image of str"),
        ("{'image': b'x', 'lable': 'cat'}", "bad_record", "has unknown keys lable; expected keys of captured_at"),
        ("{'image': b'x', 'label': 'a', 'labels': []}", "bad_record", "has label and labels; expected one of them"),
        ("{'image': b'x', 'label': 'a\\n'*2}", "bad_label", "cannot be"),
        ("{'image': b'x', 'label': b'cat'}", "bad_row", "a cell holds a bytes"),
        ("{'image': b'x', 'side': 'left'}", "bad_record", "has side 'left'; expected train, val or test"),
        ("{'image': b'x', 'captured_at': 'noon'}", "bad_record", "has captured_at 'noon'; expected a time"),
        ("{'image': '../x.jpg'}", "unsafe_path", "leaves its folder"),
        ("{'image': '/etc/passwd'}", "unsafe_path", "leaves its folder"),
        ("{'image': 'gone.jpg'}", "no_file", "names no file: 'gone.jpg'"),
        ("{'image': 'http://127.0.0.1/x.jpg'}", "refused_url", "127.0.0.1 is not in the list of hosts"),
        ("{'cursor': 'a', 'image': b'x'}", "bad_record", "has a cursor that is none"),
        ("{'cursor': None}", "bad_record", "has a cursor that is none"),
    ],
)
def test_bad_record_is_rejected_with_its_number(tmp_path: Path, record: str, code: str, reason: str) -> None:
    found = run(tmp_path, f"def records():\n    yield {{'image': b'x', 'id': 1}}\n    yield {record}\n")
    assert [i.origin for i in found.items] == ["python:1"]
    assert found.codes() == [("record 2", code)]
    assert reason in found.rejected[0].reason


@pytest.mark.parametrize(
    ("code", "section", "message"),
    [
        (
            "def records():\n    yield 1 / 0\n",
            {},
            r"own_source\.py line 7: failed after 0 records \(ZeroDivisionError: division",
        ),
        (
            "def records():\n    raise OSError('no mongodb://me:pw@host')\n",
            {},
            r"line 7: failed \(OSError: no mongodb://\*\*\*@host\)",
        ),
        ("def records():\n    return inner()\ndef inner():\n    exit(3)\n", {}, r"line 9: failed \(SystemExit: 3\)"),
        ("def records():\n    return 5\n", {}, r"does not yield records \('int' object is not iterable\)"),
        ("records = 5\n", {}, "no function 'records' in own_source"),
        ("import nothing_like_it\n", {}, r"own_source\.py line 6: cannot be imported \(ModuleNotFoundError"),
        ("def records(:\n", {}, r"own_source\.py line 6: cannot be imported \(SyntaxError"),
        (
            "def records():\n    yield 1\n",
            {"options": {"colour": 1}},
            r"cannot be called with its `options` \(got an unexpected",
        ),
        (
            "def records(colour):\n    yield 1\n",
            {},
            r"cannot be called with its `options` \(missing a required argument: 'colour'",
        ),
        (
            "",
            {"function": "no_such_module_at_all:records"},
            "no module 'no_such_module_at_all'; expected no_such_module_at_all.py",
        ),
    ],
)
def test_failure_names_file_and_line(tmp_path: Path, code: str, section: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        run(tmp_path, code, **section)
    assert "\n" not in str(caught.value)


def test_cursor_goes_in_and_comes_out(tmp_path: Path) -> None:
    code = """def records(cursor):
    for i in range(int(cursor or 0), 3):
        yield {'image': b'x', 'id': i}
    yield {'cursor': 3}
"""
    first = run(tmp_path, code)
    assert [i.origin for i in first.items] == ["python:0", "python:1", "python:2"]
    assert [c.value for c in first.cursors] == ["3"]
    again = run(tmp_path, code, cursor=first.cursors[-1].value)
    assert (again.items, again.cursors) == ([], first.cursors)


def test_late_readers_that_fail_fail_alone(tmp_path: Path) -> None:
    code = """def records():
    yield {'image': lambda: 1 / 0}
    yield {'image': lambda: 'text'}
    yield {'image': lambda: b'12345'}
"""
    found = run(tmp_path, code)
    for item, message in zip(found.items, ("raised ZeroDivisionError", "gave str", "holds 5 bytes"), strict=True):
        with pytest.raises(ImageError, match=message):
            item.read(4)
    assert found.told == ["source python: records without `id` are called by their number"]


def test_nothing_of_a_workspace_is_left_behind(tmp_path: Path) -> None:
    before = list(sys.path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper_of_it.py").write_text(f"NAME = {name!r}\n")
        code = (
            "def records():\n    import helper_of_it\n    yield {'image': b'x', 'label': helper_of_it.NAME, 'id': 1}\n"
        )
        assert run(tmp_path / name, code).items[0].labels == (name,)
    assert sys.path == before
    assert not {"own_source", "helper_of_it"} & set(sys.modules)
