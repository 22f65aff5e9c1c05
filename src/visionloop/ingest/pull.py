"""Pull images from sources into a new dataset version. Resumable: what is stored is not read or stored again.

Nothing is visible before the version's commit object is written; of two pulls at once, the later adds to the other.
"""

import gc
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from types import MappingProxyType

import numpy as np

from visionloop import __version__
from visionloop.data.acceptance import SOURCE_KINDS, describe_unread, load_answered
from visionloop.data.known_store import check_store_for_pull, require_restored
from visionloop.data.manifest import (
    IS_TAKEN,
    NOT_UNUSABLE,
    latest_version,
    load_pin,
    make_image_key,
    make_pin,
    write_pin,
)
from visionloop.data.parts import commit_version
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import DatasetError, SourceError, shorten
from visionloop.ingest.check import Checked, Known, check_all
from visionloop.ingest.journal import Journal, LastPull, make_journal_path
from visionloop.ingest.labels import Correction, Labels, load_corrections
from visionloop.ingest.merge import merge
from visionloop.ingest.moves import Wishes, list_whole, say_option
from visionloop.ingest.sources import Cursor, Item, PassedOver, SourceContext, read_source
from visionloop.params import Params, Source
from visionloop.records import DatasetVersion, Pin, Rejected, compute_digest
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.workspace import Workspace

COMMIT_TRIES = 20
SAMPLE = 64
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Account:
    """What became of every file: it is in exactly one of the first four. `rows`: what leads to no file, by code."""

    taken: int
    quarantined: int
    listed: int
    passed_over: int
    rows: Mapping[str, int]

    @property
    def num_files(self) -> int:
        """All files that were seen."""
        return self.taken + self.quarantined + self.listed + self.passed_over

    def describe(self) -> str:
        """Return the sum in one line; rows that lead to no file come last."""
        parts = {"quarantined": self.quarantined, "listed": self.listed, "passed over": self.passed_over}
        shown = "".join(f", {number:,} {what}" for what, number in parts.items() if number)
        rows = ", ".join(f"{number:,} {code}" for code, number in self.rows.items())
        line = f"sum: {self.num_files:,} {'file' if self.num_files == 1 else 'files'} = {self.taken:,} taken{shown}"
        return f"{line}; and rows: {rows}" if rows else line


def make_account(checked: Checked, rejected: Sequence[Rejected]) -> Account:
    """Return what became of the files of a pull. A place that is both taken and rejected counts as rejected."""
    refused = {one.origin: one.code for one in rejected if not one.is_row and one.code != IS_TAKEN}
    listed = sum(code in NOT_UNUSABLE for code in refused.values())
    rows = Counter(one.code for one in rejected if one.is_row)
    rows.update(checked.more_rows)
    taken = checked.num_places - len(refused)
    return Account(taken, len(refused) - listed, listed, checked.num_passed_over, dict(sorted(rows.items())))


@dataclass(frozen=True)
class PullReport:
    """The result of a pull. `changed` is False when the dataset is as before.

    A version that only tells of other places of known images is `recorded`, but changes nothing: the pin stays.
    `num_read` of the `num_seen` images were read; the others were known from an earlier pull.
    """

    pin: Pin
    version: DatasetVersion
    changed: bool
    recorded: bool
    num_seen: int
    num_read: int
    num_added: int
    rejected: tuple[Rejected, ...]
    account: Account
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    num_taken_out: int = 0
    has_same_rejected: bool = False


@dataclass(frozen=True)
class _Ended:
    """How a pull ended: the version, the one before (the same when nothing changed), and all that was refused."""

    parent: DatasetVersion | None
    version: DatasetVersion
    rejected: tuple[Rejected, ...]
    remarks: tuple[str, ...]
    notes: tuple[str, ...] = ()


