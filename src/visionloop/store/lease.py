"""One retrain of a name at a time: a lease in the store, kept by a heartbeat, with a number that rises (fencing).

    leases/NAME/000007.json   a claim: who holds it, and its beat; the claim with the highest number holds the lease

A claim is created conditionally, under the next number; only its holder changes it after that: beat 1, 2, 3, at last
that it ended. The clocks of two machines are never compared. Whoever waits takes a holder for dead when its claim has
not changed while the waiter has slept for `ttl_s` in all, or when it is a process of this machine that is gone. What
the store takes to answer does not count: a store that hangs for a minute hangs for the holder, too.

    machine a holds 000007: beat 1, 2, 3; then it is paused
    machine b reads 000007 each second, for 60 s the same bytes; it creates 000008, and trains
    machine a goes on, and wants to promote: `check` finds 000008 and raises LeaseLost

Between a `check` and the write that follows it another one may take over. So what is written must be conditional, too:
a ledger entry is created under the number after the champion's, which was read before the check.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from visionloop.errors import LeaseHeld, LeaseLost, ObjectMissing, StoreError
from visionloop.lifetime import find_machine, find_process_start, has_ended
from visionloop.records import Record, canonical_json
from visionloop.store import ObjectStore
from visionloop.store.keys import make_number_key, split_numbers

TTL_S = 60.0
BEATS = 6  # in a time to live: this many fail before a holder is taken for dead
POLL_S = 1.0
LONGEST_TTL_S = 600.0  # what a claim may ask for: one written by hand must not hold for ever
SCHEMA = 1
SHOWN_CHARS = 60
CLOSE_WAIT_S = 5.0
EPSILON_S = 1e-6


@dataclass(frozen=True)
class Claim(Record):
    """One claim to the lease: who holds it, and how often it said so.

    `machine` and `process_start` tell on the same machine whether the process still runs; "" where it cannot be told.
    `run` is what its scheduler calls the run, "" for one from the shell.
    """

    number: int
    token: str = ""
    who: str = "somebody"
    host: str = "an unknown machine"
    pid: int = 0
    machine: str = ""
    process_start: str = ""
    run: str = ""
    started_at: str = ""
    ttl_s: float = TTL_S
    beat: int = 0
    ended: bool = False
    schema: int = SCHEMA

    def __str__(self) -> str:
        run = f", run {self.run}" if self.run else ""
        since = f" since {self.started_at}" if self.started_at else ""
        return f"{self.who} on {self.host} (process {self.pid or '?'}{run}){since}"

    @property
    def is_dead(self) -> bool:
        """Whether it can be told at once that its process is gone: it was one of this machine."""
        here = bool(self.machine) and self.machine == find_machine()
        return here and has_ended(self.pid, self.process_start)


def make_claim(who: str, now: str, *, run: str = "", ttl_s: float = TTL_S) -> Claim:
    """Return the claim of this process, without a number yet. `now`: the time to show."""
    pid = os.getpid()
    return Claim(
        number=0,
        token=secrets.token_hex(16),
        who=who,
        host=socket.gethostname(),
        pid=pid,
        machine=find_machine(),
        process_start=find_process_start(pid),
        run=run,
        started_at=now,
        ttl_s=ttl_s,
    )


class Lease:
    """The lease, held by this process. Threads may share it."""

    def __init__(self, store: ObjectStore, name: str, claim: Claim, died: tuple[Claim, ...]) -> None:
        """Describe a claim that was created; `died` are earlier ones whose holders did not end them."""
        self.store, self.name, self.claim, self.died = store, name, claim, died
        self._lost: LeaseLost | None = None
        self._on_lost: Callable[[], object] = lambda: None
        self._lock, self._ended = threading.Lock(), threading.Event()

    def require_held(self) -> None:
        """Raise LeaseLost if it is known to be lost; asks nobody."""
        if self._lost:
            raise self._lost

    def check(self) -> None:
        """Ask the store whether this is still the highest claim. To be called right before something is changed.

        Raises:
            LeaseLost: it is not; or the store does not say, which may pass (transient).
        """
        self.require_held()
        try:
            top = _read_top(self.store, self.name)
        except (StoreError, OSError) as exc:
            found = f"cannot be read, so another one may hold it ({exc})"
            error = LeaseLost(self._where, found, "a store that answers", "Run the same command again: it goes on.")
            error.transient = True
            raise error from exc
        if top is None or top[0].token != self.claim.token:
            found = f"taken over by {top[0]}, lease {top[0].number}" if top else "removed from the store"
            by = "overwritten in the store" if top and top[0].number == self.claim.number else found
            todo = "Nothing was promoted by this one. Run the same command again when the other has ended."
            self._lost = LeaseLost(self._where, by, "to hold it until the end", todo)
            raise self._lost

    def renew(self) -> None:
        """Show that this process lives. Raises LeaseLost, StoreError."""
        with self._lock:
            self.check()
            self.claim = replace(self.claim, beat=self.claim.beat + 1)
            self._write()

    def end(self) -> None:
        """Give the lease back, so that the next one need not wait. Does nothing if it is lost, or the store away."""
        if self._lock.acquire(timeout=CLOSE_WAIT_S):
            with contextlib.suppress(LeaseLost, StoreError):
                self.check()
                self.claim = replace(self.claim, ended=True)
                self._write()
            self._lock.release()

    def stop_when_lost(self, stop: Callable[[], object]) -> None:
        """Have what is being done stopped when the lease is lost; the newest replaces the one before."""
        self._on_lost = stop
        if self._lost:
            stop()

    def forget(self, claim: Claim) -> None:
        """Remove a claim that ended, or whose runs are closed. Raises StoreError."""
        self.store.delete(make_number_key(_folder(self.name), claim.number))

    def __enter__(self) -> Self:
        """Keep it, by a thread that renews it until it is given back."""
        threading.Thread(target=self._beat, daemon=True, name="lease").start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.end()

    def _beat(self) -> None:
        """Renew until the end, or until it is lost; while the store is away it is tried again."""
        while not self._ended.wait(self.claim.ttl_s / BEATS):
            try:
                self.renew()
            except LeaseLost as exc:
                if not exc.transient:
                    self._on_lost()
                    return
            except Exception:  # also one that nobody has thought of: a thread that ends would give the lease away
                continue

    @property
    def _where(self) -> str:
        return f"lease {self.claim.number} of {self.name}"

    def _write(self) -> None:
        self.store.put(make_number_key(_folder(self.name), self.claim.number), canonical_json(self.claim.to_json()))


def take_lease(
    store: ObjectStore,
    name: str,
    claim: Claim,
    *,
    tell: Callable[[str], None] = lambda line: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Create the next claim, once the one before has ended or is dead. `tell` gets a line while this waits.

    Raises:
        LeaseHeld: the holder lives: its claim has changed while this waited, or another one was faster.
        StoreError: the store cannot be read or written.
    """
    number = wait_for_lease(store, name, tell=tell, sleep=sleep) + 1
    claim = replace(claim, number=number)
    key = make_number_key(_folder(name), number)
    if not store.create(key, canonical_json(claim.to_json())):
        raise _make_held(name, _read_claim(store, name, number))
    top = _read_top(store, name)
    if top is None or top[0].token != claim.token:  # the number was free again: it had been used and removed
        store.delete(key)  # or it would be taken for one that died
        raise _make_held(name, top[0] if top else Claim(number))
    return Lease(store, name, claim, _clear(store, name, number))


