"""What commands and flows tell people, as lines of at most about 110 columns. Pure: given values, it prints nothing."""

import textwrap
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from visionloop.errors import NotPromoted, VisionLoopError, format_bytes, shorten
from visionloop.records import SIDES, measure_width
from visionloop.secrets import mask

if TYPE_CHECKING:
    from pathlib import Path

    from visionloop.data.compare import Diff
    from visionloop.data.leaks import Leaks
    from visionloop.data.rows import Tally
    from visionloop.ingest.pull import PullReport
    from visionloop.records import DatasetVersion, Decision, ImageRecord, LedgerEntry, Rejected


MARKS = {True: "pass", False: "FAIL", None: "cannot tell"}
DRY = {"dry_run": " (dry run)"}  # a rule that only shows what it would say
MANY, SHOWN_OF_MANY = 12, 8
SHOWN_LEAKS = 5
SAME_REJECTED = "what could not be used is the same as last time: `visionloop datasets show` names it"
NAME_WIDTH, LINE = 32, 110


@dataclass(frozen=True)
class Summary:
    """All that is told at the end. `outcome` is promoted, unchanged, same, refused, inconclusive, waiting.

    `verdict` is that of the gate's decision: a new one, or with `unchanged` the last one, which still stands. It is
    `same` where the candidate is the champion itself.
    """

    name: str
    outcome: str
    headline: str
    dataset: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    verdict: str = ""
    rules: Sequence[Mapping[str, Any]] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    answered: Mapping[str, str] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_not_promoted(self) -> bool:
        """Say whether a candidate does not go on: refused, inconclusive or waiting, also if nothing changed since."""
        return self.verdict in ("refused", "inconclusive", "waiting")

    def rows(self) -> list[tuple[str, str]]:
        """Return the table: (what, found), top to bottom."""
        rows = [("result", self.headline)]
        if self.dataset:
            rows.append(("dataset", f"version {self.dataset['version']}, digest {str(self.dataset['digest'])[:12]}"))
        rows += [(f"candidate {n}", format_interval(m)) for n in ("accuracy", "macro_f1") if (m := self.metrics.get(n))]
        rows += self.answered.items()
        for r in self.rules:
            mark = MARKS[r["passed"]] + DRY.get(r.get("mode", ""), "")
            rows.append((f"gate: {r['rule']}", f"{mark}: {r['found']}; expected {r['expected']}"))
        if self.model:
            rows.append(("champion", f"version {self.model['version']}, bundle {str(self.model['bundle'])[:12]}"))
        elif self.verdict:
            rows.append(("champion", "none yet"))
        rows += [
            (f"asked: a {a['actual']}", f"{a['prediction']} ({a['confidence']:.1%})  {a['origin']}")
            for a in self.answers
        ]
        if self.step_seconds:
            steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in self.step_seconds.items())
            rows.append(("seconds", f"{steps}; in all {sum(self.step_seconds.values()):.1f}"))
        return rows

    def to_markdown(self) -> str:
        """Return the same as a Markdown table."""
        title = self.headline if self.name in self.headline else f"{self.name}: {self.headline}"
        lines = [f"# {title}", "", "| what | found |", "| --- | --- |"]
        lines += [f"| {what} | {found.replace('|', chr(92) + '|')} |" for what, found in self.rows()[1:]]
        lines += ["", *(f"- to {what}: `{command}`" for what, command in self.commands.items())]
        return "\n".join(lines) + "\n"


