"""From a model back to its images, and from an image forward to the models that used it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from desks import Desk
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.data.known_store import remember_entry
from visionloop.data.manifest import latest_version, make_image_key, make_pin
from visionloop.errors import BundleError, DatasetError, PromotionError, StoreError
from visionloop.lineage import ImagePath, ModelOrigin, describe_origin, describe_path, trace
from visionloop.records import ImageRecord
from workspaces import commit, store_image
from worlds import GOOD, POOR, write_bundle


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Two champions, the second rolled back from; a second dataset version, and a bundle made on it."""
    desk = Desk(tmp_path_factory.mktemp("lineage"))
    desk.crown(POOR, note="run-1")
    desk.crown(GOOD)
    desk.rollback()
    first = latest_version(desk.store, "fake")
    newcomer = store_image(desk.store, 4321, labels=("a",), side="train", sources=("cam",), origins=("cam:new.png",))
    commit(desk.store, desk.world.records, [newcomer], first, name="fake")
    version = latest_version(desk.store, "fake")
    assert version is not None
    folder = desk.world.settings.home / "later"
    write_bundle(folder, make_pin(version), 7)
    upload_bundle(desk.store, load_bundle(folder))
    return desk


def back(desk: Desk, what: str) -> ModelOrigin:
    origin = trace(desk.place, what)
    assert isinstance(origin, ModelOrigin)
    return origin


def forward(desk: Desk, what: str) -> ImagePath:
    path = trace(desk.place, what)
    assert isinstance(path, ImagePath)
    return path


def pick(desk: Desk, side: str) -> ImageRecord:
    return next(record for record in desk.world.records if record.side == side)


def test_a_champion_leads_back_to_its_images(desk: Desk) -> None:
    origin = back(desk, "champion")
    assert [entry.number for entry in origin.entries] == [1, 3]
    assert [(one.number, one.verdict, one.entry) for one in origin.decisions] == [(1, "passed", 0)]
    assert (origin.run_id, origin.is_champion, origin.lost) == ("run-1", True, "")
    assert origin.version is not None and origin.version.digest == desk.world.pin.digest
    assert {image.sha256 for image in origin.images} == {record.sha256 for record in desk.world.records}
    assert json.loads(json.dumps(origin.to_json()))["images"][0]["sha256"] == origin.images[0].sha256
    lines = describe_origin(origin, shown=1)
    assert lines[0] == f"bundle    {origin.digest[:12]} (champion): multiclass, 3 classes: a, b, c"
    assert lines[1] == "ledger    entry 1, promoted by ann on 2026-02-03: because"
    assert lines[2] == "ledger    entry 3, put back by bob on 2026-02-03: it was wrong"
    assert lines[3] == "decision  1: passed against no champion, 80 test images"
    assert (lines[4], origin.to_json()["git_commit"]) == ("run       run-1, no git commit yet", None)
    packed_again = replace(origin, git_commit="0123456789abcdef", network_of="run-0")
    expected = "run       run-1, git commit 0123456789ab, with the network of run run-0"
    assert describe_origin(packed_again)[4] == expected
    assert lines[6] == f"dataset   fake version 1, {desk.world.pin.digest[:12]}: 160 images"
    assert lines[7].startswith(f"image     {origin.images[0].sha256[:12]}  ")
    assert lines[8:] == ["          and 159 more; --json lists all"]


def test_a_model_has_many_names(desk: Desk) -> None:
    first = back(desk, "champion").digest
    second = back(desk, "candidate").digest
    assert first != second
    assert {back(desk, name).digest for name in ("1", "3", "fake@1", "fake@champion", first, first[:12])} == {first}
    folder = str(desk.world.settings.candidate_dir)
    assert {back(desk, name).digest for name in ("2", "fake@2", second[:8], folder)} == {second}
    assert not back(desk, "2").is_champion