def pull(
    workspace: Workspace,
    *,
    sources: Sequence[Source],
    now: str,
    env: Mapping[str, str] = MappingProxyType({}),
    tell: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    verify: bool = False,
    allow_new_classes: bool = False,
    relabel: bool = False,
    prune: bool = False,
) -> PullReport:
    """Read sources, quarantine what is unusable, commit a version if anything is new, and pin it in the workspace.

    `relabel` gives known images the labels that their sources give now; `prune` takes out what is no longer there.
    With `verify` the journal and the cursors are not used: everything is read, and what is missing or damaged in the
    store is stored again. `on_progress(done, 0)` while the total is not known.

    Raises:
        SourceError: a source is missing or empty, too many files are unusable, or `merge` refuses the result.
        ParamsError: the split differs from the one that version 1 fixed.
        StoreError: the store cannot be read or written, or is not the one that the workspace knows.
    """
    lost = check_store_for_pull(workspace)
    settings, params, store, name = workspace.settings, workspace.params, workspace.store, workspace.name
    with _rare_collections(), closing(Journal(make_journal_path(settings), store.url, params.ingest)) as journal:
        context, answers = _make_context(workspace, env, tell, sources)
        corrections = load_corrections(context.resolve(path)) if (path := params.ingest.corrections) else []
        before, last = latest_version(store, name), journal.load_pull(name)
        if not sources:
            tell("params.yaml names no source: no image is read; label_map, corrections and limits are applied")
        _tell_older_pin(settings, before, tell)
        if last and not (before and last.version == _name_version(before)):
            last = None
        forgotten = load_tombstones(store, name)
        asked = _digest_asked(params, forgotten, sources, corrections, answers)
        cursors = {} if verify else {**(before.cursors if before else {}), **(last.cursors if last else {})}
        offered = _read_all(sources, context, cursors)
        offers = last.offers if last and last.asked == asked and not (relabel or prune) else None
        # Not held beyond this: it has the digest of each image in the store.
        known = [Known(journal, None if verify else find_stored(store, journal, forgotten), offers, verify, forgotten)]
        checked = check_all(offered, store, params.ingest, known.pop(), on_progress)
        checked = replace(checked, cursors={**cursors, **checked.cursors})
        _tell_found(workspace, checked, tell)
        if before and last and checked.is_as_before:
            ended = _Ended(before, before, last.rejected, last.remarks)
        else:
            say = _say_declared if [*sources] == [*params.ingest.sources] else say_option
            wishes = Wishes(allow_new_classes, relabel, prune, list_whole(sources), say, answers)
            ended = _commit(workspace, checked, corrections, now, wishes, lost=lost)
        _sync(journal, store, ended)
        version = _name_version(ended.version)
        last = LastPull(asked, checked.offers or "", version, ended.rejected, checked.cursors, ended.remarks)
        journal.keep_pull(name, last)
        return _make_report(checked, ended, move_pin(settings, ended.version))


def _make_context(
    workspace: Workspace, env: Mapping[str, str], tell: Callable[[str], None], sources: Sequence[Source]
) -> tuple[SourceContext, Mapping[str, Labels]]:
    """Return what sources are given; and the labels that people gave, which hold for a one-time pull too."""
    settings, params = workspace.settings, workspace.params
    several, kinds = params.task == "multilabel", {one.kind for one in (*sources, *params.ingest.sources)}
    is_asked = bool(kinds & SOURCE_KINDS.keys())
    answered = load_answered(workspace.store, workspace.name, params.review) if is_asked else None
    answers = {one.sha256: one.labels for one in answered.choose(kinds)} if answered else {}
    context = SourceContext(
        settings.home, settings.hidden_dir, env, params.ingest, tell=tell, several=several, answered=answered
    )
    return context, answers


def _tell_found(workspace: Workspace, checked: Checked, tell: Callable[[str], None]) -> None:
    """Tell which images were missing in the store, and which accepted labels no source takes."""
    if number := checked.num_missing:
        tell(f"{number:,} images were missing from the store: stored again")
    kinds = [one.kind for one in workspace.params.ingest.sources]
    for line in describe_unread(workspace.store, workspace.name, workspace.params.review, kinds):
        tell(line)


