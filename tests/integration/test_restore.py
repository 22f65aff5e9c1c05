"""A champion that is damaged in the store: found, and put back from any copy; nothing else moves."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from desks import Desk
from visionloop.bundle import download_bundle, load_bundle, seal_bundle, upload_bundle
from visionloop.doctor import Finding, examine
from visionloop.errors import BundleError, PromotionError, TrackingError
from visionloop.predictor import Predictor
from visionloop.promotion.ledger import read_history
from visionloop.promotion.promote import compare_alias
from visionloop.promotion.restore import find_damage, mend, require_whole
from visionloop.retrain import find_unchanged
from visionloop.store import ObjectStore
from worlds import GOOD, POOR


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk(tmp_path)
    desk.crown(POOR)
    desk.crown(GOOD)
    return desk


def flip(store: ObjectStore, key: str) -> None:
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))


def drop_all(store: ObjectStore, folder: str) -> None:
    for key in list(store.list(f"{folder}/")):
        store.delete(key)


DAMAGES: dict[str, tuple[Callable[[ObjectStore, str], None], list[str]]] = {
    "a golden image is gone": (lambda s, f: s.delete(f"{f}/golden/1.png"), ["golden/1.png"]),
    "a byte is flipped": (lambda s, f: flip(s, f"{f}/model.onnx"), ["model.onnx"]),
    "two files": (
        lambda s, f: (s.delete(f"{f}/card.json"), s.put(f"{f}/reference.npz", b""))[0],
        ["card.json", "reference.npz"],
    ),
    "no table": (lambda s, f: s.delete(f"{f}/digests.json"), ["digests.json"]),
    "a torn table": (lambda s, f: s.put(f"{f}/digests.json", b'{"card.json'), ["digests.json"]),
    "a hostile table": (lambda s, f: s.put(f"{f}/digests.json", b'{"../../x": "0", "y": 7}'), ["digests.json"]),
    "nothing is left": (drop_all, ["digests.json"]),
}


def use_candidate(desk: Desk, digest: str) -> None:
    """The trained bundle is still there."""


def use_server_cache(desk: Desk, digest: str) -> None:
    """Another candidate is there; a server has fetched the champion before."""
    download_bundle(desk.store, digest, desk.world.settings.hidden_dir / "serving")
    desk.world.write_candidate(POOR)


@pytest.mark.parametrize("prepare", [use_candidate, use_server_cache])
@pytest.mark.parametrize(("damage", "damaged"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_champion_is_found_and_put_back(
    desk: Desk, damage: Callable[[ObjectStore, str], None], damaged: list[str], prepare: Callable[[Desk, str], None]
) -> None:
    digest = read_history(desk.store, "fake")[-1].bundle
    before = {key: desk.store.get(key) for key in desk.store.list("")}
    prepare(desk, digest)
    damage(desk.store, f"bundles/{digest}")
    assert find_damage(desk.store, digest) == damaged
    with pytest.raises(BundleError, match=r"is missing or differs from its digest in .*`visionloop doctor --fix`"):
        require_whole(desk.store, digest)
    (done,) = mend(desk.place)
    assert done.startswith("restored ") and damaged[0] in done
    assert f"of bundle {digest[:12]} in {desk.store.url}" in done
    assert {key: desk.store.get(key) for key in desk.store.list("")} == before, "the same bytes, and nothing else"
    assert mend(desk.place) == []


def test_without_a_copy_the_champion_stays_damaged_and_the_way_out_is_told(desk: Desk) -> None:
    digest = read_history(desk.store, "fake")[-1].bundle
    desk.world.write_candidate(POOR)
    shutil.rmtree(desk.world.settings.hidden_dir / "bundles", ignore_errors=True)
    for name in ("golden/1.png", "model.onnx"):
        desk.store.delete(f"bundles/{digest}/{name}")
    before = {key: desk.store.get(key) for key in desk.store.list("")}
    with pytest.raises(BundleError, match=r"no copy on this machine has golden/1\.png, model\.onnx; .* rollback`\."):
        mend(desk.place)
    assert {key: desk.store.get(key) for key in desk.store.list("")} == before
    champion = find(desk, "champion")
    assert champion.found.endswith("; no copy on this machine has golden/1.png, model.onnx")
    assert champion.todo.startswith("Run `visionloop doctor --fix` where the model was trained or served, restore ")
    desk.store.delete(f"bundles/{digest}/digests.json")
    assert find(desk, "champion").found.endswith("; no copy on this machine has digests.json")


def test_a_damaged_copy_is_no_copy(desk: Desk) -> None:
    digest = read_history(desk.store, "fake")[-1].bundle
    flip(desk.store, f"bundles/{digest}/card.json")
    path = desk.world.settings.candidate_dir / "card.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"no copy on this machine has card\.json"):
        mend(desk.place)


def test_weights_for_a_warm_start_may_be_missing_and_are_never_wrong(desk: Desk) -> None:
    folder = desk.world.settings.candidate_dir
    (folder / "weights.safetensors").write_bytes(b"weights")
    digest = seal_bundle(folder)
    upload_bundle(desk.store, load_bundle(folder))
    assert find_damage(desk.store, digest) == []
    desk.store.put(f"bundles/{digest}/weights.safetensors", b"others")
    assert find_damage(desk.store, digest) == ["weights.safetensors"]
    desk.store.delete(f"bundles/{digest}/weights.safetensors")
    assert find_damage(desk.store, digest) == []


def find(desk: Desk, subject: str) -> Finding:
    return next(finding for finding in examine(desk.place) if finding.subject == subject)


def test_doctor_sees_the_bundle_the_alias_and_the_ledger(desk: Desk) -> None:
    digest = read_history(desk.store, "fake")[-1].bundle
    assert find(desk, "champion").found == f"bundle {digest[:12]} is whole in the store and answers as it did"
    assert find(desk, "ledger").found == "2 entries of fake, each after the one before"
    assert find(desk, "alias") == Finding("alias", True, "ledger entry 2: model version 2; MLflow's alias: 2", ANY_TODO)
    desk.store.delete(f"bundles/{digest}/golden/1.png")
    desk.tracking.champion = "1"
    desk.store.put("ledger/fake/000001-backup.json", desk.store.get("ledger/fake/000001.json"))
    champion, alias, ledger = find(desk, "champion"), find(desk, "alias"), find(desk, "ledger")
    assert [champion.ok, alias.ok, ledger.ok] == [False, False, False]
    assert "golden/1.png is missing or differs" in champion.found
    assert "`visionloop doctor --fix`" in champion.todo
    assert alias.todo == ANY_TODO
    assert "ledger/fake/000001-backup.json is no ledger entry; entry 2 stays the champion" in ledger.found
    assert len(mend(desk.place)) == 2
    assert [find(desk, subject).ok for subject in ("champion", "alias", "ledger")] == [True, True, False]


ANY_TODO = "Run `visionloop doctor --fix`: it sets the alias again."


def test_after_a_rollback_without_mlflow_the_alias_follows_and_nothing_else_moves(desk: Desk) -> None:
    """The advice was to run `promote`, which made the bad model the champion again."""
    desk.tracking.down = True
    with pytest.raises(TrackingError, match="run `visionloop doctor --fix` when MLflow is back"):
        desk.rollback()
    history = read_history(desk.store, "fake")
    with pytest.raises(TrackingError):
        mend(desk.place)
    desk.tracking.down = False
    assert mend(desk.place) == ["MLflow's alias `champion` is model version 1 (was 2)"]
    assert compare_alias(desk.place) == ("1", "1")
    assert read_history(desk.store, "fake") == history
    assert [entry.action for entry in history] == ["promote", "promote", "rollback"]


def test_without_a_champion_there_is_nothing_to_mend(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert mend(desk.place) == []
    desk.store.put("ledger/fake/000001.json", b"{")
    with pytest.raises(PromotionError, match=r"000001\.json: is damaged"):
        mend(desk.place)


def test_nothing_changed_is_not_said_of_a_damaged_champion(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.pipeline.compute_state", lambda *about: {})
    dataset = {"digest": desk.world.pin.digest}
    unchanged = find_unchanged(desk.place, dataset)
    assert unchanged is not None and unchanged.number == 2
    digest = read_history(desk.store, "fake")[-1].bundle
    desk.store.delete(f"bundles/{digest}/golden/1.png")
    with pytest.raises(BundleError, match=r"golden/1\.png is missing or differs .*`visionloop doctor --fix`"):
        find_unchanged(desk.place, dataset)
    shutil.rmtree(desk.world.settings.candidate_dir)
    with pytest.raises(BundleError, match=rf"bundle {digest[:12]}: is not whole in .* `visionloop doctor --fix`"):
        Predictor.fetch(desk.store, digest, desk.world.settings.home / "empty")
    desk.rollback()
    assert find_unchanged(desk.place, dataset) == unchanged, "what was rolled back from stays down"
