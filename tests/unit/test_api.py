"""`visionloop.load`: answers as the command and the server give them, in batches and threads; addresses and errors."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import visionloop
from fakes import make_bundle, make_image
from visionloop.bundle import load_bundle, seal_bundle, upload_bundle
from visionloop.errors import BundleError, ImageError, PromotionError, SettingsError
from visionloop.predict.files import predict_files
from visionloop.predictor import Outputs, Predictor
from visionloop.promotion.ledger import append_entry
from visionloop.records import Prediction, canonical_json
from visionloop.serving.app import make_app
from visionloop.serving.swap import ModelSlot, ServedModel
from visionloop.store import open_store

IMAGES = [make_image(seed, size_hw=(50, 70), kind="JPEG" if seed % 2 else "PNG") for seed in range(9)]


@pytest.fixture
def model(bundle_dir: Path) -> visionloop.Model:
    return visionloop.load(bundle_dir)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.img" for number in range(len(IMAGES))]
    for path, data in zip(paths, IMAGES, strict=True):
        path.write_bytes(data)
    return paths


def test_one_image_and_many(model: visionloop.Model, photos: list[Path]) -> None:
    one, many = model.predict(photos[0]), model.predict(photos)
    assert isinstance(one, Prediction)
    assert len(many) == len(photos)
    assert [answer.prediction for answer in many] == [model.predict(str(path)).prediction for path in photos]
    assert model.predict(iter(IMAGES)) == model.predict(IMAGES) == many
    pixels = np.stack([np.asarray(Image.open(path).resize((32, 32)).convert("RGB")) for path in photos])
    assert model.predict(pixels) == model.predict(list(pixels))
    assert model.predict([]) == []
    assert many[0].prediction in model.classes == ("a", "b", "c")


def test_an_opened_image_has_the_answer_of_its_file(model: visionloop.Model, tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    path.write_bytes(make_image(7, size_hw=(400, 300), kind="JPEG"))
    expected = model.predict(path)
    decoded = Image.open(path)
    decoded.load()
    assert model.predict(Image.open(path)) == model.predict([Image.open(path)])[0] == expected
    assert model.predict(decoded) != expected, "this image shows a difference, if there is one"
    np.testing.assert_array_equal(model.embed(Image.open(path)), model.embed(path))


def test_answers_equal_those_of_the_command_and_of_the_server(
    model: visionloop.Model, bundle_dir: Path, photos: list[Path]
) -> None:
    predictor = Predictor.load(bundle_dir)
    assert model.predict(photos) == [answer.prediction for answer in predict_files(predictor, photos)]
    with TestClient(make_app(ModelSlot(ServedModel(predictor)))) as client:
        for path in photos:
            answer, served = model.predict(path), client.post("/predict", content=path.read_bytes()).json()
            assert {key: served[key] for key in answer.to_json()} == answer.to_json()


def test_embeddings_are_those_of_the_network(model: visionloop.Model, bundle_dir: Path) -> None:
    predictor = Predictor.load(bundle_dir)
    expected = predictor.run(np.stack([predictor.decode(data, "x") for data in IMAGES])).embedding_nd
    vectors = model.embed(IMAGES)
    assert (vectors.shape, vectors.dtype) == ((9, 48), np.float32)
    np.testing.assert_array_equal(vectors, expected)
    np.testing.assert_allclose(model.embed(IMAGES[2]), expected[2:3], atol=1e-6)
    assert (model.embed([]).shape, model.embed([]).dtype) == ((0, 48), np.float32)


def test_a_broken_image_raises_or_has_its_error_in_its_place(model: visionloop.Model) -> None:
    images = [IMAGES[0], b"text", IMAGES[1], None, IMAGES[2]]
    with pytest.raises(ImageError, match="image 1: is text, not an image"):
        model.predict(images)  # type: ignore[call-overload]
    with pytest.raises(ImageError, match="image 1: is text, not an image"):
        model.embed(images)
    answers = model.predict(images, on_error="return")  # type: ignore[call-overload]
    assert [answers[i] for i in (0, 2, 4)] == model.predict(IMAGES[:3])
    assert [str(answers[i]).partition(";")[0] for i in (1, 3)] == [
        "image 1: is text, not an image",
        "image 3: is None",
    ]
    vectors = model.embed(images, on_error="nan")
    assert np.isnan(vectors).all(axis=1).tolist() == [False, True, False, True, False]
    np.testing.assert_array_equal(vectors[[0, 2, 4]], model.embed(IMAGES[:3]))
    assert isinstance(model.predict("no.jpg", on_error="return"), ImageError)
    assert np.isnan(model.embed([b"", b""], on_error="nan")).all()
    with pytest.raises(SettingsError, match=r"predict\(on_error=\.\.\.\): got 'skip'; expected one of raise, return"):
        model.predict(IMAGES, on_error="skip")  # type: ignore[call-overload]


def test_images_are_taken_two_batches_at_a_time(model: visionloop.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, seen = 0, []

    def give() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(150):
            taken += 1
            yield IMAGES[0]

    run = Predictor.run

    def note(self: Predictor, images: np.ndarray) -> Outputs:
        seen.append((taken, len(images)))
        return run(self, images)

    monkeypatch.setattr(Predictor, "run", note)
    assert len(model.predict(give())) == 150
    assert seen == [(127, 64), (150, 64), (150, 22)]


def test_several_threads_get_the_same_answers(model: visionloop.Model) -> None:
    expected, vectors = model.predict(IMAGES), model.embed(IMAGES)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(model.predict, IMAGES) for _ in range(30)]
        embedded = [pool.submit(model.embed, IMAGES) for _ in range(30)]
        assert all(one.result() == expected for one in answers)
        assert all((one.result() == vectors).all() for one in embedded)


def test_what_a_model_says_of_itself(model: visionloop.Model, bundle_dir: Path) -> None:
    assert model.digest == load_bundle(bundle_dir).digest
    assert (model.card.image_size, model.card.task) == ((32, 32), "multiclass")
    assert repr(model) == (
        f"<visionloop.Model fake: multiclass of a, b, c; 32 x 32 px; dataset version 1; "
        f"bundle {model.digest[:12]} from {bundle_dir}>"
    )
    make_bundle(bundle_dir.parent / "large", classes=[f"k{i:02d}" for i in range(20)])
    assert "of k00, k01, k02, k03, k04, ... (20 in all);" in repr(visionloop.load(bundle_dir.parent / "large"))


def test_a_fresh_interpreter_loads_nothing_for_an_import_and_no_training_for_an_answer(
    bundle_dir: Path, photos: list[Path]
) -> None:
    code = f"""
