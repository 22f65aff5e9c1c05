"""The ledger with several writers: each number has one winner, and none is overwritten or skipped."""

import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from visionloop.errors import PromotionError
from visionloop.promotion.ledger import append_entry, read_champion, read_history
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


def test_a_million_entries_stay_in_order(tmp_path):
    store = LocalStore(tmp_path)
    entry = append(store, None, "one")
    for number in (999_999, 1_000_000):
        store.put(f"ledger/m/{number:06d}.json", json.dumps({**entry.to_json(), "number": number}).encode())
    assert [e.number for e in read_history(store, "m")] == [1, 999_999, 1_000_000]
    assert read_champion(store, "m").number == 1_000_000


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"name": "m"}'])
def test_a_damaged_entry_is_named(tmp_path, data):
    store = LocalStore(tmp_path)
    store.put("ledger/m/000001.json", data)
    with pytest.raises(PromotionError, match=r"ledger/m/000001\.json: is damaged"):
        read_champion(store, "m")
