"""POST /similar: the validation images of the model that are nearest to an image."""

import gc
import io
import shutil
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fakes import make_bundle, make_image
from visionloop.bundle import Bundle, seal_bundle
from visionloop.data.manifest import make_image_key
from visionloop.data.tombstones import make_tombstone_key
from visionloop.errors import StoreError
from visionloop.predictor import Predictor
from visionloop.serving import similar
from visionloop.serving.app import make_app
from visionloop.serving.swap import ModelSlot, ServedModel
from visionloop.store import LocalStore

SEEDS = range(10, 30)


def make_model(folder: Path, **arrays: Any) -> ServedModel:
    """Make a model whose validation images are those of SEEDS; `arrays` stand for some of its reference."""
    make_bundle(folder, task=arrays.pop("task", None))
    images = [make_image(seed) for seed in SEEDS]
    predictor = Predictor.load(folder, threads=1)
    found = list(predictor.embed_each(images))
    whole = {
        "embedding_nd": np.stack([one for one in found if isinstance(one, np.ndarray)]),
        "label_n": np.arange(len(SEEDS)) % 3,
        "sha256_n": np.array([f"{seed:064x}" for seed in SEEDS], "S64"),
    }
    np.savez(folder / "reference.npz", **{k: v for k, v in (whole | arrays).items() if v is not None})
    seal_bundle(folder)
    return ServedModel(Predictor.load(folder, threads=1))


@pytest.fixture
def slot(tmp_path: Path) -> ModelSlot:
    return ModelSlot(make_model(tmp_path / "bundle"))


@pytest.fixture
def client(slot: ModelSlot) -> Iterator[TestClient]:
    with TestClient(make_app(slot)) as client:
        yield client


def test_an_image_finds_itself_first_and_others_by_distance(client: TestClient, slot: ModelSlot) -> None:
    answer = client.post("/similar?k=20", content=make_image(14)).json()
    found = answer["neighbours"]
    assert found[0] == {
        "sha256": f"{14:064x}",
        "labels": ["b"],
        "distance": pytest.approx(0, abs=1e-6),
        "image": f"/images/{14:064x}?px=256",
    }
    assert len(found) == 20
    distances = [each["distance"] for each in found]
    assert distances == sorted(distances)
    assert slot.current
    unit = np.stack(list(slot.current.predictor.embed_each([make_image(14), make_image(int(found[7]["sha256"], 16))])))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert found[7]["distance"] == pytest.approx(1 - float(unit[0] @ unit[1]), abs=1e-5)
    assert answer["model"]["digest"] == slot.current.digest


def test_of_several_files_a_broken_one_spoils_no_other(client: TestClient) -> None:
    sent = [("file", ("a.png", make_image(11))), ("file", ("b.png", b"text")), ("file", ("c.png", make_image(12)))]
    results = client.post("/similar?k=1", files=sent).json()["results"]
    assert [r["neighbours"][0]["sha256"] for r in (results[0], results[2])] == [f"{11:064x}", f"{12:064x}"]
    assert results[1]["error"]["code"] == "not_an_image"


@pytest.mark.parametrize("k", ["0", "101", "x", "-1", "1e9"])
def test_a_number_that_is_none_is_refused(client: TestClient, k: str) -> None:
    answer = client.post(f"/similar?k={k}", content=make_image(1))
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_option")


def test_after_a_swap_the_images_are_those_of_the_new_model(
    client: TestClient, slot: ModelSlot, tmp_path: Path
) -> None:
    client.post("/similar", content=make_image(11))
    slot.current = make_model(tmp_path / "next", sha256_n=np.array([f"{seed + 99:064x}" for seed in SEEDS], "S64"))
    answer = client.post("/similar?k=1", content=make_image(11)).json()
    assert answer["neighbours"][0]["sha256"] == f"{11 + 99:064x}"


def test_a_model_that_is_gone_takes_its_images_with_it(client: TestClient, slot: ModelSlot, tmp_path: Path) -> None:
    client.post("/similar", content=make_image(11))
    assert slot.current
    gone = weakref.ref(slot.current.predictor)
    slot.current = make_model(tmp_path / "next")
    client.get("/model")
    gc.collect()
    assert gone() is None


def test_many_at_once_read_the_images_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Bundle] = []

    class Slow(similar.Reference):
        def __init__(self, bundle: Bundle) -> None:
            made.append(bundle)
            time.sleep(0.1)
            super().__init__(bundle)

    monkeypatch.setattr(similar, "Reference", Slow)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda seed: client.post("/similar", content=make_image(seed)), range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len(made) == 1


def test_images_of_a_bundle_that_was_written_over_are_not_those_of_the_model(
    client: TestClient, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "bundle")
    make_model(tmp_path / "bundle", sha256_n=np.array([f"{seed + 99:064x}" for seed in SEEDS], "S64"))
    answer = client.post("/similar", content=make_image(11))
    assert (answer.status_code, answer.json()["code"]) == (409, "no_reference")