import sys, json
import visionloop
before = sorted(m for m in sys.modules if m.startswith("visionloop"))
sizes = [m for m in ("numpy", "PIL", "pydantic", "onnxruntime") if m in sys.modules]
model = visionloop.load({str(bundle_dir)!r})
answer = model.predict({str(photos[0])!r}).prediction
size = model.embed({str(photos[0])!r}).shape[1]
print(json.dumps([before, sizes, answer, size, sorted({{m.split(".")[0] for m in sys.modules}})]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    before, heavy, answer, size, loaded = json.loads(done.stdout)
    assert (before, heavy) == (["visionloop"], [])
    assert (answer, size) == (visionloop.load(bundle_dir).predict(photos[0]).prediction, 48)
    assert not set(loaded) & {"torch", "torchvision", "lightning", "pytorch_lightning", "mlflow", "prefect", "dvc"}
    assert not set(loaded) & {"pandas", "fastapi", "sklearn", "matplotlib"}


def test_the_names_of_the_package_are_there() -> None:
    assert set(visionloop.__all__) <= set(dir(visionloop))
    assert all(getattr(visionloop, name) is not None for name in visionloop.__all__)
    with pytest.raises(AttributeError, match="module 'visionloop' has no attribute 'laod'"):
        visionloop.laod  # noqa: B018


def promote(home: Path, name: str, seeds: list[int]) -> list[str]:
    """Promote fake bundles in the store of a workspace; return their digests."""
    store, entry, digests = open_store((home / ".visionloop" / "store").as_uri()), None, []
    facts = {"action": "promote", "model_version": "1", "decision": None, "dataset": {}, "run_id": None}
    facts |= {"by": "t", "why": "t", "at": "2026-01-01T00:00:00Z"}
    for seed in seeds:
        folder = home / "made" / f"{name}-{seed}"
        make_bundle(folder, seed=seed)
        upload_bundle(store, load_bundle(folder))
        digests.append(load_bundle(folder).digest)
        entry = append_entry(store, name, entry, bundle=digests[-1], **facts)
    return digests


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace `pets` whose store also has the champions of `birds`; the test stands beside it."""
    folder = tmp_path / "ws"
    folder.mkdir()
    (folder / "params.yaml").write_text("name: pets\n")
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_name_is_looked_up_in_the_ledger_of_the_workspace(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pets, birds = promote(home, "pets", [1, 2]), promote(home, "birds", [3])
    assert visionloop.load("pets@champion", workspace=home).digest == pets[1]
    assert visionloop.load("pets@1", workspace="ws").digest == pets[0]
    assert visionloop.load("birds@champion", workspace=visionloop.open_workspace("ws")).digest == birds[0]
    assert visionloop.load("made/pets-1", workspace="ws").digest == pets[0]
    assert visionloop.load(Path("ws/made/pets-1")).digest == pets[0]
    url = f"{(home / '.visionloop' / 'store').as_uri()}/bundles/{birds[0]}"
    assert visionloop.load(url).digest == visionloop.load(f"{url}/").digest == birds[0]
    monkeypatch.chdir(home / "made")
    assert visionloop.load("pets@champion").digest == pets[1]
    assert repr(visionloop.load("pets@2")).endswith("from pets@2>")


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        (
            "",
            BundleError,
            "model '': does not exist; expected a bundle's folder, candidate, NAME@champion, NAME@NUMBER, or s3://",
        ),
        ("nothing", BundleError, "model '.*nothing': does not exist"),
        ("ws/params.yaml", BundleError, "is a file; expected a bundle's folder"),
        (Path("ws"), BundleError, r"no digests\.json; expected a model bundle"),
        ("pets@latest", SettingsError, "model 'pets@latest': is neither a folder nor a name; expected"),
        ("pets@champion", PromotionError, "ledger pets: has no champion; expected a promoted model"),
        ("birds@4", PromotionError, "ledger birds: has no entry 4; expected 1 to 1"),
        ("bats@champion", PromotionError, "knows no 'bats'; expected one of birds, pets"),
        ("s3://bucket", SettingsError, "is not the address of a bundle; expected a bundle's folder"),
        ("s3://me:secret@b/bundles/x", SettingsError, r"model 's3://\*\*\*@b/bundles/x': is not the address"),
        (f"http://x/bundles/{'0' * 64}", SettingsError, "is not the address of a bundle"),
        (f"file:///nowhere/bundles/{'0' * 64}", BundleError, "bundle 000000000000: is not whole in file:///nowhere"),
        (7, SettingsError, "model: got 7; expected a bundle's folder"),
    ],
)
def test_an_address_that_is_nothing_has_one_clear_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, address: str | Path, error: type[Exception], message: str
) -> None:
    promote(home, "birds", [3])
    open_store((home / ".visionloop" / "store").as_uri()).put("datasets/pets/000001.json", b"{}")
    monkeypatch.setenv("VISIONLOOP_HOME", str(home))
    with pytest.raises(error, match=message):
        visionloop.load(address)


def test_without_a_workspace_a_name_says_so(home: Path) -> None:
    with pytest.raises(SettingsError, match=r"no params\.yaml here or above"):
        visionloop.load("pets@champion")


def test_a_spoilt_bundle_is_refused(bundle_dir: Path) -> None:
    card = load_bundle(bundle_dir).card
    (bundle_dir / "card.json").rename(bundle_dir.parent / "card.json")
    with pytest.raises(BundleError, match=r"card\.json differs from its digest"):
        visionloop.load(bundle_dir)
    (bundle_dir / "card.json").write_text("{}")
    seal_bundle(bundle_dir)
    with pytest.raises(BundleError, match=r"card\.json is damaged; expected a model's card"):
        visionloop.load(bundle_dir)
    (bundle_dir / "card.json").write_bytes(canonical_json(replace(card, resize="fit_crop").to_json()))
    answers = json.loads((bundle_dir / "golden" / "answers.json").read_text())
    answers["logits"][0][0] += 1
    (bundle_dir / "golden" / "answers.json").write_text(json.dumps(answers))
    seal_bundle(bundle_dir)
    with pytest.raises(BundleError, match=r"golden answers differ by 0\.52"):
        visionloop.load(bundle_dir)
