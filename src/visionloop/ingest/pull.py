"""Pull images from sources into a new dataset version. Resumable: what is stored is not stored again.

Nothing is visible before the version's commit object; two pulls at once both succeed, one after the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from visionloop.data.manifest import commit_version, latest_version, load_pin, make_pin, write_pin
from visionloop.errors import DatasetError, SourceError, shorten
from visionloop.ingest.check import Checked, check_all
from visionloop.ingest.merge import merge
from visionloop.ingest.sources import Cursor, Item, Reading, read_source
from visionloop.params import Params, Source
from visionloop.records import DatasetVersion, Pin, Rejected
from visionloop.settings import Settings
from visionloop.store import ObjectStore

COMMIT_TRIES = 20
# Listed, but no fault of a file: a table and its images that do not cover each other, and images that were forgotten.
NOT_UNUSABLE = frozenset({"row_without_image", "image_without_row", "forgotten"})


@dataclass(frozen=True)
class PullReport:
    """What a pull found and what came of it. `changed` is False when the dataset is as before."""

    pin: Pin
    version: DatasetVersion
    changed: bool
    num_seen: int
    num_added: int
    rejected: tuple[Rejected, ...]


def pull(
    settings: Settings,
    params: Params,
    store: ObjectStore,
    *,
    sources: Sequence[Source],
    now: str,
    env: Mapping[str, str] = MappingProxyType({}),
    tell: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PullReport:
    """Read sources, quarantine what is unusable, commit a version if anything is new, and pin it in the workspace.

    Raises:
        SourceError: a source is missing or empty, too many files are unusable, or there is only one class.
        ParamsError: the split differs from the one that version 1 fixed.
    """
    before = latest_version(store, params.name)
    reading = Reading(settings.home, settings.hidden_dir, env, params.ingest, tell=tell)
    offered = _read_all(sources, reading, before.cursors if before else {})
    checked = check_all(offered, store, params.ingest, on_progress)
    _check_rejected(checked, params.ingest.max_rejected_ratio)
    for _ in range(COMMIT_TRIES):
        parent = latest_version(store, params.name)
        merged = merge(store, params, parent, checked, now=now)
        version = merged.version
        if parent and not merged.changed:
            version = parent
        elif not commit_version(store, version, merged.changed):
            continue  # another pull took this number: merge with what it brought
        pin = _move_pin(settings, version)
        num_added = version.num_images - (parent.num_images if parent else 0)
        return PullReport(
            pin=pin,
            version=version,
            changed=parent is None or version.digest != parent.digest,
            num_seen=checked.num_seen,
            num_added=num_added,
            rejected=tuple(sorted([*checked.rejected, *merged.refused], key=lambda r: r.origin)),
        )
    raise DatasetError(
        f"dataset {params.name}", f"lost the race for a version {COMMIT_TRIES} times", "a quieter moment"
    )


def check_sources(params: Params) -> Sequence[Source]:
    """Return the declared sources. Raises SourceError when there are none."""
    if not params.ingest.sources:
        raise SourceError(
            "params.yaml ingest.sources",
            "names no source",
            "at least one",
            "Run `visionloop ingest FOLDER` once, or add a source to the file.",
        )
    return params.ingest.sources


def _read_all(
    sources: Sequence[Source], reading: Reading, cursors: Mapping[str, str]
) -> Iterator[Item | Rejected | Cursor]:
    for source in sources:
        yield from read_source(source, replace(reading, cursor=cursors.get(source.name)))


def _check_rejected(checked: Checked, max_ratio: float) -> None:
    unusable = [r for r in checked.rejected if r.code not in NOT_UNUSABLE]
    if unusable and len(unusable) > max_ratio * checked.num_seen:
        worst = shorten([f"{r.origin} ({r.code})" for r in unusable])
        raise SourceError(
            "ingest",
            f"{len(unusable)} of {checked.num_seen} files cannot be used: {worst}",
            f"at most {max_ratio:.0%}",
            "Mend them, or raise ingest.max_rejected_ratio.",
        )


def _move_pin(settings: Settings, version: DatasetVersion) -> Pin:
    """Pin the version, unless the pin stands on the same content already."""
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
