"""From checked images to a version: labels, sides, families, leaks; and that nothing ever moves."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fakes import make_image
from visionloop.data.leaks import load_leaks
from visionloop.data.manifest import latest_version, make_image_key
from visionloop.data.parts import commit_version, load_version_records
from visionloop.data.tombstones import make_tombstone_key
from visionloop.errors import ParamsError, SourceError
from visionloop.ingest import merge as merging
from visionloop.ingest.check import Checked
from visionloop.ingest.expect import check_expectations
from visionloop.ingest.inspect import Inspections, inspect_bytes
from visionloop.ingest.labels import Correction
from visionloop.ingest.merge import Merged, merge
from visionloop.ingest.sources import Item
from visionloop.params import make_params
from visionloop.records import ImageRecord
from visionloop.store import LocalStore

NOW = "2026-01-01T00:00:00+00:00"
Offer = tuple[bytes, Item]


@cache
def encode(seed: int, kind: str = "PNG") -> bytes:
    """A picture of its own for each seed; as JPEG a near duplicate of the same seed as PNG."""
    if kind == "PNG":
        return make_image(seed, size_hw=(64, 64))
    buffer = BytesIO()
    Image.open(BytesIO(encode(seed))).save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


@cache
def inspect(data: bytes) -> Any:
    return inspect_bytes(data, "x", max_pixels=10**6)


def offer(seed: int, label: str | None = "cat", kind: str = "PNG", **facts: Any) -> Offer:
    place = facts.pop("place", f"{seed}.{kind.lower()}")
    return encode(seed, kind), Item(f"s:{place}", "s", (label,) if label else (), lambda n: b"", **facts)


def fill(number: int = 4, first: int = 1000) -> list[Offer]:
    """Enough for two classes."""
    return [offer(first + i, "cat" if i % 2 else "dog") for i in range(number)]


class Desk:
    """A store, and pulls into it."""

    def __init__(self, folder: Path) -> None:
        self.store, self.folder = LocalStore(folder), folder / "put-down"

    def check(self, offers: Sequence[Offer], *, turned: bool = False) -> Checked:
        inspected = Inspections(self.folder)
        for n, (data, item) in reversed([*enumerate(offers)]) if turned else enumerate(offers):
            self.store.add(make_image_key(inspect(data).sha256), data)
            inspected.add(item, n, inspect(data))
        return Checked(inspected, num_seen=len(offers))

    def merge(self, offers: Sequence[Offer], *, corrections: Sequence[Correction] = (), **sections: Any) -> Merged:
        params, parent = make_params({"name": "pets", **sections}), latest_version(self.store, "pets")
        return merge(self.store, params, parent, self.check(offers), now=NOW, corrections=corrections)

    def pull(self, offers: Sequence[Offer], **how: Any) -> Merged:
        merged = self.merge(offers, **how)
        if merged.changed:
            assert commit_version(self.store, merged.version, merged.changed)
        return merged

    def rows(self) -> dict[str, ImageRecord]:
        version = latest_version(self.store, "pets")
        return {r.sha256: r for r in load_version_records(self.store, version)} if version else {}

    def row(self, offered: Offer) -> ImageRecord:
        return self.rows()[inspect(offered[0]).sha256]

    def leaks(self) -> list[tuple[str, str, str, str]]:
        version = latest_version(self.store, "pets")
        assert version is not None
        rows = load_leaks(self.store, version).rows
        assert version.num_leaks == len(rows)
        return [(r.kind, r.origins[0], r.side, r.other_side) for r in rows]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_near_duplicate_goes_where_the_first_is(desk: Desk) -> None:
    firsts = [offer(i) for i in range(20)]
    desk.pull([*firsts, *fill()])
    copies = [offer(i, kind="JPEG") for i in range(20)]
    desk.pull(copies)
    assert [desk.row(c).side for c in copies] == [desk.row(f).side for f in firsts]
    assert {desk.row(f).side for f in firsts} == {"train", "val", "test"}
    assert [desk.row(c).key for c in copies] == [desk.row(f).sha256 for f in firsts]
    assert desk.leaks() == []


def test_a_group_stays_together_over_versions(desk: Desk) -> None:
    desk.pull([*fill(), *(offer(i, group="film") for i in range(3))])
    desk.pull([offer(i, group="film") for i in range(3, 9)])
    rows = [desk.row(offer(i)) for i in range(9)]
    assert len({r.side for r in rows}) == 1
    assert {r.key for r in rows} == {"film"}


def test_given_sides_that_leak_are_listed_and_stay_in_later_versions(desk: Desk) -> None:
    desk.pull([*fill(), offer(1, side="train"), offer(1, kind="JPEG", side="test")])
    desk.pull(fill(2, 2000))
    assert desk.leaks() == [("across", "s:1.png", "train", "test")]
    version = latest_version(desk.store, "pets")
    assert version is not None
    leak = load_leaks(desk.store, version).rows[0]
    assert leak.distance is not None
    assert leak.distance <= 4
    assert leak.reason.startswith("near duplicates, ")


def test_images_that_their_source_puts_on_train_count_for_min_train(desk: Desk) -> None:
    desk.pull(fill())
    given, others = [offer(i, side="train") for i in range(8)], [offer(20 + i) for i in range(12)]
    merged = desk.pull([*given, *others], ingest={"split": {"min_train": 14}})
    assert not [line for line in merged.notes if "went there" in line]
    assert {desk.row(one).side for one in others} != {"train"}


def test_on_leak_exclude_keeps_the_test_image(desk: Desk) -> None:
    desk.pull(
        [*fill(), offer(1, side="train"), offer(1, kind="JPEG", side="test")],
        ingest={"split": {"on_leak": "exclude"}},
    )
    assert (desk.row(offer(1)).side, desk.row(offer(1, kind="JPEG")).side) == ("excluded", "test")
    assert desk.leaks() == [("excluded", "s:1.png", "excluded", "test")]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_on_leak_fail_makes_no_version(desk: Desk, kind: str) -> None:
    with pytest.raises(
        SourceError, match=r"1 images leak to another side: s:(1|a)\.png \((train|test)\) and s:.* \(t"
    ) as caught:
        desk.pull(
            [*fill(), offer(1, side="train"), offer(1, kind=kind, side="test", place="a.png")],
            ingest={"split": {"on_leak": "fail"}},
        )
    assert "on_leak to report or exclude" in str(caught.value)
    assert latest_version(desk.store, "pets") is None


def test_a_new_image_that_would_link_two_sides_is_excluded(desk: Desk) -> None:
    ends = [offer(1, side="train", group="a"), offer(2, side="test", group="b")]
    desk.pull([*fill(), *ends])
    desk.pull([offer(3, group="a"), offer(1, kind="JPEG", group="b")])
    assert desk.row(offer(3)).side == "train"
    assert desk.row(offer(1, kind="JPEG")).side == "excluded"
    assert desk.leaks() == [("excluded", "s:1.jpeg", "excluded", "test")]


def test_a_later_side_is_a_conflict_and_changes_nothing(desk: Desk) -> None:
    desk.pull([*fill(), offer(1, side="train")])
    again = desk.pull([offer(1, side="test")])
    assert [(r.origin, r.code) for r in again.refused] == [("s:1.png", "side_conflict")]
    assert not again.changed
    desk.pull([offer(1, side="test", place="elsewhere.png")])
    assert desk.row(offer(1)).side == "train"
    assert desk.leaks() == [("conflict", "s:elsewhere.png", "train", "test")]


def test_an_unlabelled_image_gains_its_label_and_keeps_its_side(desk: Desk) -> None:
    desk.pull([*fill(), offer(1, None)])
    before = desk.row(offer(1))
    merged = desk.pull([offer(1, "cat", place="labelled.png")])
    after = desk.row(offer(1))
    assert (before.labels, after.labels, after.side) == ((), ("cat",), before.side)
    assert after.origins == ("s:1.png", "s:labelled.png")
    assert merged.version.num_added == 0
    assert not desk.pull([offer(1, None)]).changed


def test_a_version_of_very_many_parts_is_followed_by_one_of_few(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "MOST_PARTS", 3)
    versions = [desk.pull([*fill(), *(offer(seed) for seed in range(number))]).version for number in range(5)]
    assert [len(one.parts) for one in versions] == [1, 2, 3, 1, 2]
    assert [len(load_version_records(desk.store, one)) for one in versions] == [4, 5, 6, 7, 8]
    assert [one.num_added for one in versions] == [4, 1, 1, 1, 1]


def test_same_bytes_with_and_without_a_label_are_one_image(desk: Desk) -> None:
    desk.pull([*fill(), offer(1, None, place="a.png"), offer(1, "cat", place="b.png")])
    assert desk.row(offer(1)).labels == ("cat",)


def test_unlabelled_images_count_in_no_class(desk: Desk) -> None:
    with pytest.raises(SourceError, match=r"has 1 class \(cat\); expected two classes or more"):
        desk.pull([offer(1), offer(2), offer(3, None)])


def test_several_labels_want_the_task(desk: Desk) -> None:
    data, item = offer(1)
    both = (data, item._replace(labels=("dog", "cat")))
    merged = desk.merge([*fill(), both])
    assert [(r.origin, r.code, r.reason) for r in merged.refused] == [
        ("s:1.png", "several_labels", "has the labels cat, dog; expected one, or `task: multilabel`")
    ]
    with pytest.raises(
        SourceError, match=r"has 0 class \(none\), and 1 not taken as several_labels, such as s:1.* Set `task: multi"
    ):
        desk.merge([both])
    desk.pull([*fill(), both, offer(2, "cat", place="a"), offer(2, "dog", place="b")], task="multilabel")
    assert desk.row(offer(1)).labels == desk.row(offer(2)).labels == ("cat", "dog")


def test_a_forgotten_image_is_not_taken_in_again(desk: Desk) -> None:
    sha256 = inspect(encode(1)).sha256
    desk.store.put(make_tombstone_key("pets", sha256), b"{}")
    merged = desk.pull([*fill(), offer(1)], corrections=[Correction(2, sha256[:8], "cat", "dog")])
    assert [(r.origin, r.code) for r in merged.refused] == [("s:1.png", "forgotten")]
    assert sha256 not in desk.rows()


def test_a_label_map_renames_old_and_new_rows(desk: Desk) -> None:
    desk.pull([*fill(), offer(1, "kitty")])
    renamed = {"ingest": {"label_map": {"kitty": "cat"}}}
    merged = desk.pull([*fill(), offer(1, "kitty"), offer(2, "kitty")], **renamed)
    assert merged.version.classes == ("cat", "dog")
    assert len(merged.changed) == 2
    assert merged.refused == []
    again = desk.pull([*fill(), offer(1, "kitty"), offer(2, "kitty")], **renamed)
    assert (len(again.changed), again.refused) == (0, [])


def test_a_label_map_must_not_chain(desk: Desk) -> None:
    with pytest.raises(ParamsError, match=r"label_map: renames b, and others to it"):
        desk.pull(fill(), ingest={"label_map": {"a": "b", "b": "c"}})


def test_corrections_make_a_version_and_stay_made(desk: Desk) -> None:
    desk.pull([*fill(), offer(1), offer(2)])
    line = Correction(2, inspect(encode(1)).sha256[:12], "cat", "dog")
    merged = desk.pull([*fill(), offer(1), offer(2)], corrections=[line])
    assert [(r.labels, r.side) for r in merged.changed] == [(("dog",), desk.row(offer(1)).side)]
    again = desk.pull([*fill(), offer(1), offer(2)], corrections=[line])
    assert (len(again.changed), again.refused) == (0, [])


def test_a_correction_settles_a_conflict(desk: Desk) -> None:
    both = [offer(1, "cat", place="a.png"), offer(1, "dog", place="b.png")]
    line = Correction(2, inspect(encode(1)).sha256, "cat", "dog")
    assert {r.code for r in desk.merge([*fill(), *both]).refused} == {"label_conflict"}
    desk.pull([*fill(), *both], corrections=[line])
    assert desk.row(offer(1)).labels == ("dog",)


def test_a_correction_of_an_unknown_image_makes_no_version(desk: Desk) -> None:
    with pytest.raises(SourceError, match=r"ingest\.corrections: line 7: no image has 0123abcd"):
        desk.pull(fill(), corrections=[Correction(7, "0123abcd", "cat", "dog")])
    assert latest_version(desk.store, "pets") is None


def test_broken_expectations_make_no_version(desk: Desk) -> None:
    with pytest.raises(SourceError, match=r"dataset pets: fewer than 3 images of cat: 2, dog: 2"):
        desk.pull(fill(), ingest={"expect": {"min_per_class": 3}})
    assert latest_version(desk.store, "pets") is None


RANDOM = {"ingest": {"split": {"method": "random", "seed": 13, "fractions": [0.8, 0.2], "first": 20}}}


def test_a_random_split_is_that_of_scikit_learn(desk: Desk) -> None:
    from sklearn.model_selection import train_test_split

    offers = [offer(9, None), *(offer(100 + i, "cat" if i % 2 else "dog") for i in range(25))]
    desk.pull(offers, **RANDOM)
    train, test = train_test_split(range(20), test_size=0.2, random_state=13, shuffle=True)
    sides = [desk.row(o).side for o in offers[1:]]
    assert [i for i, side in enumerate(sides) if side == "train"] == sorted(train)
    assert [i for i, side in enumerate(sides) if side == "test"] == sorted(test)
    assert sides[20:] == ["excluded"] * 5
    desk.pull(fill(), **RANDOM)
    assert {desk.row(o).side for o in [offers[0], *fill()]} == {"excluded"}


def test_a_random_split_reports_its_leaks(desk: Desk) -> None:
    offers = [offer(i // 2, "cat" if i % 4 < 2 else "dog", "JPEG" if i % 2 else "PNG") for i in range(20)]
    desk.pull(offers, **RANDOM)
    sides = [desk.row(o).side for o in offers]
    apart = [i for i in range(0, 20, 2) if sides[i] != sides[i + 1]]
    assert len(apart) > 0
    assert [kind for kind, *_ in desk.leaks()] == ["across"] * len(apart)


def test_a_random_split_wants_its_rows(desk: Desk) -> None:
    with pytest.raises(
        SourceError, match=r"ingest\.split\.first: the sources have 4 labelled images; expected 20 or more"
    ):
        desk.pull(fill(), **RANDOM)


POOL = [
    *fill(),
    *(offer(i // 2, "cat", "JPEG" if i % 2 else "PNG", group=("x" if i % 7 == 0 else None)) for i in range(24)),
    *(offer(50 + i, "dog", "JPEG", side=side) for i, side in enumerate(("train", "val", "test", "train"))),
    *(offer(50 + i, "dog") for i in range(4)),
]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(4, len(POOL))), st.sets(st.integers(4, len(POOL)), max_size=3), st.booleans())
def test_no_order_batch_rerun_or_later_version_moves_an_image(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: set[int], rerun: bool
) -> None:
    desk = Desk(tmp_path_factory.mktemp("store"))
    everyone = [*range(4), *order]
    sides: dict[str, str] = {}
    for cut in sorted({*cuts, 4, len(POOL)}):
        batch = everyone[0 if rerun else len(sides) : cut]
        merged = desk.merge([POOL[i] for i in batch])
        turned = desk.check([POOL[i] for i in batch], turned=True)
        parent = latest_version(desk.store, "pets")
        assert merge(desk.store, make_params({"name": "pets"}), parent, turned, now=NOW).version == merged.version
        if merged.changed:
            assert commit_version(desk.store, merged.version, merged.changed)
        now = {sha256: row.side for sha256, row in desk.rows().items()}
        assert {sha256: now[sha256] for sha256 in sides} == sides
        sides = now
    assert len(sides) == len(POOL)
    for seed in range(12):
        pair = {sides[inspect(encode(seed, kind)).sha256] for kind in ("PNG", "JPEG")} - {"excluded"}
        assert len(pair) <= 1
    films = {sides[inspect(data).sha256] for data, item in POOL if item.group} - {"excluded"}
    assert len(films) <= 1


RECORD = ImageRecord("a", ("cat",), ("s",), ("s:a.jpg",), 0, None, "a", "train", None, 640, 480, "JPEG", 99, "")
CATS = [replace(RECORD, sha256=f"c{i}") for i in range(6)]
DOGS = [replace(RECORD, sha256=f"d{i}", labels=("dog",)) for i in range(2)]
OTHERS = [
    replace(RECORD, sha256="u", labels=()),
    replace(RECORD, sha256="x", labels=("cow",), side="excluded", width=9),
]


def check(**expect: Any) -> None:
    params = make_params({"name": "pets", "ingest": {"expect": expect}})
    check_expectations("pets", params.ingest.expect, [*CATS, *DOGS, *OTHERS])


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"classes": ["cat"]}, r"classes that are not expected \(dog: 2 images\)"),
        ({"classes": ["cat", "dog", "emu"], "min_per_class": 3}, r"fewer than 3 images of dog: 2, emu: 0;"),
        ({"max_imbalance": 2.5}, r"3\.0 times as many images of cat \(6\) as of dog \(2\), not 2\.5"),
        ({"size_px": [500, 1000]}, r"9 images with a side outside 500 to 1000 px \(s:a\.jpg 640x480, .* and 4 more\)"),
        ({"size_px": [32, 600]}, r"9 images with a side outside 32 to 600 px"),
        ({"sources": ["t"]}, r"sources that may not deliver \(s\)"),
    ],
    ids=["classes", "min", "imbalance", "small", "large", "sources"],
)
def test_what_is_broken_is_named(expect: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        check(**expect)


def test_all_that_is_broken_is_in_one_error() -> None:
    with pytest.raises(SourceError) as caught:
        check(classes=["cat"], min_per_class=4, sources=["t"])
    assert caught.value.found == (
        "classes that are not expected (dog: 2 images); fewer than 4 images of dog: 2; sources that may not deliver (s)"
    )
    assert "no version was made" in str(caught.value)


def test_a_dataset_as_expected_passes() -> None:
    check()
    check(classes=["cat", "dog"], min_per_class=2, max_imbalance=3, size_px=[480, 640], sources=["s"])