def render_summary(summary: Summary, width: int) -> str:
    """Return the table at the end and the commands to look further, for a terminal of this width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "found", box=box.SIMPLE, show_header=False, pad_edge=False)
    table.columns[0].style, table.columns[0].no_wrap, table.columns[1].overflow = "bold", True, "fold"
    told = replace(summary, rules=()) if "gate" in summary.step_seconds else summary  # the step has told them
    for row in told.rows():
        table.add_row(*row)
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join([*lines, *(f"to {what}:\n    {command}" for what, command in summary.commands.items())])


def format_interval(interval: Mapping[str, float | None]) -> str:
    """Return a figure with its interval: `0.9790 (95 %: 0.9552 to 0.9903)` or `(too few images)`."""
    bounds = "too few images" if interval["low"] is None else f"95 %: {interval['low']:.4f} to {interval['high']:.4f}"
    return f"{interval['value']:.4f} ({bounds})"


def describe_counts(version: "DatasetVersion") -> list[str]:
    """Return images per side, with the classes of each if they are few."""
    lines = []
    for side, classes in version.counts.items():
        total = f"  {side:<8} {sum(classes.values()):>9,}  "
        if len(classes) <= MANY:
            lines.append(total + ", ".join(f"{cut(name)} {count:,}" for name, count in classes.items()))
        else:
            low, high = min(classes.values()), max(classes.values())
            lines.append(f"{total}{len(classes):,} classes of {low:,} to {high:,} images")
    return lines


def describe_classes(tally: "Tally", *, everything: bool = False) -> list[str]:
    """Return a table of images per class and side; of many classes only the largest and the smallest."""
    sides, counts = [side for side in SIDES if tally.sides[side]], tally.counts
    names = sorted(counts)
    rows = [[cut(name), *(f"{counts[name][side]:,}" for side in sides), f"{counts[name].total():,}"] for name in names]
    gap = ""
    if len(rows) > 2 * MANY and not everything:
        order = sorted(range(len(rows)), key=lambda i: (-counts[names[i]].total(), names[i]))
        gap = f"... {len(rows) - 2 * SHOWN_OF_MANY:,} classes between them; --all shows every one ..."
        rows = [rows[i] for i in (*order[:SHOWN_OF_MANY], *order[-SHOWN_OF_MANY:])]
    totals = ["all", *(f"{tally.sides[side]:,}" for side in sides), f"{tally.sides.total():,}"]
    lines = align([["class", *sides, "all"], *rows, totals])
    if gap:
        lines.insert(1 + SHOWN_OF_MANY, gap)
    return [f"  {line}" for line in lines]


def describe_images(tally: "Tally") -> list[str]:
    """Return formats, sizes in pixels and bytes: smallest, median, largest."""
    num_bytes = tally.num_bytes_n
    if not (number := len(num_bytes)):
        return []
    formats = ", ".join(f"{name} {count:,}" for name, count in sorted(tally.formats.items()))
    by_area = sorted((width * height, f"{width} x {height}", count) for (width, height), count in tally.sizes.items())
    ends = list(accumulate(count for _, _, count in by_area))
    sizes = [by_area[bisect_right(ends, place)][1] for place in (0, number // 2, number - 1)]
    pixels = sizes[0] if len(set(sizes)) == 1 else "smallest {}, median {}, largest {}".format(*sizes)
    middle_two = num_bytes[(number - 1) // 2 : number // 2 + 1]
    parts = (int(num_bytes[0]), float(middle_two.mean()), int(num_bytes[-1]), int(num_bytes.sum()))
    low, middle, high, total = (format_bytes(part) for part in parts)
    return [
        f"  formats   {formats}",
        f"  pixels    {pixels}",
        f"  bytes     smallest {low}, median {middle}, largest {high}, {total} in all",
    ]


def describe_rejected(rejected: "Sequence[Rejected]", not_unusable: Iterable[str] = (), *, shown: int = 3) -> list[str]:
    """Return what was not taken in, by code, the first few of each by name."""
    by_code: dict[str, list[Rejected]] = {}
    for one in sorted(rejected, key=lambda r: (r.code, r.origin)):
        by_code.setdefault(one.code, []).append(one)
    listed = [code for code in by_code if code in set(not_unusable)]
    unusable = [code for code in by_code if code not in listed]
    lines = []
    for codes, what in ((unusable, "that cannot be used"), (listed, "listed only")):
        number = sum(len(by_code[code]) for code in codes)
        if number:
            has_rows = any(one.is_row for code in codes for one in by_code[code])
            noun = ("row" if has_rows else "file") if number == 1 else "files and rows" if has_rows else "files"
            lines.append(f"quarantined {number:,} {noun} {what}:" if codes is unusable else f"{number:,} {what}:")
        for code in codes:
            rows = by_code[code]
            lines += [
                f"  {len(rows):>5,}  {code}",
                *(f"         {line}" for r in rows[:shown] for line in _wrap(f"{r.origin}: {r.reason}")),
            ]
            if len(rows) > shown:
                lines.append(f"         and {len(rows) - shown:,} more")
    return lines


def describe_leaks(leaks: "Leaks") -> list[str]:
    """Return the leaks: those that stand loudly, what was done about the others in a line each."""
    lines = []
    if number := leaks.count("across"):
        pairs = "image that has" if number == 1 else "images that have"
        lines.append(f"LEAK: {number:,} {pairs} a near duplicate on another side, as the sources gave them:")
        for row in [row for row in leaks.rows if row.kind == "across"][:SHOWN_LEAKS]:
            left, right = (
                f"{s} {(*o, '?')[0]}" for s, o in ((row.side, row.origins), (row.other_side, row.other_origins))
            )
            lines.append(f"  {fit(f'{left}  =  {right}')}")
        if number > SHOWN_LEAKS:
            lines.append(f"  and {number - SHOWN_LEAKS:,} more")
    if number := leaks.count("excluded"):
        lines.append(f"excluded: {number:,} that would have linked two sides; they are not used")
    if number := leaks.count("conflict"):
        lines.append(f"conflicts: {number:,} that a later source puts on another side; the first side stands")
    return lines


def describe_diff(diff: "Diff") -> list[str]:
    """Return what changed between two versions."""
    lines = []
    if diff.moved:
        lines.append(f"MOVED: {len(diff.moved):,} images are on another side, which must never happen:")
        lines += [
            f"  {c.after.sha256[:12]}  {c.before.side} -> {c.after.side}  {_name(c.after)}"
            for c in diff.moved[:SHOWN_OF_MANY]
        ]
    for word, records in (("added", diff.added), ("removed", diff.removed)):
        if records:
            sides = Counter(r.side for r in records)
            text = ", ".join(f"{side} {sides[side]:,}" for side in ("train", "val", "test", "excluded") if sides[side])
            lines.append(f"{word} {len(records):,}: {text}")
    if diff.removed:
        lines += [f"  {r.sha256[:12]}  {fit(_name(r))}" for r in diff.removed[:SHOWN_OF_MANY]]
    if diff.relabelled:
        lines.append(f"relabelled {len(diff.relabelled):,}:")
        kinds = Counter((_labels(c.before), _labels(c.after)) for c in diff.relabelled)
        lines += [f"  {count:>5,}  {before} -> {after}" for (before, after), count in kinds.most_common(SHOWN_OF_MANY)]
    if diff.is_empty:
        lines.append("the same images, labels and sides")
    for what, counts in (("class", diff.classes), ("source", diff.sources)):
        lines += _describe_changes(what, counts)
    return lines


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines: the first column to the left, numbers to the right."""
    widths = [max(measure_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        gaps = [" " * (width - measure_width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + gaps[0], *(gap + cell for gap, cell in zip(gaps[1:], row[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def cut(name: str) -> str:
    """Return a name, shortened in its middle to the width of a column."""
    half = NAME_WIDTH // 2 - 1
    return name if len(name) <= NAME_WIDTH else f"{name[:half]}..{name[-half:]}"


def fit(text: str, width: int = LINE - 14) -> str:
    """Return one line of text that fits."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _wrap(text: str) -> list[str]:
    """Return a few lines that fit: the advice comes last, and is worth more than a line saved."""
    return textwrap.wrap(text, LINE - 14, max_lines=5, placeholder=" ...", subsequent_indent="  ")


def _describe_changes(what: str, counts: Mapping[str, tuple[int, int]]) -> list[str]:
    if not counts:
        return []
    order = sorted(counts, key=lambda name: (-abs(counts[name][1] - counts[name][0]), name))
    few = sorted(order[: 2 * SHOWN_OF_MANY])
    rows = [[cut(n), f"{counts[n][0]:,}", f"{counts[n][1]:,}", f"{counts[n][1] - counts[n][0]:+,}"] for n in few]
    lines = [f"  {line}" for line in align([[what, "before", "after", ""], *rows])]
    return lines + ([f"  and {len(order) - len(few):,} more that changed less"] if len(order) > len(few) else [])


def _labels(record: "ImageRecord") -> str:
    return ", ".join(cut(label) for label in record.labels) or "(unlabelled)"


def _name(record: "ImageRecord") -> str:
    return f"{_labels(record)}  {(*record.origins, '')[0]}"


def describe_error(error: VisionLoopError) -> str:
    """Return an error as one line."""
    return f"{'not promoted' if error.exit_code == 3 else 'error'}: {error}"


def make_log_progress(
    verb: str, unit: str, tell: Callable[[str], None], *, every_s: float = 3.0
) -> Callable[[int, int], None]:
    """Return a callback (done, total) that tells a line every few seconds, with the rate and the time left."""
    started = last = 0.0
    at_start = 0  # what was done before, by a run that was stopped, tells nothing of the rate

    def show(done: int, total: int) -> None:
        nonlocal started, last, at_start
        now = time.perf_counter()
        if not started:
            started = last = now
            at_start = done
        if (done < total or not total) and now - last < every_s:
            return
        last = now
        rate = (done - at_start) / max(now - started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if done < total and rate > 0 else ""
        of_all = f" of {total:,}" if total else ""
        speed = f" ({rate:,.0f}/s{left})" if now - started > 0.01 else ""  # a rate of nothing at all is none
        tell(f"{verb} {done:,}{of_all} {unit}{speed}")

    return show


def describe_decision(decision: "Decision") -> list[str]:
    """Tell a decision rule by rule."""
    from visionloop.evaluation.resampling import describe_images

    champion = decision.champion[:12] if decision.champion else "none"
    tests = describe_images(decision.num_test, decision.num_keys or decision.num_test, "test images")
    lines = [f"candidate {decision.candidate[:12]}, champion {champion}, {tests}"]
    width = max(map(len, (r.rule for r in decision.rules)), default=0)
    marks = [MARKS[r.passed] + DRY.get(r.mode, "") for r in decision.rules]
    told = (f"{r.rule:<{width}}  {r.found}; expected {r.expected}" for r in decision.rules)
    lines += [f"  {mark}  {text}" for mark, text in zip(marks, told, strict=True)]
    return [*lines, f"verdict: {decision.verdict} (decision {decision.number})"]


def describe_registered(name: str, version: str) -> str:
    """Tell which model version mirrors the candidate."""
    return f"registered as {name} version {version} in MLflow"


def describe_champion(entry: "LedgerEntry") -> str:
    """Tell who is the champion after a promotion or a rollback."""
    again, bundle, version = " again" * (entry.action == "rollback"), entry.bundle[:12], entry.model_version
    more = f"; also approved: {', '.join(entry.runtimes)}" if entry.runtimes else ""
    found = f"bundle {bundle}{again}, model version {version}, ledger entry {entry.number}{more}"
    return f"champion of {entry.name} is {found}"


def make_refusal(verdict: str, rules: Iterable[Mapping[str, Any]], *, again: bool = False) -> NotPromoted:
    """Return the error of a candidate that is not promoted: refused, inconclusive or waiting, and by which rules.

    `again`: it is the verdict of an earlier run, and nothing has changed since.
    """
    from visionloop.promotion.advice import list_advice
    from visionloop.promotion.gate import find_held

    held = find_held(verdict, rules)
    others = f", and by {shorten([rule['rule'] for rule in held[1:]])}" if held[1:] else ""
    named = f" by the rule {held[0]['rule']} ({held[0]['found']}){others}" if held else ""
    todo = "See decisions/latest.json and decisions/latest.html."
    todo = " ".join([*(list_advice(held) if verdict == "inconclusive" else ()), todo])
    if again and verdict != "waiting":  # what it waits for is in the rule
        todo = f"Add images or change params.yaml, then retrain. {todo}"
    return NotPromoted("gate", f"the candidate is {'still ' * again}{verdict}{named}", "a passed gate", todo)


def describe_mlflow(uri: str, home: "Path", here: "Path", command: str = "visionloop") -> str:
    """Tell how to look at the runs: the command that shows an SQLite file, or the server without its password."""
    if not uri.startswith("sqlite:///"):
        return mask(uri)
    return f"{'' if home == here else f'cd {home} && '}{command} ui"


def shorten_path(path: "Path | str", home: "Path", here: "Path") -> str:
    """Return a path as one would type it: relative to the workspace if one is there, else as it is."""
    return str(path).removeprefix(f"{home}/") if here == home else str(path)


def describe_pull(report: "PullReport") -> list[str]:
    """Tell what a pull brought, in a few lines."""
    from visionloop.data.manifest import NOT_UNUSABLE
    from visionloop.ingest.labels import describe_twins

    version = report.version
    if report.changed:
        out = f", {report.num_taken_out:,} taken out" if report.num_taken_out else ""
        what = f"{report.num_added:,} new images{out}" if report.num_added or out else "no new image, other labels"
    else:
        what = "no new image, new places of known ones" if report.recorded else "nothing new"
    lines = [f"dataset {version.name} version {version.version}: {what}, {version.num_images:,} in all"]
    if report.pin.version != version.version:
        lines.append(f"the pin stays at version {report.pin.version}, which holds the same images: no stage runs again")
    lines += describe_counts(version) if report.changed else []
    lines += [f"note: {note}" for note in report.notes]
    if version.left_out:
        names = shorten(version.left_out)
        lines.append(f"left out: {names}, with fewer images than ingest.expect.min_per_class; with more they come back")
    lines += [SAME_REJECTED] if report.has_same_rejected else describe_rejected(report.rejected, NOT_UNUSABLE)
    lines += [*report.remarks, report.account.describe(), *describe_twins(version.classes)]
    if version.num_leaks:
        what = "near duplicate or conflict" if version.num_leaks == 1 else "near duplicates or conflicts"
        lines.append(f"LEAK: {version.num_leaks:,} {what} between sides; see `visionloop datasets show`")
    return lines
