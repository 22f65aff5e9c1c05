"""Watches one window: reads the log, judges, and writes what came out. Says where it is stored, too.

    monitoring/NAME/20261128T0000/verdict.json      the record (judge.Verdict); written last: without it nothing counts
                                  checks.parquet    a row for each check
                                  classes.parquet   the shares of the classes, before and now
                                  images.parquet    the images least like the reference, the farthest first
                                  report.html
                                  accepted.json     who took an alarm for normal, and why
                                  unsent.json       its alert is still to be sent to the webhook (alert.py)

Who reads verdicts alone (`visionloop metrics` beside a server) needs nothing that makes pages.

The first accepted windows of a model are its reference, and with them the newest. Before there are any it is the
validation side. A window that gave an alarm of drift or was broken is not accepted, unless a person accepts it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionloop.bundle import download_bundle
from visionloop.data.prediction_log import read_requests
from visionloop.errors import DatasetError, ObjectMissing, VisionLoopError
from visionloop.monitoring.collect import Log, Rows, filter_model, join_rows, load_known
from visionloop.monitoring.health import Check, check_colours, check_model, check_requests, check_traffic
from visionloop.monitoring.judge import Facts, Judged, Verdict, judge_window
from visionloop.monitoring.window import Span, find_last_span, is_window, make_traffic
from visionloop.promotion.ledger import iterate_history, require_entry
from visionloop.records import LedgerEntry, canonical_json
from visionloop.workfolder import write_file
from visionloop.workspace import Workspace

if TYPE_CHECKING:
    import pyarrow as pa

CAUGHT_UP = 14  # missed windows that are judged unasked
LOOK_BACK = 90  # windows before it whose verdicts are read at most, for the reference and the usual volume
VOLUMES = 14
UNSENT = "unsent.json"


def watch_window(
    workspace: Workspace, *, now: datetime, at: datetime | None = None, again: bool = False
) -> tuple[Verdict, bool]:
    """Judge the last window that is over, or the one that `at` lies in; return its stored verdict, and if it is new.

    A window that was judged already is not judged anew, unless `again`.

    Raises:
        PromotionError: there is no champion.
        StoreError, BundleError: the store cannot be read, or the champion's bundle is damaged.
    """
    hours = workspace.params.monitor.window_hours
    span = find_last_span(now if at is None else at + timedelta(hours=hours), hours)
    if span.end > now:
        found, todo = f"ends at {span.end.isoformat()}, which is to come", "Wait, or name an earlier time."
        raise DatasetError(f"window {span.name}", found, "a window that is over", todo)
    known = None if again else load_verdict(workspace, span.name)
    if known is not None and known.span == span:  # after a change of `window_hours` a longer one may have the name
        return known, False
    return _Watch(workspace, span, now).run(), True


def find_missed(workspace: Workspace, *, now: datetime, everything: bool = False) -> tuple[list[datetime], int]:
    """Return the starts of the windows that nobody has judged between the last one that was and the last one over.

    The oldest first, at most the newest CAUGHT_UP, and how many are left out; `everything`: all of them, and earlier
    gaps. Windows whose rows have expired are none: they would look empty. Raises as `watch_window`.
    """
    span, names = find_last_span(now, workspace.params.monitor.window_hours), list_windows(workspace)
    log_start = Log(workspace, "").find_start()
    missed, gap = list[datetime](), list[datetime]()  # the newest first; a gap counts if a judged window is before it
    while names and names[0] < span.name:
        span = Span(span.start - span.length, span.start)
        if _is_judged(workspace, span, names):
            missed, gap = [*missed, *gap], []
            if not everything:
                break
        elif span.end > log_start:
            gap.append(span.start)
    kept = missed if everything else missed[:CAUGHT_UP]
    return kept[::-1], len(missed) - len(kept)


def _is_judged(workspace: Workspace, span: Span, names: Sequence[str]) -> bool:
    """Say whether a window has a verdict; after a change of `window_hours` another one may have its name."""
    known = load_verdict(workspace, span.name) if span.name in names else None
    return known is not None and known.span == span


def list_windows(workspace: Workspace) -> list[str]:
    """Return the names of the windows that something is stored of, in order of time."""
    prefix = f"{_folder(workspace)}/"
    names = {key.removeprefix(prefix).partition("/")[0] for key in workspace.store.list(prefix)}
    return sorted(name for name in names if is_window(name))


def load_verdict(workspace: Workspace, window: str) -> Verdict | None:
    """Return the verdict of a window; None: it was not judged. Raises DatasetError."""
    key = f"{_folder(workspace)}/{window}/verdict.json"
    try:
        verdict = Verdict.from_json(json.loads(workspace.store.get(key)))
        if None in (verdict.span.start.tzinfo, verdict.span.end.tzinfo):
            raise ValueError("times without a zone")
        [check["kind"] for check in verdict.list_alerts()]
        return verdict
    except ObjectMissing:
        return None
    except (ValueError, TypeError, AttributeError, KeyError) as exc:
        todo = "Remove it, and judge the window again."
        raise DatasetError(f"store object {key}", "is damaged", "a verdict", todo) from exc


def accept_window(workspace: Workspace, window: str, *, by: str, why: str, now: str) -> Verdict:
    """Take a window for normal: later ones are compared with it too. Raises DatasetError: it was not judged."""
    verdict = load_verdict(workspace, window)
    if verdict is None:
        raise DatasetError(f"window {window}", "was not judged", "a judged one", "Run `visionloop monitor` first.")
    record = canonical_json({"by": by, "why": why, "at": now})
    workspace.store.put(f"{_folder(workspace)}/{window}/accepted.json", record)
    workspace.store.delete(make_unsent_key(workspace, window))
    return verdict


def list_unsent(workspace: Workspace) -> list[str]:
    """Return the windows whose alert is still to be sent, the oldest first."""
    prefix = f"{_folder(workspace)}/"
    parts = (key.removeprefix(prefix).split("/") for key in workspace.store.list(prefix))
    return sorted(part[0] for part in parts if part[1:] == [UNSENT] and is_window(part[0]))


def make_unsent_key(workspace: Workspace, window: str) -> str:
    """Return the key of the object that stands for an alert that is still to be sent."""
    return f"{_folder(workspace)}/{window}/{UNSENT}"


def write_copies(workspace: Workspace, verdict: Verdict) -> Path | None:
    """Copy the report of a window into the workspace; return its path.

    None: it is gone from the store, because one of its images was forgotten.
    """
    folder = workspace.settings.home / "monitoring"
    try:
        page = workspace.store.get(f"{_folder(workspace)}/{verdict.window}/report.html")
    except ObjectMissing:
        return None
    for name in (f"{verdict.window}.html", "latest.html"):
        write_file(folder / name, page)
    return folder / f"{verdict.window}.html"


def _folder(workspace: Workspace) -> str:
    return f"monitoring/{workspace.name}"


class _Watch:
    """One window of one workspace, from the log to its verdict."""

    def __init__(self, workspace: Workspace, span: Span, now: datetime) -> None:
        self.workspace, self.span, self.now = workspace, span, now
        self.section = workspace.params.monitor
        self.entry = _find_champion(workspace, span)
        self.log = Log(workspace, self.entry.bundle)
        self.log_start = self.log.find_start()

    def run(self) -> Verdict:
        bundle = download_bundle(
            self.workspace.store, self.entry.bundle, self.workspace.settings.hidden_dir / "bundles"
        )
        known = load_known(bundle)
        table = self.log.read(self.span)
        own = filter_model(table, self.entry.bundle)
        before = self._load_past()
        windows = self._choose_reference(before)
        rows = self.log.sample(self.span, own)
        others = [self.log.sample(one) for one in windows]
        reference = join_rows(others)
        facts = Facts(
            num_images=len(own),
            sample=self.log.to_sample(rows, known),
            known=known,
            reference=self.log.to_sample(reference, known) if reference and len(reference.table) else None,
            checks=self._check(table, own, reference, before),
            labelled=self.log.compare_labels(self.span.end, known.classes),
            seed=int(self.span.start.timestamp()) // 3600,
        )
        judged = judge_window(facts, self.section)
        verdict = self._make_verdict(judged, facts, [one.name for one in windows])
        self._write(verdict, judged, facts, rows)
        return verdict

    def _load_past(self) -> list[Verdict]:
        """Return the verdicts of the windows before this one, the oldest first: those of this model, and the newest.

        The first that count are those whose rows are still in the log.
        """
        names = [name for name in list_windows(self.workspace) if name < self.span.name]
        since = max(datetime.fromisoformat(self.entry.at).astimezone(UTC), self.log_start)
        first = [name for name in names if name >= Span(since, since).name][:LOOK_BACK]
        found = [load_verdict(self.workspace, name) for name in sorted({*first, *names[-LOOK_BACK:]})]
        return [one for one in found if one is not None]

    def _choose_reference(self, before: Sequence[Verdict]) -> list[Span]:
        """Return the first accepted windows of this model, and the newest: at most as many again."""
        own = [one for one in before if one.bundle == self.entry.bundle and one.span.end > self.log_start]
        accepted = [one for one in own if self._is_accepted(one)]
        most = self.section.reference_windows
        chosen = accepted if len(accepted) <= 2 * most else [*accepted[:most], *accepted[-most:]]
        return [one.span for one in chosen]

    def _is_accepted(self, verdict: Verdict) -> bool:
        if verdict.verdict not in ("broken", "drift"):
            return verdict.num_looked_at >= self.section.min_images
        return self.workspace.store.exists(f"{_folder(self.workspace)}/{verdict.window}/accepted.json")

    def _check(
        self, table: "pa.Table", own: "pa.Table", reference: Rows | None, before: Sequence[Verdict]
    ) -> list[Check]:
        usual = make_traffic(reference.table) if reference and len(reference.table) else None
        begun = list(dropwhile(lambda one: not one.num_images, before))  # no window before it says what is usual
        volumes = [one.num_images for one in begun if one.span.length == self.span.length][-VOLUMES:]
        has_begun = bool(begun) or self.log.has_rows_before(self.span.end)
        checks = check_traffic(make_traffic(table), usual, volumes, self.section, has_begun=has_begun)
        if self.log.damaged:
            found = f"{len(self.log.damaged):,} parts of the log are damaged: {sorted(self.log.damaged)[0]}"
            checks.append(Check("log", "broken", "alert", found, "parts in Parquet"))
        if len(table):
            colours = [
                self.log.measure_colours(one) for one in (own, reference.table if reference else own.slice(0, 0))
            ]
            checks.append(check_colours(colours[0], colours[1]))
        counts = read_requests(self.workspace.store, self.workspace.name, self.span.start, self.span.end)
        checks += check_requests(counts, self.section, has_images=len(table) > 0)
        return [*checks, *self._check_model(len(own), len(table) - len(own))]

    def _check_model(self, served: int, others: int) -> list[Check]:
        alias, problem = None, ""
        if self.span != find_last_span(self.now, self.section.window_hours):
            problem = "not looked at: it is that of now, and this is not the last window"
        else:
            try:
                alias = self.workspace.tracking.get_champion()
            except VisionLoopError as exc:
                problem = f"MLflow does not answer: {exc.found}"
        newest = require_entry(self.workspace.store, self.workspace.name)
        return check_model(
            age_days=(self.span.end - datetime.fromisoformat(self.entry.at)).total_seconds() / 86_400,
            max_age_days=self.section.max_model_age_days,
            served=served,
            others=others if datetime.fromisoformat(self.entry.at) < self.span.start else 0,
            version=newest.model_version,
            alias=alias,
            alias_problem=problem,
        )

    def _make_verdict(self, judged: Judged, facts: Facts, windows: Sequence[str]) -> Verdict:
        labelled = facts.labelled.accuracy
        return Verdict(
            name=self.workspace.name,
            window=self.span.name,
            start=self.span.start.isoformat(),
            end=self.span.end.isoformat(),
            verdict=judged.verdict,
            bundle=self.entry.bundle,
            entry=self.entry.number,
            num_images=facts.num_images,
            num_looked_at=len(facts.sample),
            reference=tuple(windows),
            p=judged.drift.p if judged.drift else None,
            level=self.section.level,
            expected_accuracy=judged.expected.value if judged.expected else None,
            expected_is_trusted=judged.trusted,
            labelled_accuracy=labelled.to_json() if labelled else None,
            num_labels=facts.labelled.num_labels,
            checks=tuple(asdict(check) for check in judged.checks),
            judged_at=self.now.isoformat(timespec="seconds"),
            damaged=tuple(sorted(self.log.damaged)),
        )

    def _write(self, verdict: Verdict, judged: Judged, facts: Facts, rows: Rows) -> None:
        """Write all that came out; the verdict last."""
        from visionloop.monitoring.report import Page, make_monitor_report
        from visionloop.promotion.drawings import PICTURE_PX, encode_picture

        farthest = [_tell_image(rows.table, row, distance) for row, distance in judged.farthest]
        pictures = {
            one["image_sha256"]: encode_picture(picture)
            for one, (row, _) in zip(farthest, judged.farthest, strict=True)
            if (picture := self.log.open_kept(rows.table, row, PICTURE_PX)) is not None
        }
        shares = [
            {"name": one.name, "before": one.before, **{k: getattr(one.now, k) for k in ("value", "low", "high")}}
            for one in judged.shares
        ]
        page = Page(verdict, judged.shares, farthest, pictures, judged.expected, facts.labelled)
        folder, store = f"{_folder(self.workspace)}/{self.span.name}", self.workspace.store
        store.put(f"{folder}/checks.parquet", _encode(verdict.checks))
        store.put(f"{folder}/classes.parquet", _encode(shares))
        store.put(f"{folder}/images.parquet", _encode(farthest))
        store.put(f"{folder}/report.html", make_monitor_report(page).encode())
        if verdict.is_alert and self.section.webhook:  # before the verdict: whoever finds that one has its alert too
            store.put(make_unsent_key(self.workspace, self.span.name), b"{}")
        store.put(f"{folder}/verdict.json", canonical_json(verdict.to_json()))


def _find_champion(workspace: Workspace, span: Span) -> LedgerEntry:
    """Return the entry that was the champion's when the window ended; before the first one, that of now.

    Raises:
        PromotionError: there is no champion at all.
    """
    for entry in iterate_history(workspace.store, workspace.name):
        if datetime.fromisoformat(entry.at) < span.end:
            return entry
    return require_entry(workspace.store, workspace.name)


def _tell_image(table: "pa.Table", row: int, distance: float) -> dict[str, Any]:
    names = ("request_id", "time", "client", "image_sha256", "prediction", "confidence", "abstained")
    return {**{name: table[name][row].as_py() for name in names}, "distance": distance}


def _encode(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())
