"""Labels as the dataset holds them: renamed by `ingest.label_map`, corrected by `ingest.corrections`, one per image.

Pure. The same rules hold for what a pull brings and for the rows of earlier versions, so that a later pull of the same
files finds nothing new.

sha256,old,new          the sha256, or its first eight digits or more; the label it has; the label it should have
3f786850,cat,dog        empty `old`: it has no label yet; empty `new`: the label is taken away

A line whose correction was made may stay in the file; it changes nothing then.
"""

import csv
import io
import json
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

from visionloop.errors import ParamsError, SourceError, shorten
from visionloop.ingest.inspect import Inspected
from visionloop.ingest.paths.names import find_twins
from visionloop.params import Params
from visionloop.records import Rejected

COLUMNS = ("sha256", "old", "new")
MIN_DIGITS = 8
SHOWN_DIGITS = 12
MAX_BYTES = 100_000_000
SHOWN_TWINS = 8
Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Correction:
    """One line: an image by its sha256 or the beginning of it, and its label before and after (empty: none)."""

    line: int
    sha256: str
    old: str
    new: str

    def fits(self, labels: Labels, *, several: bool) -> bool:
        """Say whether an image with these labels may be meant: as it was, or corrected already."""
        if several:
            is_done = self.new in labels if self.new else self.old not in labels
            return not self.old or self.old in labels or is_done
        return labels in (_to_labels(self.old), _to_labels(self.new))

    def apply(self, labels: Labels, *, several: bool) -> Labels:
        """Return the labels after the correction; others than `old` are left alone."""
        if several:
            if self.old and self.old not in labels:
                return labels
            return tuple(sorted({*labels, self.new} - {self.old, ""}))
        return _to_labels(self.new) if labels == _to_labels(self.old) else labels


def load_corrections(path: Path) -> list[Correction]:
    """Read the file.

    Raises:
        SourceError: it is missing, no CSV with these columns, or a line names no image; the message names the line.
    """
    where = path.name
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SourceError(where, "is too large", f"at most {MAX_BYTES} bytes", "Split it.")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        found = "is not UTF-8 text" if isinstance(exc, UnicodeDecodeError) else f"cannot be read ({exc.strerror})"
        todo = "Check ingest.corrections in params.yaml."
        raise SourceError(where, found, f"a CSV with the columns {', '.join(COLUMNS)}", todo) from exc
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if missing := {*COLUMNS} - {*header}:
            found = f"has no column {shorten([*missing])} among {shorten(header) or 'none'}"
            raise SourceError(f"{where} line 1", found, ", ".join(COLUMNS), "Name them in the first line.")
        places = [header.index(name) for name in COLUMNS]
        return [_read_line(f"{where} line {rows.line_num}", rows.line_num, row, places, header) for row in rows if row]
    except csv.Error as exc:
        raise SourceError(f"{where} line {rows.line_num}", f"is no CSV ({exc})", "cells between commas") from exc


def match_corrections(
    corrections: Sequence[Correction],
    labels_of: Mapping[str, Iterable[Labels]],
    passed: frozenset[str],
    *,
    several: bool,
) -> dict[str, list[Correction]]:
    """Return the corrections by full sha256. `labels_of` gives all labels under which an image is known or offered.

    `several`: an image may have several labels, and several corrections. Lines of `passed` images change nothing:
    these were forgotten, or taken out of the dataset.

    Raises:
        SourceError: a line fits no image, several images, or an image with another label, or an image is named twice.
    """
    known = sorted({*labels_of, *passed})
    matched: dict[str, list[Correction]] = {}
    wrong: list[str] = []
    for one in corrections:
        place = bisect_left(known, one.sha256)
        same = [sha256 for sha256 in known[place : place + 2] if sha256.startswith(one.sha256)]
        if len(same) != 1:
            found = f"{len(same)} images begin with" if same else "no image has"
            wrong.append(f"line {one.line}: {found} {one.sha256[:16]}")
        elif same[0] not in passed:
            earlier = matched.setdefault(same[0], [])
            if problem := _find_problem(one, earlier, labels_of[same[0]], several):
                wrong.append(f"line {one.line}: {problem}")
            earlier.append(one)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise SourceError(
            "ingest.corrections", "; ".join(wrong[:5]) + more, "lines that fit the dataset", "Mend or remove them."
        )
    return matched


def _find_problem(one: Correction, earlier: Sequence[Correction], labels: Iterable[Labels], several: bool) -> str:
    for other in earlier:
        if not several or other.old == one.old:
            return f"{one.sha256[:16]} is corrected in line {other.line} already"
    if not any(one.fits(each, several=several) for each in labels):
        names = shorten([label for each in labels for label in each]) or "none"
        return f"{one.sha256[:16]} has the label {names}, not {one.old or 'none'}"
    return ""


def _read_line(where: str, line: int, row: Sequence[str], places: Sequence[int], header: Sequence[str]) -> Correction:
    if len(row) != len(header):
        raise SourceError(where, f"has {len(row)} cells", f"{len(header)}, as line 1", "Quote a label with a comma.")
    sha256, old, new = (normalize("NFC", row[place].strip()) for place in places)
    if not re.fullmatch(rf"[0-9a-fA-F]{{{MIN_DIGITS},64}}", sha256):
        raise SourceError(where, f"has the sha256 {sha256[:70]!r}", f"{MIN_DIGITS} to 64 hexadecimal digits")
    if old == new:
        raise SourceError(where, f"changes {old or 'no label'!r} to itself", "two labels that differ")
    return Correction(line, sha256.lower(), old, new)