def wait_for_lease(
    store: ObjectStore,
    name: str,
    *,
    tell: Callable[[str], None] = lambda line: None,
    sleep: Callable[[float], None] = time.sleep,
    only_here: bool = False,
) -> int:
    """Wait until the highest claim has ended or is dead; return its number, 0 where there is none.

    `only_here`: a holder on another machine is not waited for. Raises LeaseHeld, StoreError.
    """
    seen: bytes | None = None
    slept = 0.0
    while True:
        top = _read_top(store, name)
        if top is None or top[0].ended or top[0].is_dead or (only_here and top[0].machine != find_machine()):
            return top[0].number if top else 0
        holder, data = top
        if seen is None:
            seen = data
            limit = f"for up to {holder.ttl_s:.0f} s"
            tell(f"another retrain of {name} holds the lease: {holder}; looking {limit} whether it lives ...")
        elif data != seen:
            raise _make_held(name, holder)
        elif slept >= holder.ttl_s - EPSILON_S:
            tell(f"it has not moved for {holder.ttl_s:.0f} s: this one takes over")
            return holder.number
        pause_s = min(POLL_S, holder.ttl_s / BEATS)
        sleep(pause_s)
        slept += pause_s


def read_holder(store: ObjectStore, name: str) -> Claim | None:
    """Return who seems to be at a retrain: a claim that was not ended, of no dead process of this machine.

    Waits for nothing; so one that died on another machine is returned too.
    """
    top = _read_top(store, name)
    return None if top is None or top[0].ended or not top[0].token or top[0].is_dead else top[0]


