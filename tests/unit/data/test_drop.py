"""A version without what the newest one brought: how far sources were read goes back too, and no race is lost."""

from dataclasses import replace

import pytest

from visionloop.data import drop
from visionloop.data.drop import drop_source, drop_version, load_aside
from visionloop.data.leaks import load_leaks
from visionloop.data.manifest import latest_version
from visionloop.data.parts import load_version_records
from visionloop.errors import DatasetError
from visionloop.records import DatasetVersion, canonical_json
from workspaces import NAME, NOW, Pets, commit, make_pets, store_image


@pytest.fixture
def pets(tmp_path):
    return make_pets(tmp_path)


def set_cursors(pets: Pets, version: DatasetVersion, **cursors: str) -> None:
    key = f"datasets/{NAME}/{version.version:06d}.json"
    pets.store.put(key, canonical_json(replace(version, cursors=cursors).to_json()))


def test_sources_are_read_again_from_where_they_were_before(pets: Pets) -> None:
    one, two = pets.versions
    set_cursors(pets, one, sql="5", camera="7")
    set_cursors(pets, two, sql="9", camera="8")
    assert drop_version(pets.store, NAME, 2, now=NOW).after.cursors == {"sql": "5", "camera": "7"}


def test_a_source_that_was_dropped_is_read_from_the_start(pets: Pets) -> None:
    more = [store_image(pets.store, seed, sources=("sql",), origins=(f"sql:{seed}",)) for seed in range(30, 34)]
    three = commit(pets.store, pets.rows, more, pets.versions[1])
    set_cursors(pets, three, sql="9", camera="8")
    done = drop_source(pets.store, NAME, "sql", now=NOW)
    assert (done.after.version, done.after.cursors, done.after.sources) == (4, {"camera": "8"}, ("photos",))
    assert load_aside(pets.store, done.after).keys() == {r.sha256 for r in more}
    assert {r.side for r in load_aside(pets.store, done.after).values()} == {"train", "val", "test"}


def test_an_image_of_two_sources_loses_one_place_and_nothing_else(pets: Pets) -> None:
    both = store_image(pets.store, 40, sources=("photos", "sql"), origins=("photos:40.png", "sql:40"))
    commit(pets.store, pets.rows, [both], pets.versions[1])
    done = drop_source(pets.store, NAME, "sql", now=NOW)
    left = next(r for r in done.rows_after if r.sha256 == both.sha256)
    assert left == replace(both, sources=("photos",), origins=("photos:40.png",))
    assert load_aside(pets.store, done.after) == {}


def test_leaks_of_what_was_taken_out_are_no_longer_listed(pets: Pets) -> None:
    extra = store_image(pets.store, 50)
    leak = replace(load_leaks(pets.store, pets.versions[1]).rows[0], sha256=extra.sha256)
    kept = load_leaks(pets.store, pets.versions[1]).rows
    commit(pets.store, pets.rows, [extra], pets.versions[1], leaks=[*kept, leak])
    done = drop_version(pets.store, NAME, 3, now=NOW)
    assert done.after.num_leaks == len(kept)
    assert load_leaks(pets.store, done.after).rows == kept


def test_a_version_that_another_process_commits_meanwhile_is_the_newest_then(
    pets: Pets, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = drop.commit_version, []

    def commit_late(store, version, records):
        if not calls:
            calls.append(commit(store, pets.rows, [store_image(store, 60)], pets.versions[1]))
        return real(store, version, records)

    monkeypatch.setattr(drop, "commit_version", commit_late)
    with pytest.raises(DatasetError, match=r"version 2: is not the newest, which is 3.*Drop 3 first"):
        drop_version(pets.store, NAME, 2, now=NOW)
    newest = latest_version(pets.store, NAME)
    assert newest is not None
    assert (newest.version, len(load_version_records(pets.store, newest))) == (3, 17)


def test_a_version_that_brought_nothing_is_refused(pets: Pets) -> None:
    commit(pets.store, pets.rows, [], pets.versions[1])
    with pytest.raises(DatasetError, match="brought nothing that version 2 has not"):
        drop_version(pets.store, NAME, 3, now=NOW)


def test_a_dataset_without_a_version_says_so(pets: Pets) -> None:
    with pytest.raises(DatasetError, match=r"has no version in this store.*Run `visionloop ingest PATH`"):
        drop_source(pets.store, "others", "photos", now=NOW)
