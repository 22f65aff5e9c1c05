"""The ledger with several writers: each number has one winner, and none is overwritten or skipped."""

import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from counting_store import CountingStore
from visionloop.errors import PromotionError
from visionloop.promotion import entries
from visionloop.promotion.ledger import (
    append_entry,
    find_rolled_back,
    iterate_history,
    read_champion,
    read_decisions,
    read_decisions_about,
    read_history,
    read_ledger,
    require_entry,
    require_sound,
    store_decision,
)
from visionloop.records import Decision
from visionloop.store import LocalStore

ROUNDS = 5
PROMOTERS = 6


def append(store, after, bundle, by="ann"):
    facts = {"decision": 1, "dataset": {}, "run_id": None, "why": "test", "at": "2026-01-01T00:00:00Z"}
    return append_entry(store, "m", after, action="promote", bundle=bundle, model_version="1", by=by, **facts)


def promote_in_rounds(root: str, by: str) -> list[int]:
    """Try to follow the champion of each round; return the numbers won."""
    store, won = LocalStore(Path(root)), []
    while (champion := read_champion(store, "m")) is None or champion.number < ROUNDS:
        try:
            won.append(append(store, champion, f"bundle of {by}", by).number)
        except PromotionError:
            continue
    return won


def test_an_empty_ledger_has_no_champion(tmp_path):
    store = LocalStore(tmp_path)
    assert read_champion(store, "m") is None
    assert read_history(store, "m") == []


def test_entries_follow_each_other_and_names_do_not_mix(tmp_path):
    store = LocalStore(tmp_path)
    first = append(store, None, "one")
    second = append(store, first, "two")
    store.put("ledger/m-2/000001.json", b"{}")
    assert (second.number, second.previous, first.previous) == (2, "one", None)
    assert read_history(store, "m") == [first, second]
    assert read_champion(store, "m") == second


def test_a_stale_promoter_loses_and_changes_nothing(tmp_path):
    store = LocalStore(tmp_path)
    first = append(store, None, "one")
    append(store, first, "two")
    for seen in (None, first):
        with pytest.raises(PromotionError, match=r"champion moved: entry \d was written by someone else"):
            append(store, seen, "three")
    assert [e.bundle for e in read_history(store, "m")] == ["one", "two"]


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_of_racing_promoters_exactly_one_wins_each_number(tmp_path, pool):
    context = {"mp_context": get_context("spawn")} if pool is ProcessPoolExecutor else {}
    promoters = PROMOTERS if pool is ThreadPoolExecutor else 2
    with pool(promoters, **context) as racers:
        won = list(racers.map(promote_in_rounds, [str(tmp_path)] * promoters, "abcdef"[:promoters]))
    assert sorted(number for numbers in won for number in numbers) == list(range(1, ROUNDS + 1))
    history = read_history(LocalStore(tmp_path), "m")
    assert [e.number for e in history] == list(range(1, ROUNDS + 1))
    for by, numbers in zip("abcdef", won, strict=False):
        assert [e.number for e in history if e.by == by] == numbers
    assert [e.previous for e in history] == [None, *(e.bundle for e in history[:-1])]


def write_entry(store, number, bundle, previous, **facts):
    entry = {"name": "m", "number": number, "action": "promote", "bundle": bundle, "previous": previous, "at": "2026"}
    rest = {"model_version": "1", "decision": 1, "dataset": {}, "run_id": None, "by": "ann", "why": "test"}
    store.put(f"ledger/m/{number:06d}.json", json.dumps({**entry, **rest, **facts}).encode())


