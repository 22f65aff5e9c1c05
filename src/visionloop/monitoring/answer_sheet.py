"""A batch as a CSV with its pictures beside it, and the answers that were written into one.

sha256,image,model,confidence,reason,label,remark
3f786850...,ask/01-3f786850.jpg,dog,0.5210,uncertain,cat,          the label: cat
a9993e36...,ask/02-a9993e36.jpg,cat,0.9713,novel,,not ours         not an image of ours; `skip`: nobody can tell

An empty line of both is no answer. Several labels of an image are divided by |. Nothing of a file with a mistake in it
is taken.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from visionloop.data.answers import (
    LABEL,
    MAX_WHO_CHARS,
    NOT_OURS,
    SKIP,
    Asked,
    Batch,
    Labels,
    load_batches,
    load_opinions,
    read_asked,
    write_answers,
)
from visionloop.data.images import decode_image
from visionloop.errors import ObjectMissing, SettingsError, SourceError, VisionLoopError, shorten
from visionloop.records import LABEL_SEPARATOR, defuse_cell
from visionloop.store import ObjectStore
from visionloop.workspace import Workspace

COLUMNS = ("sha256", "image", "model", "confidence", "reason", "label", "remark")
NEEDED = ("sha256", "label")
REMARKS = {"": None, "skip": SKIP, "not ours": NOT_OURS, "not_ours": NOT_OURS}
PICTURE_PX, QUALITY = 1600, 88
MAX_BYTES, MAX_LABEL_CHARS = 50_000_000, 200


def load_picture(store: ObjectStore, name: str, asked: Asked, max_px: int, *, max_pixels: int) -> bytes:
    """Return an image as a JPEG of at most so many pixels a side, made anew: nothing else of the file is in it.

    Raises:
        ObjectMissing: it is gone.
        ImageError: it cannot be decoded.
    """
    picture = decode_image(read_asked(store, name, asked), asked.sha256[:12], max_pixels=max_pixels)
    picture.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=QUALITY)
    return sink.getvalue()


def write_sheet(workspace: Workspace, batch: Batch, path: Path) -> int:
    """Write a batch as CSV, and its pictures into a folder of the same name; return how many pictures are gone.

    Raises:
        SettingsError: the file is there already, or cannot be written.
    """
    folder = path.with_suffix("")
    if not path.suffix:
        raise SettingsError(f"--csv {path}", "has no suffix", "a file *.csv", f"Name it {path}.csv.")
    if path.exists() or folder.exists():
        there = path if path.exists() else folder
        raise SettingsError(str(there), "is there already, perhaps filled in", "a new file", "Name another one.")
    sink, gone = io.StringIO(newline=""), 0
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(COLUMNS)
    limit = workspace.params.ingest.max_pixels
    try:
        folder.mkdir(parents=True)
        for number, one in enumerate(batch.images, 1):
            image = f"{folder.name}/{number:0{len(str(len(batch.images)))}d}-{one.sha256[:8]}.jpg"
            try:
                data = load_picture(workspace.store, workspace.name, one, PICTURE_PX, max_pixels=limit)
                (folder.parent / image).write_bytes(data)
            except VisionLoopError:
                image, gone = "", gone + 1
            model = defuse_cell(LABEL_SEPARATOR.join(one.model))
            writer.writerow([one.sha256, image, model, f"{one.confidence:.4f}", one.reason, "", ""])
        path.write_text(sink.getvalue(), encoding="utf-8")
    except OSError as exc:
        raise SettingsError(f"--csv {path}", f"cannot be written ({exc.strerror})", "a place to write to") from exc
    return gone


@dataclass(frozen=True)
class Taken:
    """What came of a CSV: answers that were stored, those that this person had given before, and rows without one."""

    num_new: int
    num_known: int
    num_empty: int


def take_sheet(workspace: Workspace, path: Path, *, by: str, allow_new: bool = False) -> Taken:
    """Read the answers of a CSV and store them as those of a person.

    Raises:
        SourceError: the file, or a row of it, is not as it should be: then nothing of it is taken.
        ObjectMissing: an image is gone.
    """
    store, name = workspace.store, workspace.name
    by, batches = check_name(by), load_batches(workspace.store, workspace.name)
    batch_of = {one.sha256: batch for batch in batches for one in batch.images}
    answers: dict[str, tuple[str, Labels]] = {}
    wrong, num_empty = list[SourceError](), 0
    for number, row in _read_rows(path):
        where = f"{path.name} row {number}"
        try:
            sha256, answer = _read_answer(where, row, batch_of, allow_new=allow_new)
            if sha256 in answers:
                raise SourceError(where, f"is of {sha256[:12]}, which an earlier row is of too", "a row for each image")
        except SourceError as exc:
            wrong.append(exc)
            continue
        if answer is None:
            num_empty += 1
        else:
            answers[sha256] = answer
    if wrong:
        first, more = wrong[0], f" And {len(wrong) - 1} more rows are wrong." if len(wrong) > 1 else ""
        raise SourceError(first.where, first.found, first.expected, f"{first.todo}{more} Nothing was taken.".strip())
    known = {
        one.asked.sha256: (one.verdict, one.labels) for one in load_opinions(store, name, batches) if one.who == by
    }
    new = {sha256: answer for sha256, answer in answers.items() if known.get(sha256) != answer}
    for batch in batches:
        mine = {sha256: answer for sha256, answer in new.items() if batch_of[sha256] is batch}
        try:
            write_answers(store, name, batch, mine, by=by, via="csv")
        except ObjectMissing as exc:
            todo = "Empty the label of this row: its image has expired or was forgotten."
            raise SourceError(path.name, f"{exc.found} ({exc.where})", "images that are still there", todo) from exc
    return Taken(len(new), len(answers) - len(new), num_empty)


def check_name(by: str) -> str:
    """Return the name of a person as it is kept. Raises SettingsError."""
    by = " ".join(by.split())
    if not by or len(by) > MAX_WHO_CHARS or not by.isprintable():
        expected = f"the name of a person, up to {MAX_WHO_CHARS} characters"
        raise SettingsError("--by", f"got {by[:40]!r}", expected, "Say --by NAME: who labelled is kept.")
    return by


def check_labels(labels: Sequence[str], batch: Batch, *, allow_new: bool) -> tuple[Labels, str, str]:
    """Return labels sorted, each once; and what is wrong with them, with what was expected: "" where nothing is."""
    kept = tuple(sorted({label.strip() for label in labels}))
    if bad := [one for one in kept if not one or not one.isprintable() or len(one) > MAX_LABEL_CHARS]:
        return kept, f"has the label {bad[0][:40]!r}", f"text of up to {MAX_LABEL_CHARS} characters"
    if any(LABEL_SEPARATOR in one for one in kept):
        return kept, f"has a label with {LABEL_SEPARATOR!r} in it", "names without it"
    if not kept:
        return kept, "has no label", "one"
    if len(kept) != 1 and batch.task != "multilabel":
        return kept, f"has {len(kept)} labels", "one"
    new = [one for one in kept if one not in batch.classes]
    if new and not allow_new:
        return kept, f"has the label {new[0]!r}", f"one of {shorten(batch.classes, 8)}"
    return kept, "", ""


def _read_answer(
    where: str, row: Mapping[str, str], batch_of: Mapping[str, Batch], *, allow_new: bool
) -> tuple[str, tuple[str, Labels] | None]:
    """Return of which image a row is, and its answer if it has one. Raises SourceError."""
    sha256, label, remark = (row.get(name, "").strip() for name in ("sha256", "label", "remark"))
    batch = batch_of.get(sha256.lower())
    if batch is None:
        todo = "Leave this column as `visionloop review --csv` wrote it."
        raise SourceError(where, f"has the sha256 {sha256[:20]!r}", "an image that was asked about", todo)
    verdict = REMARKS.get(remark.lower(), "")
    if verdict == "" or (verdict and label):
        found = f"has the remark {remark[:40]!r}" + (f" and the label {label[:40]!r}" if verdict else "")
        raise SourceError(where, found, "`not ours`, `skip`, or nothing", "Mend it.")
    if verdict:
        return sha256.lower(), (verdict, ())
    if not label:
        return sha256.lower(), None
    several = label.split(LABEL_SEPARATOR) if batch.task == "multilabel" else [label]
    labels, found, expected = check_labels(several, batch, allow_new=allow_new)
    if found:
        todo = "Mend it, or say --allow-new-classes." if expected.startswith("one of") else "Mend it."
        raise SourceError(where, found, expected, todo)
    return sha256.lower(), (LABEL, labels)


def _read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a CSV with their numbers; the header is row 1. Commas, semicolons and tabs divide. Raises
    SourceError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SourceError(path.name, "is too large", f"at most {MAX_BYTES:,} bytes", "Is it the right file?")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        found = f"cannot be read ({exc.strerror})" if isinstance(exc, OSError) else "is not UTF-8 text"
        raise SourceError(f"--take {path}", found, "the CSV of `visionloop review --csv`", "Save it as UTF-8.") from exc
    first = text.partition("\n")[0]
    divider = max(",;\t", key=first.count)
    try:
        lines = [*csv.reader(io.StringIO(text, newline=""), delimiter=divider, strict=True)]
    except csv.Error as exc:
        raise SourceError(path.name, f"is no CSV ({exc})", "rows of cells", "Export it again.") from exc
    header = [name.strip().lower() for name in lines[0]] if lines else []
    if missing := [name for name in NEEDED if name not in header]:
        found = f"has no column {missing[0]} among {shorten(header) or 'none'}"
        raise SourceError(f"{path.name} row 1", found, f"the columns {', '.join(COLUMNS)}", "Put it back.")
    rows = [(number, dict(zip(header, cells, strict=False))) for number, cells in enumerate(lines, 1) if any(cells)]
    return [(number, row) for number, row in rows if number > 1]
