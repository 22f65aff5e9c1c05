"""One retrain at a time: with a clock that the tests turn, and processes that stop where the tests say."""

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from visionloop.errors import LeaseHeld, LeaseLost, StoreError
from visionloop.lifetime import find_process_start
from visionloop.records import canonical_json
from visionloop.store import LocalStore, ObjectStore
from visionloop.store.lease import Claim, Lease, make_claim, take_lease, wait_for_lease

NAME = "pets"
NOW = "2026-11-28T03:00:00+00:00"


class Clock:
    """A clock that only `sleep` moves; what is due by then happens while the one who waits sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.due: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.due()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def make_foreign_claim(who: str = "ann") -> Claim:
    """The claim of a process on another machine: whether it lives can only be seen from its beat."""
    return replace(make_claim(who, NOW), host=f"host-of-{who}", machine=f"machine of {who}", pid=4711)


def take(store: ObjectStore, clock: Clock, who: str = "ben", told: list[str] | None = None) -> Lease:
    tell = (lambda line: None) if told is None else told.append
    return take_lease(store, NAME, make_foreign_claim(who), tell=tell, sleep=clock.sleep)


def list_claims(store: ObjectStore) -> list[str]:
    return [key.removeprefix(f"leases/{NAME}/") for key in store.list("leases/")]


def test_numbers_rise_and_one_claim_is_kept(store: LocalStore) -> None:
    clock = Clock()
    for number in (1, 2, 3):
        lease = take(store, clock)
        assert (lease.claim.number, lease.died) == (number, ())
        lease.check()
        lease.end()
    assert list_claims(store) == ["000003.json"]
    assert clock.now == 1000.0, "nobody waited"


def test_a_holder_that_lives_refuses_the_next_and_is_told(store: LocalStore) -> None:
    clock, told = Clock(), []  # type: ignore[var-annotated]
    first = take(store, clock, "ann")
    clock.due = lambda: first.renew() if clock.now >= 1010 else None
    with pytest.raises(LeaseHeld) as caught:
        take(store, clock, "ben", told)
    assert 1010 <= clock.now <= 1012, "it is refused by the first beat"
    holder = f"ann on host-of-ann (process 4711) since {NOW}"
    assert str(caught.value) == f"retrain of pets: {holder} is at it; expected one at a time. Wait for it, or stop it."
    assert told == [f"another retrain of pets holds the lease: {holder}; looking for up to 60 s whether it lives ..."]
    first.check()


def test_a_dead_holder_is_replaced_after_its_time_to_live(store: LocalStore) -> None:
    clock, told = Clock(), []  # type: ignore[var-annotated]
    first = take(store, clock, "ann")
    first.renew()
    second = take(store, clock, "ben", told)
    assert 1060 <= clock.now <= 1062
    assert told[-1] == "it has not moved for 60 s: this one takes over"
    assert (second.claim.number, [str(claim) for claim in second.died]) == (2, [str(first.claim)])
    second.check()
    lost = f"lease 1 of pets: taken over by ben on host-of-ben (process 4711) since {NOW}, lease 2; expected to hold it"
    for use in (first.check, first.renew, first.require_held):
        with pytest.raises(LeaseLost, match="lease 1 of pets: taken over by ben") as caught:
            use()
        assert str(caught.value).startswith(lost)
    first.end()
    assert list_claims(store) == ["000001.json", "000002.json"], "the dead claim waits until its runs are closed"
    second.forget(second.died[0])
    second.end()
    assert take(store, clock).died == ()


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(store: LocalStore) -> None:
    clock = Clock()
    code = (
        "import sys; from pathlib import Path; from visionloop.store import LocalStore;"
        "from visionloop.store.lease import make_claim, take_lease;"
        f"print(take_lease(LocalStore(Path(sys.argv[1])), 'pets', make_claim('ann', '{NOW}')).claim.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store.root)], capture_output=True, text=True, check=True)
    lease = take(store, clock)
    assert (lease.claim.number, [c.pid for c in lease.died], clock.now) == (2, [int(done.stdout)], 1000.0)


def test_a_process_of_this_machine_that_lives_is_looked_at_as_any_other(store: LocalStore) -> None:
    """It may have stopped to beat; and a number of a process is given again."""
    clock = Clock()
    mine = take_lease(store, NAME, make_claim("ann", NOW))
    assert mine.claim.process_start == find_process_start(os.getpid()) != ""
    assert not mine.claim.is_dead
    assert replace(mine.claim, process_start="1").is_dead, "another process has the number"
    assert not replace(mine.claim, process_start="1", machine="").is_dead, "where nothing is known of the machine"
    assert take(store, clock).claim.number == 2
    assert clock.now >= 1060


@pytest.mark.parametrize(("answer", "is_dead"), [(PermissionError, False), (ProcessLookupError, True)])
def test_a_process_that_proc_does_not_show_may_live(
    monkeypatch: pytest.MonkeyPatch, answer: type[OSError], is_dead: bool
) -> None:
    """With `hidepid` /proc hides the processes of other users, who may share the store."""

    def kill(pid: int, number: int) -> None:
        raise answer(pid, number)

    monkeypatch.setattr("visionloop.lifetime.find_process_start", lambda pid: "")
    monkeypatch.setattr("visionloop.lifetime.os.kill", kill)
    assert replace(make_claim("ann", NOW), pid=4711, process_start="17").is_dead is is_dead


def test_a_store_that_hangs_makes_no_holder_dead(store: LocalStore) -> None:
    """It hangs for the holder too, who could not say that it lives."""
    clock, get = Clock(), store.get
    take(store, clock, "ann")
    clock.due = lambda: store.put(f"leases/{NAME}/000001.json", b"{}") if clock.now > 1160 else None
    store.get = lambda key: (get(key), clock.sleep(50))[0]  # type: ignore[method-assign]
    with pytest.raises(LeaseHeld):
        take(store, clock, "ben")
    assert clock.now > 1160


def test_a_claim_under_a_number_that_was_free_again_is_taken_back(store: LocalStore) -> None:
    """While this one was paused, others have used the number, ended, and removed it."""
    create, other = store.create, canonical_json(make_foreign_claim("eve").to_json())
    key = f"leases/{NAME}/000004.json"
    store.create = lambda *claim: (store.put(key, other), create(*claim))[1]  # type: ignore[method-assign]
    with pytest.raises(LeaseHeld, match="eve on host-of-eve"):
        take(store, Clock())
    assert list_claims(store) == ["000004.json"], "nobody takes it for one that died"


def test_another_machine_is_not_waited_for_where_only_this_one_counts(store: LocalStore) -> None:
    clock = Clock()
    take(store, clock)
    assert wait_for_lease(store, NAME, sleep=clock.sleep, only_here=True) == 1
    assert clock.now == 1000.0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"\xff\xfe",
        b'{"number": "x", "ttl_s": NaN}',
        canonical_json({**make_foreign_claim().to_json(), "ttl_s": 0.0}),
        canonical_json({**make_foreign_claim().to_json(), "ttl_s": "60"}),
        canonical_json({**make_foreign_claim().to_json(), "ended": "no"}),
        canonical_json({**make_foreign_claim().to_json(), "schema": 2, "ended": True}),
        canonical_json({"token": "a", "ended": 1}),
        b"[" * 100_000,
    ],
)
def test_a_claim_that_cannot_be_read_is_waited_for_once(store: LocalStore, data: bytes) -> None:
    store.put(f"leases/{NAME}/000041.json", data)
    clock = Clock()
    lease = take(store, clock)
    assert (lease.claim.number, 1060 <= clock.now <= 1062) == (42, True)
    lease.check()


def test_a_claim_by_hand_cannot_hold_for_ever_nor_write_to_the_terminal(store: LocalStore) -> None:
    value = make_foreign_claim("a\x1b[2Jb\n" + "x" * 10_000).to_json()
    store.put(f"leases/{NAME}/000001.json", canonical_json({**value, "ttl_s": 1e300, "later": "field"}))
    store.put(f"leases/{NAME}/000009.json.bak", b"a copy")
    clock, told = Clock(), []  # type: ignore[var-annotated]
    assert take(store, clock, "ben", told).claim.number == 2
    assert 1600 <= clock.now <= 1602
    assert "\x1b" not in told[0]
    assert len(told[0]) < 400


def test_a_holder_whose_claim_is_removed_or_overwritten_has_lost_it(store: LocalStore) -> None:
    lease = take(store, Clock())
    store.put(f"leases/{NAME}/000001.json", b"{}")
    with pytest.raises(LeaseLost, match=r"lease 1 of pets: overwritten in the store; expected"):
        lease.renew()
    assert store.get(f"leases/{NAME}/000001.json") == b"{}", "it touches nothing any more"
    other = take(store, Clock())
    store.delete(f"leases/{NAME}/000002.json")
    store.delete(f"leases/{NAME}/000001.json")
    with pytest.raises(LeaseLost, match="lease 2 of pets: removed from the store"):
        other.check()


class AwayStore(LocalStore):
    """A store that can be out of reach."""

    away = False

    def get(self, key: str) -> bytes:
        self._fail()
        return super().get(key)

    def put(self, key: str, data: bytes) -> None:
        self._fail()
        super().put(key, data)

    def _fail(self) -> None:
        if self.away:
            raise StoreError("store s3://away", "does not answer", "an answer")


def test_a_store_that_is_away_ends_nothing_by_itself_but_nothing_is_promoted(tmp_path: Path) -> None:
    store = AwayStore(tmp_path)
    with take_lease(store, NAME, make_claim("ann", NOW, ttl_s=0.06)) as lease:
        store.away = True
        with pytest.raises(LeaseLost, match=r"cannot be read, so another one may hold it \(store s3://away") as caught:
            lease.check()
        assert caught.value.transient, "it is tried again"
        threading.Event().wait(0.1)
        lease.require_held()
        beat, store.away = lease.claim.beat, False
        assert wait_until(lambda: lease.claim.beat > beat), "it goes on when the store is back"
        lease.check()
    assert json.loads(store.get(f"leases/{NAME}/000001.json"))["ended"] is True


def test_what_is_being_done_is_stopped_when_the_lease_is_lost(store: LocalStore) -> None:
    stopped = threading.Event()
    with take_lease(store, NAME, make_claim("ann", NOW, ttl_s=0.06)) as lease:
        lease.stop_when_lost(stopped.set)
        assert wait_until(lambda: lease.claim.beat > 1)
        assert not stopped.is_set()
        store.put(f"leases/{NAME}/000002.json", canonical_json(replace(make_foreign_claim(), number=2).to_json()))
        assert stopped.wait(5)
        again = threading.Event()
        lease.stop_when_lost(again.set)
        assert again.is_set(), "what begins after that is stopped, too"
    assert json.loads(store.get(f"leases/{NAME}/000001.json"))["ended"] is False


def test_an_error_that_nobody_has_thought_of_does_not_give_the_lease_away(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with take_lease(store, NAME, make_claim("ann", NOW, ttl_s=0.06)) as lease:
        with monkeypatch.context() as patch:
            patch.setattr(lease, "_write", lambda: {}["no such key"])
            threading.Event().wait(0.1)
        beat = lease.claim.beat
        assert wait_until(lambda: lease.claim.beat > beat + 1)
        assert wait_until(lambda: json.loads(store.get(f"leases/{NAME}/000001.json"))["beat"] > beat)


def wait_until(holds: Callable[[], bool], limit_s: float = 60) -> bool:
    for _ in range(int(limit_s / 0.01)):
        if holds():
            return True
        threading.Event().wait(0.01)
    return False


def test_a_store_that_cannot_be_written(store: LocalStore) -> None:
    store.root.mkdir()
    (store.root / "leases").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match="cannot reach"):
        take(store, Clock())


class Killed(BaseException):
    """The process is gone at this line."""


class Turns(LocalStore):
    """A store that lets another contender go on, or kills this one, before any of its calls."""

    def __init__(self, root: Path, turn: Callable[[], None]) -> None:
        super().__init__(root)
        self.turn = turn

    def get(self, key: str) -> bytes:
        self.turn()
        return super().get(key)

    def put(self, key: str, data: bytes) -> None:
        self.turn()
        super().put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self.turn()
        return super().create(key, data)


class World:
    """Contenders in threads of which one at a time runs; who is next, who is paused, who dies is drawn by the seed."""

    def __init__(self, root: Path, seed: int, number: int) -> None:
        self.root, self.rng, self.now = root, random.Random(seed), 0.0
        self.promoted: list[int] = []
        self.holders: list[int] = []
        self.fenced = 0
        self.ready = [threading.Semaphore(0) for _ in range(number)]
        self.living = list(range(number))
        self.asleep_until = [0.0] * number
        self.back = threading.Semaphore(0)
        self.mistakes: list[BaseException] = []

    def run(self) -> None:
        threads = [threading.Thread(target=self.contend, args=(k,), daemon=True) for k in self.living]
        for thread in threads:
            thread.start()
        while self.living:
            awake = [k for k in self.living if self.asleep_until[k] <= self.now]
            if not awake:
                self.now = min(self.asleep_until[k] for k in self.living)
                continue
            chosen = self.rng.choice(awake)
            self.ready[chosen].release()
            assert self.back.acquire(timeout=120), "a contender hangs"
        if self.mistakes:
            raise self.mistakes[0]

    def give_way(self, k: int) -> None:
        """Before a call: time passes, and this contender may be paused for longer than the time to live, or killed."""
        draw = self.rng.random()
        self.now += self.rng.uniform(0, 0.5)
        if draw < 0.03:
            raise Killed
        self.sleep(k, self.rng.uniform(0, 200) if draw < 0.12 else 0)

    def sleep(self, k: int, seconds: float) -> None:
        self.asleep_until[k] = self.now + seconds
        self.back.release()
        assert self.ready[k].acquire(timeout=120)

    def contend(self, k: int) -> None:
        self.ready[k].acquire()
        try:
            for _ in range(5):
                self.sleep(k, self.rng.uniform(0, 150))  # until the next one is due
                self.try_once(k)
        except Killed:
            pass
        except BaseException as exc:
            self.mistakes.append(exc)
        self.living.remove(k)
        self.back.release()

    def try_once(self, k: int) -> None:
        store = Turns(self.root, lambda: self.give_way(k))
        claim = replace(make_foreign_claim(f"c{k}"), ttl_s=6.0)  # who waits looks six times
        try:
            lease = take_lease(store, NAME, claim, sleep=lambda s: self.sleep(k, s))
        except LeaseHeld:
            return
        number = lease.claim.number
        self.holders.append(number)
        try:
            for _ in range(self.rng.randrange(8)):
                self.sleep(k, 1)
                lease.renew()
            self.sleep(k, self.rng.choice((0, 0, 600)))  # the machine sleeps, and with it the thread that renews
            after = sorted(store.list("ledger/"))
            lease.check()
            if store.create(f"ledger/{len(after) + 1:06d}", str(number).encode()):
                self.promoted.append(number)
        except LeaseLost:
            self.fenced += 1
            return
        lease.end()


def test_of_many_contenders_with_pauses_and_kills_no_older_one_promotes_after_a_newer(tmp_path: Path) -> None:
    fenced = promoted = 0
    for seed in range(25):
        world = World(tmp_path / str(seed), seed, number=4)
        world.run()
        assert len(set(world.holders)) == len(world.holders), f"seed {seed}: two believe to hold one number"
        assert world.promoted == sorted(set(world.promoted)), f"seed {seed}: {world.promoted}"
        fenced, promoted = fenced + world.fenced, promoted + len(world.promoted)
    assert min(fenced, promoted) > 15, f"pauses that matter ({fenced}), and promotions ({promoted})"
