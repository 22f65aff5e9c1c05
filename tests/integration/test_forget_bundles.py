"""Bundles that keep a forgotten image go, but the champion; and a kill at any change is made good by a second run."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fakes import make_bundle
from visionloop.bundle import load_bundle, seal_bundle, upload_bundle
from visionloop.data.manifest import load_pin, make_image_key
from visionloop.data.tombstones import load_unfinished
from visionloop.promotion.ledger import append_entry
from visionloop.records import canonical_json
from visionloop.store import LocalStore
from workspaces import NAME, NOW, Pets, make_pets, open_pets, read_all


@pytest.fixture
def pets(tmp_path: Path) -> Pets:
    return make_pets(tmp_path)


def add_bundle(pets: Pets, seed: int, *, golden: bytes | None = None, embedded: str | None = None) -> str:
    """Put a bundle of version 2 into the store; with a golden image, or an embedding, of a certain image."""
    folder = pets.settings.home / f"bundle-{seed}"
    make_bundle(folder, classes=("cat", "dog"), seed=seed)
    if golden:
        (folder / "golden" / "0.png").write_bytes(golden)
    if embedded:
        names = np.asarray([embedded], dtype="S64")
        np.savez(folder / "reference.npz", embedding_nd=np.zeros((1, 2)), sha256_n=names)
    card = load_bundle(folder, expected_digest=seal_bundle(folder)).card
    pin = load_pin(pets.settings.pin_path)
    dataset = {"name": NAME, "version": pin.version, "digest": pin.digest}
    (folder / "card.json").write_bytes(canonical_json(replace(card, name=NAME, dataset=dataset).to_json()))
    digest = seal_bundle(folder)
    upload_bundle(pets.store, load_bundle(folder))
    return digest


def promote(pets: Pets, digest: str, after: object = None) -> object:
    facts = {"action": "promote", "model_version": "1", "decision": 1, "by": "me", "why": "w", "at": NOW}
    dataset = {"name": NAME, "version": 2}
    return append_entry(pets.store, NAME, after, bundle=digest, dataset=dataset, run_id=f"run-{digest[:4]}", **facts)  # type: ignore[arg-type]


def test_bundles_that_keep_it_go_but_the_champion_which_is_told(pets: Pets) -> None:
    data = pets.store.get(make_image_key(pets.anna.sha256))
    champion = add_bundle(pets, 1, golden=data)
    with_golden, with_embedding = add_bundle(pets, 2, golden=data), add_bundle(pets, 3, embedded=pets.anna.sha256)
    innocent = add_bundle(pets, 4, embedded=pets.rows[6].sha256)
    entry = promote(pets, champion)
    done = pets.forget(pets.anna.sha256)
    in_store = {key.split("/")[1] for key in pets.store.list("bundles/")}
    assert in_store == {champion, innocent}
    told = {left.what: left.todo for left in done.left}
    assert f"bundle {champion[:12]} is the champion and keeps one (golden image or embedding)" in told
    learned = next(what for what in told if what.startswith("models that learned"))
    assert all(digest[:12] in learned for digest in (champion, innocent))
    assert any(f"run-{champion[:4]}" in what for what in told)
    # Another champion, and the image can go from the last one too.
    promote(pets, innocent, entry)
    assert f"bundle {champion[:12]} in the store (no champion; no rollback to it)" in pets.forget().removed
    assert {key.split("/")[1] for key in pets.store.list("bundles/")} == {innocent}
    assert with_golden != with_embedding


def test_a_candidate_and_cached_bundles_that_keep_it_go(pets: Pets) -> None:
    data = pets.store.get(make_image_key(pets.anna.sha256))
    digest = add_bundle(pets, 1, golden=data)
    hidden = pets.settings.hidden_dir
    folders = [hidden / name / digest for name in ("bundles", "bundles-rank2", "serving", "verify-x0")]
    half = hidden / "serving" / f".{digest[:16]}-4711"  # a server that was killed while it fetched the bundle
    for target in (pets.settings.candidate_dir, *folders, half):
        shutil.copytree(pets.settings.home / "bundle-1", target)
    (half / "digests.json").unlink()
    done = pets.forget(pets.anna.sha256)
    assert [path for path in (pets.settings.candidate_dir, *folders, half) if path.exists()] == []
    places = ("models/candidate", *(f".visionloop/{path.parent.name}/{digest}" for path in folders))
    assert {f"bundle {digest[:12]} in {place}" for place in places} <= set(done.removed)
    assert "half a bundle in serving" in done.removed


def test_runs_that_saw_it_are_told_also_those_that_made_no_model(pets: Pets) -> None:
    """MLflow shows a batch of training images with every run."""
    ids = {
        tag: pets.tracking.open_run("r", run_id=None, tags={"visionloop.dataset_version": tag}, params={})
        for tag in ("1", "2", "3")
    }
    pets.tracking.close_run(ids["2"], "KILLED")
    what = f"what MLflow keeps of 2 runs (pictures of batches and mistakes): {ids['1']}, {ids['2']}"
    assert what in [left.what for left in pets.forget(pets.anna.sha256).left]
    pets.tracking.down = True  # type: ignore[attr-defined]
    what = "what MLflow keeps (MLflow memory:// could not be asked for others)"
    assert what in [left.what for left in pets.forget(pets.anna.sha256).left]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class KilledStore(LocalStore):
    """A store whose user is killed when it is about to make its n-th change."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self.left = at

    def _count(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise Killed

    def put(self, key: str, data: bytes) -> None:
        self._count()
        LocalStore.put(self, key, data)

    def create(self, key: str, data: bytes) -> bool:
        self._count()
        return LocalStore.create(self, key, data)

    def purge(self, key: str) -> None:
        self._count()
        LocalStore.delete(self, key)


def test_killed_at_any_change_a_second_run_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStore, "sync", lambda self: None)
    begin = make_pets(tmp_path / "begin")
    add_bundle(begin, 2, golden=begin.store.get(make_image_key(begin.anna.sha256)))
    shutil.copytree(tmp_path / "begin", tmp_path / "whole")
    open_pets(tmp_path / "whole").forget(origins=("photos:anna/*",))
    expected = read_all(tmp_path / "whole" / "store")
    for at in range(1, 100):
        home = tmp_path / str(at)
        shutil.copytree(tmp_path / "begin", home)
        pets = open_pets(home)
        try:
            replace(pets, store=KilledStore(pets.store.root, at)).forget(origins=("photos:anna/*",))
        except Killed:
            begun = bool(load_unfinished(pets.store, NAME))
            pets.forget(origins=() if begun else ("photos:anna/*",))
        else:
            break
        assert read_all(pets.store.root) == expected, f"killed at change {at}"
        assert load_pin(pets.settings.pin_path).version == 3
    assert at > 15
