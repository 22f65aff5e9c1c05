"""The digests of our code: what only people read moves none of them, what can change bytes moves its stages."""

import re
import shutil
from pathlib import Path

import pytest

from visionloop.code_digests import NOT_IN_CODE, PACKAGE, STAGE_MODULES, compute_code_digests

ALL = set(STAGE_MODULES)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of our source. Tests put back what they change."""
    copy = tmp_path_factory.mktemp("copied") / "visionloop"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "examples"))
    return copy


@pytest.fixture(scope="module")
def before(copied: Path) -> dict[str, str]:
    return compute_code_digests(copied)


def find_moved(package: Path, before: dict[str, str], *edits: tuple[str, str, str]) -> set[str]:
    """The stages whose digest is another one after edits: file, old, new."""
    texts = {file: (package / file).read_text() for file, _, _ in edits}
    for file, old, new in edits:
        text = (package / file).read_text()
        assert old in text, f"{file} no longer has {old!r}: find another place for this test"
        (package / file).write_text(text.replace(old, new))
    after = compute_code_digests(package)
    for file, text in texts.items():
        (package / file).write_text(text)
    return {stage for stage in before if before[stage] != after[stage]}


def test_each_stage_has_a_digest_of_its_own(before: dict[str, str]) -> None:
    digests = compute_code_digests()
    assert set(digests) == {"prepare", "embed", "train", "evaluate", "gate"}
    assert len(set(digests.values())) == 5
    assert digests == before, "not of where the code lies"


@pytest.mark.parametrize("name", NOT_IN_CODE)
def test_what_does_not_count_is_there(name: str) -> None:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    assert path.with_suffix(".py").is_file() or path.is_dir()


def test_comments_docstrings_and_blank_lines_move_nothing(copied: Path, before: dict[str, str]) -> None:
    texts = {path: path.read_text() for path in copied.rglob("*.py")}
    for path, text in texts.items():
        path.write_text("# one more\n\n" + re.sub(r'(:\n +"""|^""")', r"\1Otherwise. ", text) + "\n# the end\n")
    after = compute_code_digests(copied)
    for path, text in texts.items():
        path.write_text(text)
    assert after == before


READ_BY_PEOPLE = [
    ("data/manifest.py", "is not in the store"),
    ("data/encoded.py", "is not an image we read"),
    ("networks/names.py", "Set train.weights to a file of a state dict"),
    ("networks/weights.py", "does not exist"),
    ("networks/fetch.py", "is too large"),
    ("training/checks.py", "one or more on the training side"),
    ("training/checks.py", 'f"dataset '),
    ("training/fit.py", "stopped before the first epoch was finished"),
    ("features/embed.py", 'f"encoder '),
    ("params/loop.py", "a cron expression of five fields"),
    ("params/train.py", "low < high, and low > 0 on a log scale"),
    ("store/s3_errors.py", "is busy: it answers"),
    ("tracking.py", "cannot be used"),
    ("training/watch.py", "Watcher"),
    ("errors.py", "SHOWN ="),
]


def test_what_only_people_read_moves_nothing(copied: Path, before: dict[str, str]) -> None:
    edits = [(file, old, old.replace("e", "é").replace("N =", "N = 1 +")) for file, old in READ_BY_PEOPLE]
    assert all(old != new for _, old, new in edits)
    assert find_moved(copied, before, *edits) == set()


@pytest.mark.parametrize(
    ("edit", "moved"),
    [
        (("data/modes.py", "_BAND_PIXELS = ", "_BAND_PIXELS = 1 + "), ALL),
        (("data/images.py", 'reason_code="empty"', 'reason_code="nothing"'), ALL),
        (("data/prepare.py", "WAVE = 64", "WAVE = 65"), {"prepare"}),
        (("training/module.py", "0.", "0.5 + 0."), {"train"}),
        (("networks/weights.py", '"model_state_dict"', '"model_states"'), {"embed", "train"}),
        (("evaluation/report.py", "Most frequent confusions", "Confusions"), {"evaluate"}),
        (("promotion/gate.py", "difference above 0", "difference over 0"), {"gate"}),
        (("params/train.py", "default=1e-3", "default=2e-3"), ALL),
        (("records.py", "sort_keys=True", "sort_keys=False"), ALL),
        (("serving/app.py", "import", "import os\nimport"), set()),
    ],
)
def test_what_can_change_bytes_moves_its_stages(
    copied: Path, before: dict[str, str], edit: tuple[str, str, str], moved: set[str]
) -> None:
    assert find_moved(copied, before, edit) == moved


SOURCE = """
from visionloop.errors import DatasetError

WHERE = "the store"
MODE = "fast"

def make_refusal(found: str) -> DatasetError:
    return DatasetError(WHERE, found)

def describe_result(rows: list[str]) -> str:
    return f"{len(rows)} rows" if rows else "no row"

def prepare(tell, rows):
    todo, label = "Wait.", "cat"
    if not rows:
        raise make_refusal("no rows at all")
    if rows == ["a"]:
        raise DatasetError(WHERE, "one row", todo=todo, reason_code="too_few")
    if MODE == "slow":
        print("slowly")
    tell(describe_result(rows), compute("key"))
    assert rows, "there are rows"
    return label
"""


@pytest.mark.parametrize(
    "text",
    ["the store", "no rows at all", "one row", "Wait.", " rows", "no row", "slowly", "there are rows"],
)
def test_a_text_does_not_count(tmp_path: Path, text: str) -> None:
    assert not is_counted(write_source(tmp_path), f'{text}"', f'{text} it is"')


@pytest.mark.parametrize("word", ["fast", "cat", "too_few", "key", "slow"])
def test_a_string_that_programs_read_counts(tmp_path: Path, word: str) -> None:
    assert is_counted(write_source(tmp_path), f'"{word}"', f'"{word}er"')


def write_source(folder: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "data" / "prepare.py").write_text(SOURCE)
    return folder


def is_counted(package: Path, old: str, new: str) -> bool:
    return bool(find_moved(package, compute_code_digests(package), ("data/prepare.py", old, new)))