def test_a_decision_that_was_copied_under_another_number_blocks_nothing(tmp_path):
    """It says that it is decision 1, so decision 2 was to be the next, for ever."""
    store = LocalStore(tmp_path)
    empty = {"rules": (), "metrics": {}, "champion_metrics": {}, "state": {}, "dataset": {}, "run_id": None}

    def decide(candidate):
        facts = {"name": "m", "number": 0, "verdict": "passed", "champion": None, "decided_at": "now", **empty}
        return store_decision(store, Decision(candidate=candidate, test_digest="t", num_test=9, **facts))

    decide("one")
    decide("two")
    store.put("decisions/m/000003.json", store.get("decisions/m/000001.json"))
    assert decide("three").number == 4
    assert [(one.number, one.candidate) for one in read_decisions(store, "m")] == [
        (1, "one"),
        (2, "two"),
        (3, "one"),
        (4, "three"),
    ]


def test_a_million_entries_stay_in_order(tmp_path):
    store = LocalStore(tmp_path)
    for number, previous in ((999_999, "zero"), (1_000_000, "one")):
        write_entry(store, number, "one", previous)
    assert [e.number for e in read_history(store, "m")] == [999_999, 1_000_000]
    assert read_ledger(store, "m").problems == ("entries are missing: 000001 to 999998",)
    assert read_champion(store, "m").number == 1_000_000


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"name": "m"}'])
def test_a_damaged_entry_is_named(tmp_path, data):
    store = LocalStore(tmp_path)
    store.put("ledger/m/000001.json", data)
    for read in (read_champion, read_history):
        with pytest.raises(PromotionError, match=r"ledger/m/000001\.json: is damaged"):
            read(store, "m")


def spoil(store, key, **facts):
    store.put(key, json.dumps({**json.loads(store.get("ledger/m/000003.json")), **facts}).encode())


FOREIGN: dict[str, tuple[object, str, int]] = {
    "a backup": (
        lambda s: spoil(s, "ledger/m/000003-backup.json"),
        "ledger/m/000003-backup.json is no ledger entry",
        3,
    ),
    "a copy with another number": (lambda s: spoil(s, "ledger/m/000009.json"), "000009.json says it is entry 3", 3),
    "a long number": (lambda s: spoil(s, "ledger/m/0000004.json"), "0000004.json is no ledger entry", 3),
    "entry 0": (lambda s: spoil(s, "ledger/m/000000.json", number=0), "000000.json is no ledger entry", 3),
    "a folder": (lambda s: spoil(s, "ledger/m/old/000004.json", number=4), "old/000004.json is no ledger entry", 3),
    "no json": (lambda s: s.put("ledger/m/README", b"hello"), "ledger/m/README is no ledger entry", 3),
    "another name": (lambda s: spoil(s, "ledger/m/000004.json", number=4, name="x"), "is an entry of 'x'", 3),
    "a torn last entry": (lambda s: s.put("ledger/m/000004.json", b'{"name": "m", "numb'), "000004.json is damaged", 3),
    "an unknown action": (lambda s: spoil(s, "ledger/m/000003.json", action="demote"), "000003.json is damaged", 2),
    "a broken chain": (
        lambda s: spoil(s, "ledger/m/000004.json", number=4, previous="else"),
        "000004.json does not follow the entry before: its previous is else",
        3,
    ),
    "a first entry with a past": (
        lambda s: spoil(s, "ledger/m/000001.json", number=1, bundle="one"),
        "does not follow",
        3,
    ),
    "a gap": (lambda s: s.delete("ledger/m/000002.json"), "entries are missing: 000002", 3),
    "a lost start": (lambda s: s.delete("ledger/m/000001.json"), "entries are missing: 000001", 3),
}


@pytest.mark.parametrize(("change", "told", "champion"), FOREIGN.values(), ids=FOREIGN)
def test_what_does_not_belong_is_named_and_the_last_good_champion_goes_on(tmp_path, change, told, champion):
    store, entry = LocalStore(tmp_path), None
    for bundle in ("one", "two", "three"):
        entry = append(store, entry, bundle)
    require_sound(read_ledger(store, "m"), "m")
    change(store)
    ledger = read_ledger(store, "m")
    assert (read_champion(store, "m").number, ledger.champion.number) == (champion, champion)
    with pytest.raises(PromotionError, match="ledger m: ") as caught:
        require_sound(ledger, "m")
    assert told in caught.value.found
    assert f"entry {champion} stays the champion" in caught.value.found
    assert len(ledger.problems) == 1