def _make_report(checked: Checked, ended: "_Ended", pin: Pin) -> PullReport:
    version, parent = ended.version, ended.parent
    num_added = version.num_added if version is not parent else 0
    num_before = parent.num_images if parent else 0
    return PullReport(
        pin=pin,
        version=version,
        changed=parent is None or version.digest != parent.digest,
        recorded=version is not parent,
        num_seen=checked.num_seen,
        num_read=checked.num_read,
        num_added=num_added,
        rejected=ended.rejected,
        account=make_account(checked, ended.rejected),
        notes=ended.notes,
        remarks=ended.remarks,
        num_taken_out=num_before + num_added - version.num_images,
        has_same_rejected=checked.is_as_before and version is parent and bool(ended.rejected),
    )


def check_sources(params: Params, store: ObjectStore | None = None, *, verify: bool = False) -> Sequence[Source]:
    """Return the declared sources: none where `store` has a dataset, which is then pinned with today's rules.

    Raises:
        SourceError: there are none, and no dataset; or what is stored is to be verified, which only a source can mend.
    """
    has_dataset = store is not None and latest_version(store, params.name) is not None
    if not params.ingest.sources and (verify or not has_dataset):
        todo = "Run `visionloop ingest PATH --verify` with the folder that the images came from."
        raise SourceError(
            "params.yaml ingest.sources",
            "names no source",
            "at least one",
            todo if verify else "Run `visionloop ingest FOLDER` once, or add a source to the file.",
        )
    return params.ingest.sources


def _read_all(
    sources: Sequence[Source], context: SourceContext, cursors: Mapping[str, str]
) -> Iterator[Item | Rejected | Cursor | PassedOver]:
    for source in sources:
        yield from read_source(source, replace(context, cursor=cursors.get(source.name)))


def find_stored(store: ObjectStore, journal: Journal, forgotten: frozenset[str]) -> Container[str] | None:
    """Return the digests that count as stored: of the store, and forgotten ones; None: trust the journal.

    A local store is listed, which is fast. In another one some objects are looked up; if one is missing, all are.
    """
    some = [sha256 for sha256 in journal.sample(SAMPLE) if sha256 not in forgotten]
    if not some:
        return None
    if not store.url.startswith("file:"):
        with ThreadPoolExecutor(store.num_writers) as pool:
            if all(pool.map(store.exists, map(make_image_key, some))):
                return None
    return _Digests(chain(forgotten, (key.rpartition("/")[2] for key in store.list("images/"))))


class _Digests:
    """A set of sha256, in 33 bytes each: sorted, and found by their first two bytes."""

    def __init__(self, sha256s: Iterable[str]) -> None:
        self._bytes = bytearray()
        for sha256 in filter(_SHA256.fullmatch, sha256s):
            self._bytes += bytes.fromhex(sha256)
        digests = np.frombuffer(self._bytes, "V32")
        digests.sort()
        self._starts = [32 * int(start) for start in np.searchsorted(digests.view(">u2")[::16], np.arange(65_537))]

    def __contains__(self, sha256: object) -> bool:
        if not _SHA256.fullmatch(str(sha256)):
            return False
        digest = bytes.fromhex(str(sha256))
        number = int.from_bytes(digest[:2], "big")
        first, end = self._starts[number : number + 2]
        while (place := self._bytes.find(digest, first, end)) >= 0:
            if place % 32 == 0:
                return True
            first = place + 1
        return False