def format_correction(sha256: str, old: Labels, new: Labels) -> str:
    """Return the line that gives an image another label: `3f786850e387,cat,dog`."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="").writerow([sha256[:SHOWN_DIGITS], "".join(old[:1]), "".join(new[:1])])
    return sink.getvalue()


def _to_labels(label: str) -> Labels:
    return (label,) if label else ()


@dataclass(frozen=True)
class LabelRules:
    """How labels are changed before they enter the dataset. `several`: an image may have more than one.

    `answers`: by sha256 what people said of an image, which counts more than what its sources say. Corrections are made
    after it.
    """

    label_map: Mapping[str, str] = field(default_factory=dict)
    corrections: Sequence[Correction] = ()
    several: bool = False
    answers: Mapping[str, Labels] = field(default_factory=dict)

    def rename(self, labels: Labels) -> Labels:
        """Apply the label map; labels are in NFC, several are sorted, each once."""
        if not all(map(str.isascii, labels)):
            labels = tuple(normalize("NFC", label) for label in labels)
        if not self.label_map and len(labels) <= 1:
            return labels
        if len(labels) == 1:
            return (self.label_map.get(labels[0], labels[0]),)
        return tuple(sorted({self.label_map.get(label, label) for label in labels}))


def make_label_rules(
    params: Params, corrections: Sequence[Correction], answers: Mapping[str, Labels] | None = None
) -> LabelRules:
    """Return the rules of params.yaml.

    Raises:
        ParamsError: the label map renames a to b and b to c: the result would depend on the order.
    """
    pairs = {normalize("NFC", old): normalize("NFC", new) for old, new in params.ingest.label_map.items()}
    label_map = {old: new for old, new in pairs.items() if old != new}
    if chained := set(label_map) & set(label_map.values()):
        raise ParamsError(
            "params.yaml ingest.label_map",
            f"renames {shorten([*chained])}, and others to it",
            "names that stay, on the right side",
            "Write the last name at once; to swap two names, use `corrections`.",
        )
    return LabelRules(label_map, corrections, params.task == "multilabel", answers or {})


def find_refusal(rules: LabelRules, one: Inspected, forgotten: Collection[str]) -> Rejected | None:
    """Say why a usable file is not taken in; None: it is."""
    if one.sha256 in forgotten:
        return Rejected(one.origin, "forgotten", "was forgotten on purpose, and is not taken in again")
    if len(one.labels) > 1 and not rules.several and len(labels := rules.rename(one.labels)) > 1:
        found = f"has the labels {shorten(list(labels))}; expected one, or `task: multilabel`"
        return Rejected(one.origin, "several_labels", found)
    return None


class Relabelling:
    """Label map, answers and corrections, for one image after the other; in the end, what lines fit no image.

    Images that are `aside` were taken out of the dataset; their corrections wait until they come again.
    """

    def __init__(self, rules: LabelRules, forgotten: Collection[str], aside: Collection[str]) -> None:
        self._rules = rules
        self._lines: dict[str, list[Correction]] = {}
        for line in rules.corrections:
            self._lines.setdefault(line.sha256[:MIN_DIGITS], []).append(line)
        # Of images that a line may mean: all labels under which each is known or offered.
        self._labels_of: dict[str, list[Labels]] = {}
        self._forgotten, self._aside = (
            frozenset(sha256 for sha256 in some if sha256[:MIN_DIGITS] in self._lines) for some in (forgotten, aside)
        )

    def apply(self, sha256: str, known: Labels | None, offered: Sequence[Labels]) -> tuple[Labels | None, list[Labels]]:
        """Return the labels that the dataset has for an image (None: it has none of it), and those of its offers."""
        known, offered = known if known is None else self._rules.rename(known), [*map(self._rules.rename, offered)]
        if sha256 in self._rules.answers:
            said = self._rules.rename(self._rules.answers[sha256])
            known, offered = known if known is None else said, [said] * len(offered)
        lines = self._lines.get(sha256[:MIN_DIGITS], ())
        if lines and (known is not None or offered):
            self._labels_of[sha256] = [*([] if known is None else [known]), *offered]
            if sha256 not in self._forgotten:
                lines = [line for line in lines if sha256.startswith(line.sha256)]
                known = known if known is None else self._correct(lines, known)
                offered = [self._correct(lines, labels) for labels in offered]
        return known, offered

    def finish(self) -> None:
        """Raise SourceError if a correction fits no image; called when all images were seen."""
        passed = self._forgotten | (self._aside - self._labels_of.keys())
        match_corrections(self._rules.corrections, self._labels_of, passed, several=self._rules.several)

    def _correct(self, lines: Sequence[Correction], labels: Labels) -> Labels:
        for line in lines:
            labels = line.apply(labels, several=self._rules.several)
        return labels


def unite_labels(known: Labels, offered: Iterable[Labels], *, several: bool) -> Labels | None:
    """Return the labels of one image; a label wins over no label. None: two labels where one is allowed."""
    offered = [*offered]
    if all(labels == known for labels in offered):
        return known
    everything = tuple(sorted({label for labels in (known, *offered) for label in labels}))
    everything = next((labels for labels in offered if labels == everything), everything)  # held once
    return everything if several or len(everything) <= 1 else None


def describe_twins(classes: Iterable[str]) -> list[str]:
    """Return a line for each group of twins, with what unites them in params.yaml."""
    lines = []
    for names in find_twins(classes)[:SHOWN_TWINS]:
        kept, *others = names
        pairs = ", ".join(f"{json.dumps(name)}: {json.dumps(kept)}" for name in others)  # JSON is YAML
        shown = " and ".join(map(repr, sorted(names)))
        lines.append(f"TWINS: {shown} may be one class; if so: ingest.label_map: {{{pairs}}}")
    return lines