def test_a_stray_file_alone_is_no_empty_ledger(tmp_path):
    store = LocalStore(tmp_path)
    append(store, None, "one")
    store.put("ledger/m/000001-backup.json", store.get("ledger/m/000001.json"))
    store.delete("ledger/m/000001.json")
    for read in (read_champion, read_ledger):
        with pytest.raises(PromotionError, match=r"000001-backup\.json: is no ledger entry"):
            read(store, "m")


def test_a_number_that_is_taken_by_a_torn_entry_is_told_as_that(tmp_path):
    store = LocalStore(tmp_path)
    first = append(store, None, "one")
    store.put("ledger/m/000002.json", b"")
    with pytest.raises(PromotionError, match=r"ledger/m/000002\.json: is damaged; expected a ledger entry\. Restore"):
        append(store, first, "two")
    store.delete("ledger/m/000002.json")
    assert append(store, first, "two").number == 2


def roll_back(store, after, bundle):
    facts = {"decision": 1, "dataset": {}, "run_id": None, "why": "it barks", "at": "2026-01-02T00:00:00Z", "by": "bob"}
    return append_entry(store, "m", after, action="rollback", bundle=bundle, model_version="1", **facts)


def test_a_bundle_is_down_from_a_rollback_until_it_is_put_back(tmp_path):
    store = LocalStore(tmp_path)
    entry = append(store, append(store, None, "good"), "bad")
    assert find_rolled_back(read_history(store, "m"), "bad") is None
    entry = roll_back(store, entry, "good")
    assert find_rolled_back(read_history(store, "m"), "bad") == entry
    assert find_rolled_back(read_history(store, "m"), "good") is None
    later = append(store, entry, "third")
    assert find_rolled_back(read_history(store, "m"), "bad") == entry, "a later promotion does not raise it"
    later = roll_back(store, later, "bad")
    history = read_history(store, "m")
    assert find_rolled_back(history, "bad") is None, "a person has put it back"
    assert find_rolled_back(history, "third") == later
    append(store, later, "third")
    assert find_rolled_back(read_history(store, "m"), "third") is None


def test_of_several_rollbacks_the_last_one_counts(tmp_path):
    store = LocalStore(tmp_path)
    entry = roll_back(store, append(store, append(store, None, "good"), "bad"), "good")
    entry = roll_back(store, append(store, entry, "bad"), "good")
    assert find_rolled_back(read_history(store, "m"), "bad") == entry
    named = find_rolled_back(read_history(store, "m"), "bad under another card", lambda digest: digest[:3])
    assert named == entry


@pytest.fixture
def long_ledger(tmp_path, monkeypatch):
    """A ledger of 47 entries, in pages of 10."""
    monkeypatch.setattr(entries, "PAGE", 10)
    store, entry = CountingStore(tmp_path), None
    for number in range(1, 48):
        entry = append(store, entry, f"bundle {number}")
    store.forget_counts()
    return store


def test_the_champion_of_a_long_ledger_is_two_reads_and_a_short_list(long_ledger):
    assert read_champion(long_ledger, "m").number == 47
    assert long_ledger.reads == {"ledger": 2}
    assert long_ledger.keys == {"ledger": 8, "ledger-pages": 4}
    long_ledger.forget_counts()
    assert read_champion(long_ledger, "m", since=46).number == 47
    assert (long_ledger.reads, long_ledger.keys) == ({"ledger": 2}, {"ledger": 2})


def test_a_long_ledger_is_read_in_pages(long_ledger):
    assert [one.number for one in read_ledger(long_ledger, "m").entries] == [*range(1, 48)]
    assert long_ledger.reads == {"ledger-pages": 4, "ledger": 7}


def test_one_entry_of_a_long_ledger_is_read_without_the_others(long_ledger):
    assert require_entry(long_ledger, "m", 12).bundle == "bundle 12"
    assert long_ledger.reads == {"ledger": 4}
    with pytest.raises(PromotionError, match="has no entry 48; expected 1 to 47"):
        require_entry(long_ledger, "m", 48)