def _clear(store: ObjectStore, name: str, number: int) -> tuple[Claim, ...]:
    """Remove the claims below a number that ended; return the others, whose runs are still to be closed."""
    died = []
    for old in (n for n in _list_numbers(store, name) if n < number):
        with contextlib.suppress(StoreError):
            claim = _read_claim(store, name, old)
            if claim.ended or not claim.token:
                store.delete(make_number_key(_folder(name), old))
            else:
                died.append(claim)
    return tuple(died)


def _read_top(store: ObjectStore, name: str) -> tuple[Claim, bytes] | None:
    """Return the highest claim and its bytes, or None."""
    for number in reversed(_list_numbers(store, name)):
        with contextlib.suppress(ObjectMissing):  # removed since it was listed
            data = store.get(make_number_key(_folder(name), number))
            return _parse(number, data), data
    return None


def _read_claim(store: ObjectStore, name: str, number: int) -> Claim:
    try:
        return _parse(number, store.get(make_number_key(_folder(name), number)))
    except ObjectMissing:
        return Claim(number)


def _parse(number: int, data: bytes) -> Claim:
    """Return a claim; of what is none, or of a newer version, one that says nothing of itself: it is waited for."""
    try:
        value = json.loads(data)
        claim = Claim.from_json({**value, "number": number})
        if claim.schema > SCHEMA or not all(type(v) is type(d) for v, d in _pair_with_defaults(claim)):
            return Claim(number)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return Claim(number)
    texts: dict[str, Any] = {f.name: _show(getattr(claim, f.name)) for f in fields(Claim) if f.type is str}
    ttl_s = min(claim.ttl_s, LONGEST_TTL_S) if claim.ttl_s > 0 else TTL_S  # not a number is not above 0, either
    return replace(claim, **texts, ttl_s=ttl_s)


def _pair_with_defaults(claim: Claim) -> Iterator[tuple[Any, Any]]:
    for one in fields(Claim)[1:]:
        yield getattr(claim, one.name), one.default


def _show(text: str) -> str:
    """Return a text from the store as it can be printed: one line, no control characters, cut."""
    return "".join(c if c.isprintable() else "?" for c in text[:SHOWN_CHARS])


def _list_numbers(store: ObjectStore, name: str) -> list[int]:
    return split_numbers(store.list(f"{_folder(name)}/"), _folder(name))[0]


def _folder(name: str) -> str:
    return f"leases/{name}"


def _make_held(name: str, holder: Claim) -> LeaseHeld:
    return LeaseHeld(f"retrain of {name}", f"{holder} is at it", "one at a time", "Wait for it, or stop it.")