def test_an_image_leads_forward_to_the_bundles_that_used_it(desk: Desk, tmp_path: Path) -> None:
    first, second = back(desk, "1").digest, back(desk, "2").digest
    later = load_bundle(desk.world.settings.home / "later").digest
    for side, use in (("train", "trained on it"), ("test", "judged on it")):
        record = pick(desk, side)
        file = tmp_path / f"{side}.png"
        file.write_bytes(desk.store.get(make_image_key(record.sha256)))
        path = forward(desk, str(file))
        assert path == forward(desk, record.sha256) == forward(desk, record.sha256[:16])
        assert path == forward(desk, record.origins[0])
        assert [number for number, _ in path.rows] == [1, 2]
        assert {(one.bundle, one.version, one.side) for one in path.uses} == {
            (first, 1, side),
            (second, 1, side),
            (later, 2, side),
        }
        assert {one.bundle: one.marks for one in path.uses} == {first: ("champion",), second: ("candidate",), later: ()}
        lines = describe_path(path)
        assert f"bundle    {first[:12]} (champion): {use} (dataset version 1)" in lines
        assert json.loads(json.dumps(path.to_json()))["bundles"][0]["use"] == use


def test_a_newer_image_has_been_seen_by_newer_bundles_only(desk: Desk) -> None:
    path = forward(desk, "cam:new.png")
    assert [number for number, _ in path.rows] == [2]
    assert [one.bundle for one in path.uses] == [load_bundle(desk.world.settings.home / "later").digest]


def test_a_candidate_that_was_not_promoted_is_remembered_by_its_decision(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.crown(GOOD)
    digest = desk.judge(POOR, floors={"accuracy": 0.999})
    record = pick(desk, "train")
    shutil.rmtree(desk.world.settings.candidate_dir)  # the next training starts
    marks = {use.bundle: use.marks for use in forward(desk, record.sha256).uses}
    assert marks[digest] == ("not kept; decision 2: refused",)
    with pytest.raises(BundleError) as caught:
        trace(desk.place, digest[:12])
    assert str(caught.value) == (
        f"bundle {digest[:12]}: was not kept: decision 2 on dataset version 1 is refused; expected a registered "
        "bundle, or the one in models/candidate. See decisions/000002.html and `visionloop runs`."
    )
    again = desk.judge(POOR, floors={"accuracy": 0.999})
    assert back(desk, again[:12]).decisions[0].verdict == "refused", "as long as it is the candidate"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "does not hold ledger entry 2 of fake as it was seen: it is damaged"),
        (b'{"number": 2', "does not hold ledger entry 2 of fake as it was seen: it is damaged"),
        (b'{"number": 2}', "does not hold ledger entry 2 of fake as it was seen: this is another ledger"),
        (None, "does not hold ledger entry 2 of fake (the last one there is 1)"),
    ],
)
def test_a_ledger_that_was_damaged_names_no_champion_of_before(tmp_path: Path, data: bytes | None, said: str) -> None:
    desk = Desk(tmp_path)
    desk.crown(GOOD)
    desk.crown(POOR)
    remember_entry(desk.place)
    assert back(desk, "champion").entries[-1].number == 2
    desk.store.delete("ledger/fake/000002.json")
    if data is not None:
        desk.store.put("ledger/fake/000002.json", data)
    with pytest.raises(StoreError) as caught:
        trace(desk.place, "champion")
    assert said in str(caught.value)
    assert ("Restore it from the store's backup." in str(caught.value)) == said.endswith("damaged")


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        (
            "nothing",
            DatasetError,
            "names no model and no image; expected champion, candidate, NAME@3, a ",
        ),
        ("", DatasetError, "lineage '': names no model and no image"),
        ("9", PromotionError, "ledger fake: has no entry 9"),
        ("other@champion", PromotionError, "knows no 'other'; expected one of fake"),
        ("nosuch@3", PromotionError, "lineage 'nosuch@3': the store "),
        ("f" * 64, DatasetError, "image ffffffffffff: is in no version of dataset fake"),
        ("../../etc", DatasetError, "names no model and no image"),
    ],
)
def test_what_is_neither_is_one_clear_line(desk: Desk, what: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=r"\A[^\n]*\Z") as caught:
        trace(desk.place, what)
    assert said in str(caught.value)


def test_a_lost_version_and_a_lost_card_are_told(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    digest = desk.crown(GOOD)
    desk.tracking.down = True
    desk.store.delete("datasets/fake/000001.json")
    origin = back(desk, "champion")
    assert (origin.version, origin.images, origin.run_id) == (None, (), None)
    assert origin.lost.startswith("dataset fake version 1 is not in the store")
    assert any("(dataset fake version 1 is not in the store" in line for line in describe_origin(origin))
    assert "run       not known here, git commit not known" in describe_origin(origin)
    desk.store.put(f"bundles/{digest}/card.json", b"[]")
    with pytest.raises(BundleError, match="has no readable card in the store"):
        trace(desk.place, "champion")
