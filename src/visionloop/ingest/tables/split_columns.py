"""What the cells of a split column say: a word (`train`, `id_val`, `PublicTest`), or yes and no (`is_valid`). Pure.

A row whose word is unknown is refused by itself: it may be a test image, which must not be trained on.
"""

import re
from collections.abc import Iterable, Sequence

from visionloop.errors import ImageError, shorten
from visionloop.ingest.paths.listing import find_side
from visionloop.ingest.tables.cells import NOTHING, Row, get_cell, to_text

SPLIT_NAMES = (
    *("split", "side", "subset", "partition", "set", "dataset", "data_set", "usage", "phase", "image_set", "fold"),
    *("mode", "stage", "purpose", "ds"),
)
SPLIT_PARTS = frozenset({"split", "splits", "partition", "subset"})  # data_split, official_split, split_1
MORE_WORDS = {"trainval": "train", "trn": "train", "tr": "train", "tst": "test", "te": "test", "vld": "val"}
NOT_WORDS = frozenset({"not", "no", "non", "un", "without"})
FLAG = re.compile(
    r"(?:is|in|for|use)_?(?:the_|a_)?(train|training|val|valid|validation|dev|test|testing|eval|holdout)"
    r"(?:_?(?:set|split|img|image|images|data|sample|samples))?"
)
YES_NO = {
    **dict.fromkeys(("1", "1.0", "true", "t", "yes", "y"), True),
    **dict.fromkeys(("0", "0.0", "false", "f", "no", "n", *NOTHING), False),
}


# What the numbers 0, 1, 2 mean in the split columns of well-known data sets, by the column's name: CelebA's `partition`
# and the `split` of WILDS (Waterbirds, CelebA): train, val, test; Caltech-UCSD Birds' train_test_split: 1 is train.
NUMBERED = {
    **dict.fromkeys(("partition", "eval_partition", "list_eval_partition", "split"), ("train", "val", "test")),
    "train_test_split": ("test", "train"),
}
NOT_NUMBERED = frozenset({"fold", "set", "dataset", "data_set", "mode", "stage", "purpose", "ds", "phase"})
SIDES = ("train", "val", "test")


def find_numbers(plain: str, values: Iterable[object]) -> tuple[str, ...]:
    """Return what 0, 1 and 2 mean in a split column, if its name and values are those of a well-known data set.

    Raises:
        LookupError: all values are 0 and 1, or 0, 1 and 2, and the name does not say what these mean.
    """
    found: set[str] = set()
    for value in values:
        if not isinstance(value, str | int | float) or (text := to_text(value)) not in ("0", "1", "2"):
            return ()
        found.add(text)
    meaning = NUMBERED.get(plain, ())
    if meaning and found == {str(number) for number in range(len(meaning))}:
        return meaning
    if found in ({"0", "1"}, {"0", "1", "2"}) and plain not in NOT_NUMBERED:
        raise LookupError(plain)
    return ()


def find_word_side(text: str) -> str | None:
    """Return train, val or test for a word of a split column, None for any other: `test_2`, `id_val`, `PublicTest`."""
    if side := find_side(text):
        return side
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text).lower())
    sides = {side for word in words if (side := MORE_WORDS.get(word) or find_side(word))}
    return sides.pop() if len(sides) == 1 and not NOT_WORDS & {*words} else None


def is_split_name(plain: str) -> bool:
    """Say whether a column's name, in lower case with `_` between its words, is one of a split column."""
    return plain in SPLIT_NAMES or bool(SPLIT_PARTS & {*re.split(r"_|\d", plain)})


def find_flag_side(plain: str) -> str | None:
    """Return the side that a column of yes and no means by its name: `is_valid` is val. None: it is no such name."""
    found = FLAG.fullmatch(plain)
    return find_side(found[1]) if found else None


def are_flags(values: Sequence[object]) -> bool:
    """Say whether most values are yes or no."""
    known = sum(isinstance(value, str | int | float) and to_text(value).lower() in YES_NO for value in values)
    return known * 2 >= len(values)


def find_unknown(values: Sequence[object]) -> tuple[list[str], int]:
    """Return the values that are no word of a split, each once and sorted, and how many of all values are."""
    texts = [to_text(value) if isinstance(value, str | int | float) else "a list" for value in values]
    texts = [text for text in texts if text.lower() not in NOTHING]
    known = sum(find_word_side(text) is not None for text in texts)
    return sorted({text[:40] for text in texts if find_word_side(text) is None}), known


def read_word(cell: object, column: str, numbers: Sequence[str] = ()) -> str | None:
    """Return the side that a cell of a column names; None when it is empty. `numbers` are the sides of 0, 1, 2.

    Raises:
        ImageError: `unknown_side`.
    """
    text = to_text(cell)
    side = None if text.lower() in NOTHING else find_word_side(text)
    if numbers and text.isdecimal() and int(text) < len(numbers):
        side = numbers[int(text)]
    if side is None and text.lower() not in NOTHING:
        found, expected = f"column {column} says {text[:40]!r}", "train, val or test"
        raise ImageError("row", found, expected, reason_code="unknown_side")
    return side


def read_flags(row: Row, columns: Sequence[str], sides: Sequence[str]) -> str | None:
    """Return the side that columns of yes and no name, `sides` those that they mean.

    Where none says yes, the row belongs to the one of train and test that has no column; to neither, if both have one.

    Raises:
        ImageError: `unknown_side`: two say yes, or a cell is neither yes nor no.
    """
    cells = [to_text(get_cell(row, name)).lower() for name in columns]
    answers = {side: YES_NO.get(cell) for cell, side in zip(cells, sides, strict=True)}
    on = [side for side, answer in answers.items() if answer]
    if None in answers.values() or len(on) > 1:
        found = "say yes to two sides" if len(on) > 1 else "hold something else than yes or no"
        raise ImageError("row", f"columns {shorten(columns)} {found}", "one side", reason_code="unknown_side")
    return on[0] if on else next((side for side in ("train", "test") if side not in sides), None)