def test_of_a_long_ledger_no_more_is_read_than_is_asked_for(long_ledger):
    newest = iterate_history(long_ledger, "m")
    assert [next(newest).number for _ in range(3)] == [47, 46, 45]
    assert long_ledger.reads == {"ledger": 6}
    assert [one.number for one in newest] == [*range(44, 0, -1)], "the others are listed when they are asked for"


def test_a_new_page_is_written_without_a_look_into_the_others(long_ledger):
    entry = read_champion(long_ledger, "m")
    for number in (48, 49):
        entry = append(long_ledger, entry, f"bundle {number}")
    long_ledger.forget_counts()
    append(long_ledger, entry, "bundle 50")
    assert long_ledger.reads == {"ledger": 10}
    long_ledger.forget_counts()
    assert len(read_ledger(long_ledger, "m").entries) == 50
    assert long_ledger.reads == {"ledger-pages": 5}


def test_pages_count_only_for_entries_that_are_there(long_ledger):
    """Entry 12 is gone, page 3 is of another name, page 4 is torn: the same as without pages."""
    long_ledger.delete("ledger/m/000012.json")
    long_ledger.put("ledger-pages/m/000004.json", b"[{")
    long_ledger.put("ledger-pages/m/000003.json", long_ledger.get("ledger-pages/m/000003.json").replace(b'"m"', b'"x"'))
    found = read_ledger(long_ledger, "m")
    assert [one.number for one in found.entries] == [number for number in range(1, 48) if number != 12]
    assert found.problems == ("entries are missing: 000012",)


def test_when_the_newest_entries_are_damaged_the_champion_is_an_earlier_one(long_ledger):
    for number in range(38, 48):
        long_ledger.put(f"ledger/m/{number:06d}.json", b"{")
    assert read_champion(long_ledger, "m", since=47).number == 37
    assert read_champion(long_ledger, "m").number == 37


def test_a_ledger_from_before_there_were_pages_gets_them_with_the_next_full_one(tmp_path, monkeypatch):
    store, entry = CountingStore(tmp_path), None
    for number in range(1, 30):
        entry = append(store, entry, f"bundle {number}")
    assert list(store.list("ledger-pages/")) == []
    monkeypatch.setattr(entries, "PAGE", 10)
    append(store, entry, "bundle 30")
    assert list(store.list("ledger-pages/m/")) == [f"ledger-pages/m/{page:06d}.json" for page in (1, 2, 3)]


def test_entry_1000000_is_found_by_who_knows_999999(tmp_path):
    """Its key sorts before the one of entry 999,999."""
    store = LocalStore(tmp_path)
    for number, previous in ((999_999, "zero"), (1_000_000, "one")):
        write_entry(store, number, "one", previous)
    assert read_champion(store, "m", since=999_999).number == 1_000_000


def test_only_the_decisions_about_a_champion_are_read(tmp_path):
    """Of 90 decisions the last 21 are about entry 2, with one about entry 1 that came late among them."""
    store = CountingStore(tmp_path)
    empty = {"rules": (), "metrics": {}, "champion_metrics": {}, "state": {}, "dataset": {}, "run_id": None}
    for number in range(1, 91):
        entry = 2 if number > 68 and number != 80 else 1
        facts = {"name": "m", "number": number, "verdict": "refused", "champion": "b", "decided_at": "now", **empty}
        decision = Decision(candidate=f"c{number}", test_digest="t", num_test=9, entry=entry, **facts)
        store.put(f"decisions/m/{number:06d}.json", json.dumps(decision.to_json()).encode())
    first = append(store, None, "a")
    champion = append(store, first, "b")
    store.forget_counts()
    about = read_decisions_about(store, "m", champion)
    assert [one.number for one in about] == [*range(69, 80), *range(81, 91)]
    assert store.reads == {"decisions": 22 + 50}
