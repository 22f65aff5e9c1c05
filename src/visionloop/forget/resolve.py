"""Which images are meant: digests, the beginnings of digests, and patterns of the places where images came from."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from visionloop.data.drop import load_aside
from visionloop.data.manifest import latest_version, make_image_key
from visionloop.data.parts import iterate_version
from visionloop.data.prediction_log import is_logged
from visionloop.data.tombstones import load_tombstones, load_unfinished
from visionloop.errors import DatasetError, shorten
from visionloop.records import ImageRecord
from visionloop.store import ObjectStore

MIN_PREFIX = 8
DIGEST_LENGTH = 64


@dataclass(frozen=True)
class Wanted:
    """The images to forget. `again` were forgotten before, wholly or not.

    `records` are those in the newest version, and those that were taken out of an earlier one.
    """

    records: tuple[ImageRecord, ...]
    others: tuple[str, ...]
    again: tuple[str, ...]

    @property
    def sha256s(self) -> frozenset[str]:
        return frozenset((*(r.sha256 for r in self.records), *self.others, *self.again))


def resolve_images(store: ObjectStore, name: str, digests: Sequence[str], patterns: Sequence[str]) -> Wanted:
    """Find the images that digests (8 digits or more) and patterns of origins (`photos:cats/*`) name.

    Without either: those of every forget that was begun and not finished, and all that were forgotten, to look for
    copies once more. A whole digest may also be that of an image that is in the store and in no version, or that a
    server was asked about.

    Raises:
        DatasetError: a digest or a pattern names no image, or a digest is the beginning of several.
    """
    tombstones = load_tombstones(store, name)
    begun = frozenset(sha256 for one in load_unfinished(store, name) for sha256 in one.sha256s)
    records = _find_rows(store, name, tombstones | begun, [one.strip().lower() for one in digests], patterns)
    if not digests and not patterns:
        return _sort(records, tombstones | begun, tombstones)
    known = sorted(records.keys() | tombstones)
    found = {_find(store, name, digest.strip().lower(), known) for digest in digests}
    for pattern in patterns:
        matches = _match(records.values(), pattern)
        if not matches:
            raise DatasetError(
                f"dataset {name}",
                f"no image came from {pattern!r}",
                "an origin such as photos:cats/1.jpg, or a pattern with *",
                "`visionloop datasets export` writes all origins into images.csv.",
            )
        found |= matches
    return _sort(records, found, tombstones)


def _find_rows(
    store: ObjectStore, name: str, sha256s: frozenset[str], beginnings: Sequence[str], patterns: Sequence[str]
) -> dict[str, ImageRecord]:
    """Return the rows of the newest version, and of what was taken out before, that may be meant."""
    latest, matchers = latest_version(store, name), [_compile(pattern) for pattern in patterns]
    found: dict[str, ImageRecord] = {}
    if latest is None:
        return found
    starts = tuple(beginnings)
    for row in chain(load_aside(store, latest).values(), iterate_version(store, latest)):
        is_named = row.sha256 in sha256s or row.sha256 in found or row.sha256.startswith(starts)
        if is_named or any(matcher.match(origin) for matcher in matchers for origin in row.origins):
            found[row.sha256] = row
    return found


def _find(store: ObjectStore, name: str, digest: str, known: Sequence[str]) -> str:
    if not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},{DIGEST_LENGTH}}}", digest):
        raise DatasetError(
            f"forget {digest[:80]!r}",
            "is no sha256",
            f"{MIN_PREFIX} to {DIGEST_LENGTH} hexadecimal digits",
            "To name images by where they came from, use --origin.",
        )
    matches = [sha256 for sha256 in known if sha256.startswith(digest)]
    if len(matches) > 1:
        raise DatasetError(
            f"forget {digest}", f"is the beginning of {len(matches)} images", "one", f"They are {shorten(matches)}."
        )
    if matches:
        return matches[0]
    if len(digest) == DIGEST_LENGTH and (
        store.exists(make_image_key(digest))  # by a pull that refused it, or was cut off
        or is_logged(store, name, digest)  # a server was asked about it
    ):
        return digest
    raise DatasetError(
        f"forget {digest}",
        f"is no image of dataset {name}",
        "an image of its newest version, or by its whole digest one in the store or in the log of a server",
    )


def _match(records: Iterable[ImageRecord], pattern: str) -> set[str]:
    matcher = _compile(pattern)
    return {r.sha256 for r in records if any(matcher.match(origin) for origin in r.origins)}


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def _sort(records: dict[str, ImageRecord], found: set[str] | frozenset[str], tombstones: frozenset[str]) -> Wanted:
    return Wanted(
        records=tuple(records[sha256] for sha256 in sorted(found & records.keys())),
        others=tuple(sorted(found - records.keys() - tombstones)),
        again=tuple(sorted((found & tombstones) - records.keys())),
    )