def _check_rejected(checked: Checked, rejected: Sequence[Rejected], max_ratio: float, advice: str = "") -> None:
    """Raise SourceError when more files and rows than allowed are what the summary calls unusable."""
    unusable = [*{one.origin: one for one in rejected if one.code not in NOT_UNUSABLE}.values()]
    num_more = sum(checked.more_rows.values())
    rows = len({one.origin for one in rejected if one.is_row}) + num_more
    total, num_unusable = checked.num_places + rows, len(unusable) + num_more
    if num_unusable <= max_ratio * total:
        return
    worst = shorten([f"{r.origin} ({r.code})" for r in unusable])
    first = min(unusable, key=lambda r: f"{r.origin} ({r.code})")
    codes = Counter(one.code for one in unusable)
    todo = "Set `task: multilabel` if an image may have several labels." if "several_labels" in codes else "Mend them."
    raise SourceError(
        "ingest",
        f"{num_unusable} of {total} files {'and rows ' if rows else ''}cannot be used: {worst};"
        f" the first one {first.reason.rstrip('.')}",
        f"at most {max_ratio:.0%}",
        f"{advice or todo} Or raise ingest.max_rejected_ratio.",
    )


def _digest_asked(
    params: Params,
    forgotten: frozenset[str],
    sources: Sequence[Source],
    corrections: Sequence[Correction],
    answers: Mapping[str, Labels],
) -> str:
    """Return a digest of all settings: when it is equal, the same offers give the same result from the same version."""
    declared = [source.model_dump(mode="json") for source in sources]
    lines = [asdict(line) for line in corrections]
    rules = params.ingest.model_dump(mode="json")
    return compute_digest([__version__, params.task, rules, declared, lines, sorted(forgotten), answers])


def _say_declared(option: str) -> str:
    return f"`visionloop ingest {option}`"


def _commit(
    workspace: Workspace,
    checked: Checked,
    corrections: Sequence[Correction],
    now: str,
    wishes: Wishes,
    *,
    lost: Pin | None,
) -> _Ended:
    """Merge into the newest version and commit, unless nothing changes; a `lost` pin must come of it again."""
    store = workspace.store
    max_ratio = workspace.params.ingest.max_rejected_ratio
    _check_rejected(checked, checked.rejected, max_ratio)
    for _ in range(COMMIT_TRIES):
        parent = latest_version(store, workspace.name)
        merged = merge(store, workspace.params, parent, checked, now=now, corrections=corrections, wishes=wishes)
        rejected = tuple(sorted([*checked.rejected, *merged.refused], key=lambda r: r.origin))
        _check_rejected(checked, rejected, max_ratio, merged.advice)
        require_restored(workspace, lost, merged.version.digest)
        if merged.version is parent:
            return _Ended(parent, parent, rejected, merged.remarks)
        if commit_version(store, merged.version, merged.changed):
            return _Ended(parent, merged.version, rejected, merged.remarks, merged.notes)
        # Another pull took this number: merge into its version.
    raise DatasetError(
        f"dataset {workspace.name}", f"lost the race for a version {COMMIT_TRIES} times", "a quieter moment"
    )


def _sync(journal: Journal, store: ObjectStore, ended: _Ended) -> None:
    """Sync the store, unless a commit has done so, and note it in the journal."""
    if journal.has_news:
        if ended.version is ended.parent:
            store.sync()
        journal.mark_synced()


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python collect garbage less often: a pull makes many small objects that it keeps, and few cycles."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _name_version(version: DatasetVersion) -> str:
    return f"{version.version}:{version.digest}"


def _tell_older_pin(settings: Settings, newest: DatasetVersion | None, tell: Callable[[str], None]) -> None:
    """Tell that a version follows the newest one, where the workspace has pinned an older one."""
    try:
        pin = load_pin(settings.pin_path)
    except DatasetError:
        return
    if newest and pin.name == newest.name and pin.version < newest.version and pin.digest != newest.digest:
        tell(
            f"pinned is version {pin.version}; what is new goes on top of version {newest.version}, the newest "
            f"(`visionloop datasets drop {newest.version}` takes that one back)"
        )


def move_pin(settings: Settings, version: DatasetVersion) -> Pin:
    """Pin the version, unless the pin has the same content already."""
    pin = make_pin(version)
    if settings.pin_path.is_file():
        try:
            current = load_pin(settings.pin_path)
        except DatasetError:
            current = None
        if current and (current.name, current.digest) == (pin.name, pin.digest):
            return current
    write_pin(settings.pin_path, pin)
    return pin