def test_a_client_may_say_how_long_it_waits(client: TestClient) -> None:
    answer = client.post("/similar", content=make_image(11), headers={"X-Deadline-Ms": "1"})
    assert (answer.status_code, answer.json()["code"]) == (503, "deadline")


def test_several_labels_are_listed(client: TestClient, slot: ModelSlot, tmp_path: Path) -> None:
    targets_nk = np.tile(np.array([[1, 0, 1], [0, 0, 0]], np.uint8), (len(SEEDS) // 2, 1))
    slot.current = make_model(tmp_path / "several", task="multilabel", targets_nk=targets_nk)
    labels = [
        client.post("/similar?k=1", content=make_image(seed)).json()["neighbours"][0]["labels"] for seed in (10, 11)
    ]
    assert labels == [["a", "c"], []]


@pytest.mark.parametrize(
    "arrays",
    [
        {"sha256_n": None},
        {"label_n": np.full(len(SEEDS), 99)},
        {"label_n": np.zeros(1, int)},
        {"embedding_nd": np.zeros((len(SEEDS), 3), np.float32)},
        {"embedding_nd": np.full((len(SEEDS), 48), np.nan, np.float32)},
        {"embedding_nd": np.zeros((0, 48), np.float32), "sha256_n": np.zeros(0, "S64"), "label_n": np.zeros(0, int)},
        {"sha256_n": np.arange(len(SEEDS))},
    ],
)
def test_a_model_that_does_not_hold_them_says_so(
    client: TestClient, slot: ModelSlot, tmp_path: Path, arrays: dict[str, Any]
) -> None:
    slot.current = make_model(tmp_path / "old", **arrays)
    answer = client.post("/similar", content=make_image(1))
    assert (answer.status_code, answer.json()["code"]) == (409, "no_reference")


# Pictures of the neighbours.

KNOWN = f"{14:064x}"


def store_image(folder: Path, data: bytes, sha256: str = KNOWN) -> LocalStore:
    store = LocalStore(folder / "store")
    store.put(make_image_key(sha256), data)
    return store


def read_jpeg(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    return image


def test_the_picture_of_a_neighbour_is_small_upright_and_has_no_notes(slot: ModelSlot, tmp_path: Path) -> None:
    photo, file = Image.new("RGB", (400, 200), (200, 30, 30)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where it was taken"
    photo.save(file, "JPEG", exif=exif)
    store = store_image(tmp_path, file.getvalue())
    with TestClient(make_app(slot, store=store)) as client:
        address = client.post("/similar?k=1", content=make_image(14)).json()["neighbours"][0]["image"]
        answer = client.get(address)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
        assert answer.headers["cache-control"] == "private, no-store"
        picture = read_jpeg(answer.content)
        assert picture.size == (128, 256)
        assert not picture.getexif()
        assert picture.getpixel((60, 100)) == pytest.approx((200, 30, 30), abs=4)
        assert read_jpeg(client.get(f"/images/{KNOWN}?px=16").content).size == (8, 16)
        assert read_jpeg(client.get(f"/images/{KNOWN}?px=512").content).size == (256, 512)


def test_no_picture_of_what_similar_does_not_name_is_forgotten_or_cannot_be_drawn(
    slot: ModelSlot, tmp_path: Path
) -> None:
    store = store_image(tmp_path, make_image(14))
    others = {f"{99:064x}": make_image(1), f"{15:064x}": b"", f"{16:064x}": b"text", f"{17:064x}": make_image(1)[:60]}
    for sha256, data in others.items():
        store.put(make_image_key(sha256), data)
    with TestClient(make_app(slot, store=store)) as client:
        assert client.get(f"/images/{KNOWN}").status_code == 200
        for sha256 in (*others, f"{18:064x}"):
            answer = client.get(f"/images/{sha256}")
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), sha256
        store.put(make_tombstone_key("fake", KNOWN), b"{}")
        assert client.get(f"/images/{KNOWN}").status_code == 404
        for path in (
            f"{KNOWN}?px=15",
            f"{KNOWN}?px=513",
            f"{KNOWN}?px=x",
            "..%2f..%2fetc",
            KNOWN.upper().replace("0", "A"),
        ):
            assert client.get(f"/images/{path}").status_code in (404, 422), path
    with TestClient(make_app(slot)) as client:
        assert client.get(f"/images/{KNOWN}").status_code == 404, "a server without a store"


def test_a_store_that_is_away_or_hangs_is_said(
    slot: ModelSlot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away(LocalStore):
        def get(self, key: str) -> bytes:
            raise StoreError("store /secret", "is away")

    class Hanging(LocalStore):
        def get(self, key: str) -> bytes:
            time.sleep(2)
            return super().get(key)

    monkeypatch.setattr(similar, "STORE_S", 0.05)
    for kind in (Away, Hanging):
        with TestClient(make_app(slot, store=kind(tmp_path / "store"))) as client:
            answer = client.get(f"/images/{KNOWN}")
            assert (answer.status_code, answer.json()["code"]) == (503, "store_away")
            assert "secret" not in answer.text
