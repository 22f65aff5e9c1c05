"""The stage embed for real: vectors as a served model gives them, computed once, kept through a kill, flat memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fakes import make_bundle
from processors import RELATIVE, measure_distance
from shapes import PARAMS, make_environment, make_workspace
from visionloop.bundle import load_bundle, seal_bundle
from visionloop.data.manifest import make_image_key
from visionloop.data.prepare import prepare
from visionloop.data.shards import Prepared, Shards, load_prepared
from visionloop.errors import DatasetError, ParamsError, TrainingError
from visionloop.features import encoder as encoders
from visionloop.features import runtimes
from visionloop.features.embed import Embedded, choose_reader, embed, embed_prepared
from visionloop.features.encoder import Encoder, make_bundle_encoder, make_encoder
from visionloop.features.runtimes import list_candidates
from visionloop.features.table import EmbeddingTable
from visionloop.features.view import load_features
from visionloop.params import load_params
from visionloop.predictor import Embedder, Predictor
from visionloop.records import Pin
from visionloop.settings import load_settings
from visionloop.store import LocalStore, open_store
from visionloop.workspace import connect

BATCH = 25
FROZEN = PARAMS.replace("EPOCHS", "1").replace("max_epochs", "way: frozen, max_epochs").replace("500", str(BATCH))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with prepared shapes and a frozen way, embedded once; tests work on copies."""
    home = make_workspace(tmp_path_factory.mktemp("embed") / "ws")
    (home / "params.yaml").write_text(FROZEN)
    settings = load_settings({}, home)
    prepare(connect(settings, load_params(settings.params_path), store=open_store(settings.store_url)))
    run(home)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "ws")
    return tmp_path / "ws"


def run(home: Path, told: list[str] | None = None) -> Embedded:
    settings = load_settings({}, home)
    tell = (told if told is not None else []).append
    return embed(connect(settings, load_params(settings.params_path), store=open_store(settings.store_url)), tell=tell)


def forget_all(home: Path) -> Path:
    """Empty the table and the out, as if nothing had been computed; return the table's folder."""
    shutil.rmtree(home / "features")
    table = home / ".visionloop" / "store" / "embeddings"
    shutil.rmtree(table)
    return table


def list_parts(home: Path) -> list[str]:
    table = home / ".visionloop" / "store" / "embeddings"
    return sorted(path.name for path in table.rglob("*") if path.is_file())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_embedding_is_what_a_served_model_with_this_backbone_answers(
    home: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is served is fp32; a table that was computed in bf16 is as near to it as the format allows."""
    from visionloop.networks.classifier import Classifier
    from visionloop.networks.export import export_onnx
    from visionloop.networks.weights import load_backbone

    settings = load_settings({}, home)
    if precision == "bf16":
        monkeypatch.setattr(encoders, "list_candidates", lambda wanted, accelerator, has_torch: ["torch bf16"])
        assert run(home).num_computed == 120, "vectors of another precision are never mixed"
    prepared, store = load_prepared(settings.prepared_dir), open_store(settings.store_url)
    embedding_nd, facts = load_features(settings.features_dir, prepared)
    backbone, num_features = load_backbone(load_params(settings.params_path).train, prepared.size_hw, home)
    make_bundle(home / "bundle", classes=("disc", "ring"))
    export_onnx(Classifier(backbone, num_features, 2, task="binary"), (32, 32), home / "bundle" / "model.onnx")
    seal_bundle(home / "bundle")
    predictor = Predictor(load_bundle(home / "bundle"), threads=1)
    originals = [store.get(make_image_key(sha256)) for sha256 in prepared.sha256_n]
    served_nd = predictor.run(np.stack([predictor.decode(data, "image") for data in originals])).embedding_nd
    assert embedding_nd.shape == (120, 64)
    assert measure_distance(embedding_nd, served_nd) <= RELATIVE[precision]
    assert embedding_nd.std() > 1e-3
    assert (facts.backbone, facts.precision) == ("small_cnn", precision)


def test_what_the_table_has_is_not_computed_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in (home / "features").iterdir()}
    parts = list_parts(home)
    assert len(parts) == 5
    shutil.rmtree(home / "features")
    monkeypatch.setattr(Encoder, "embed", lambda self, images: pytest.fail("the network ran"))
    done = run(home)
    assert (done.num_images, done.num_computed) == (120, 0)
    assert {path.name: path.read_bytes() for path in (home / "features").iterdir()} == before
    assert list_parts(home) == parts


def test_a_warm_table_needs_no_torch(home: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.argv = ['visionloop', 'embed']\nfrom visionloop.cli import main\n"
        "main()\n"
    )
    check = "import sys, atexit; atexit.register(lambda: print('TORCH', 'torch' in sys.modules))\n"
    command = [sys.executable, "-c", check + code]
    env = make_environment()
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "features holds 120 embeddings: 120 from the table, 0 computed" in done.stdout
    assert done.stdout.rstrip().endswith("TORCH False")


def test_another_version_computes_only_what_is_new(home: Path) -> None:
    settings = load_settings({}, home)
    params = load_params(settings.params_path)
    (home / "params.yaml").write_text(FROZEN.replace("image_size: 32", "image_size: 32, limit: 60"))
    table = forget_all(home)
    limited = load_params(settings.params_path)
    prepare(connect(settings, limited, store=open_store(settings.store_url)))
    first = run(home)
    assert 0 < first.num_computed == first.num_images < 120
    (home / "params.yaml").write_text(FROZEN)
    prepare(connect(settings, params, store=open_store(settings.store_url)))
    second = run(home)
    assert (second.num_images, second.num_computed) == (120, 120 - first.num_images)
    assert len(list(table.iterdir())) == 1


def test_a_kill_loses_the_open_batch_alone_and_the_bytes_are_the_same(home: Path) -> None:
    expected = {path.name: path.read_bytes() for path in (home / "features").iterdir()}
    parts = list_parts(home)
    table = forget_all(home)
    code = (
        "import os, signal, sys\nfrom visionloop.features.table import EmbeddingTable\n"
        "from visionloop.cli import main\n"
        "write, calls = EmbeddingTable.write, []\n"
        "def write_and_die(self, *a):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(self, *a)\n"
        "EmbeddingTable.write = write_and_die\nsys.argv = ['visionloop', 'embed']\nmain()\n"
    )
    env = make_environment()
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=env, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(table.rglob("*"))) == 1 + 2
    assert not (home / "features").exists()
    again = run(home)
    assert again.num_computed == 120 - 2 * BATCH
    assert {path.name: path.read_bytes() for path in (home / "features").iterdir()} == expected
    assert list_parts(home) == parts


def test_a_damaged_part_is_computed_again(home: Path) -> None:
    folder = next((home / ".visionloop" / "store" / "embeddings").iterdir())
    parts = list_parts(home)
    (folder / parts[1]).write_bytes(b"PAR1 nothing")
    told: list[str] = []
    expected = (home / "features" / "embeddings.parquet").read_bytes()
    done = run(home, told)
    assert 0 < done.num_computed <= BATCH
    assert [line for line in told if "passed over" in line] == [
        f"part {parts[1][:12]} of the embedding table is damaged: passed over"
    ]
    assert list_parts(home) == parts
    assert (home / "features" / "embeddings.parquet").read_bytes() == expected


def test_other_ways_get_an_empty_view_and_training_says_what_to_do(home: Path) -> None:
    (home / "params.yaml").write_text(FROZEN.replace("way: frozen", "way: scratch"))
    assert run(home) == Embedded(None)
    assert [path.name for path in (home / "features").iterdir()] == ["encoder.json"]
    assert json.loads((home / "features" / "encoder.json").read_text()) == {"needed": False}
    with pytest.raises(DatasetError, match=r"are empty: .* Run `visionloop embed`\."):
        load_features(home / "features", load_prepared(home / "data" / "prepared"))


def test_other_weights_are_another_encoder(home: Path) -> None:
    before = load_features(home / "features", load_prepared(home / "data" / "prepared"))
    (home / "params.yaml").write_text(FROZEN.replace("max_epochs", "seed: 7, max_epochs"))
    assert run(home).num_computed == 120
    after = load_features(home / "features", load_prepared(home / "data" / "prepared"))
    assert after[1].digest != before[1].digest
    assert np.abs(after[0] - before[0]).max() > 1e-3


def test_what_the_workspace_forgot_about_its_encoder_is_found_again(home: Path) -> None:
    shutil.rmtree(home / ".visionloop" / "encoders")
    done = run(home)
    assert done.num_computed == 0
    assert done.facts is not None


def test_openvino_gives_the_same_vectors_and_reports_to_nobody(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = next((home / ".visionloop" / "encoders").glob("*.onnx"))
    images = load_prepared(home / "data" / "prepared").read(np.arange(20))
    code = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom visionloop.predictor import Embedder\n"
        "images = np.load(sys.argv[2])\n"
        "np.save(sys.argv[3], Embedder(Path(sys.argv[1]), runtime='openvino', threads=1).embed(images))\n"
        "print([m for m in sys.modules if m.startswith('openvino_telemetry') and sys.modules[m]])\n"
    )
    np.save(tmp_path / "images.npy", images)
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "images.npy"), str(tmp_path / "out.npy")]
    done = subprocess.run(
        command, env=make_environment(HOME=str(nobody)), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert list(nobody.rglob("*")) == [], "openvino wrote an id for its statistics"
    ours, theirs = Embedder(model, threads=1).embed(images), np.load(tmp_path / "out.npy")
    cosine_n = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine_n.min() >= 0.999


def test_the_torch_encoder_agrees_with_the_exported_one(home: Path) -> None:
    from visionloop.networks.export import EmbeddingNetwork, TorchEncoder
    from visionloop.networks.weights import load_backbone

    settings = load_settings({}, home)
    params, prepared = load_params(settings.params_path), load_prepared(settings.prepared_dir)
    images = prepared.read(np.arange(20))
    known = make_encoder(connect(settings, params), prepared).embed(images)
    network = EmbeddingNetwork(*load_backbone(params.train, prepared.size_hw, home), prepared.size_hw)
    np.testing.assert_allclose(TorchEncoder(network, device="cpu", precision="fp32").embed(images), known, atol=1e-4)
    rough = TorchEncoder(network, device="cpu", precision="bf16").embed(images)
    cosine_n = (known * rough).sum(1) / np.linalg.norm(known, axis=1) / np.linalg.norm(rough, axis=1)
    assert rough.dtype == np.float32
    assert cosine_n.min() >= 0.999


def test_what_may_compute_follows_the_machine(each_processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "has_openvino", lambda: True)
    has_bf16 = each_processor == "bf16"
    openvino = ["openvino fp32", *["openvino bf16"][:has_bf16]]
    torch = ["torch fp32", *["torch bf16"][:has_bf16]]
    assert list_candidates("auto", "cpu") == ["onnxruntime fp32", *openvino, *torch]
    assert list_candidates("auto", "gpu") == ["onnxruntime fp32", "torch fp32", "torch bf16"]
    assert list_candidates("onnxruntime", "cpu") == ["onnxruntime fp32"]
    assert (list_candidates("openvino", "cpu"), list_candidates("torch", "cpu")) == (openvino, torch)
    monkeypatch.setattr(runtimes, "has_openvino", lambda: False)
    assert list_candidates("auto", "cpu") == ["onnxruntime fp32", *torch]
    with pytest.raises(ParamsError, match=r"embed\.runtime: got 'openvino', which is not installed"):
        list_candidates("openvino", "cpu")


def test_a_model_that_serves_embeds_in_fp32(bf16_processor: None, home: Path) -> None:
    make_bundle(home / "bundle")
    bundle = load_bundle(home / "bundle")
    for runtime in ("auto", "torch", "onnxruntime"):
        facts = make_bundle_encoder(bundle, runtime=runtime).facts
        assert (facts.runtime, facts.precision) == ("onnxruntime", "fp32")


def test_an_encoder_that_gives_no_numbers_is_refused(home: Path) -> None:
    settings = load_settings({}, home)
    prepared, store = load_prepared(settings.prepared_dir), open_store(settings.store_url)
    encoder = make_encoder(connect(settings, load_params(settings.params_path)), prepared)
    broken = Encoder(encoder.facts, lambda: lambda images: np.full((len(images), 4), np.nan, np.float32))
    forget_all(home)
    with pytest.raises(TrainingError, match="gives no finite embedding for 25 of 25 images"):
        embed_prepared(EmbeddingTable(store, encoder.facts.digest), broken, prepared, prepared.read, batch_size=BATCH)
    assert EmbeddingTable(store, encoder.facts.digest).list_parts() == []


def test_a_bundle_of_another_size_reads_from_the_store(home: Path) -> None:
    settings = load_settings({}, home)
    prepared, store = load_prepared(settings.prepared_dir), open_store(settings.store_url)
    make_bundle(home / "bundle", classes=("disc", "ring"), size_hw=(48, 40))
    bundle = load_bundle(home / "bundle")
    encoder = make_bundle_encoder(bundle, runtime="onnxruntime")
    read = choose_reader(store, encoder, prepared)
    embedding_nd = embed_prepared(EmbeddingTable(store, encoder.facts.digest), encoder, prepared, read, batch_size=50)
    predictor = Predictor(bundle, threads=1)
    data = store.get(make_image_key(prepared.sha256_n[7]))
    served = predictor.run(predictor.decode(data, "image")[None]).embedding_nd[0]
    np.testing.assert_allclose(embedding_nd[7], served, atol=1e-5)
    store.delete(make_image_key(prepared.sha256_n[7]))
    shutil.rmtree(home / ".visionloop" / "store" / "embeddings")
    with pytest.raises(DatasetError, match=r"is missing from the store or damaged there; .* ingest --verify"):
        embed_prepared(EmbeddingTable(store, encoder.facts.digest), encoder, prepared, read, batch_size=50)


def test_memory_stays_flat_however_many_images_there_are(tmp_path: Path) -> None:
    number, size = 3000, (96, 96)
    shard = np.lib.format.open_memmap(tmp_path / "images.npy", mode="w+", dtype=np.uint8, shape=(number, *size, 3))
    shard[:] = np.random.default_rng(0).integers(0, 255, (number, 1, 1, 3), dtype=np.uint8)
    shard.flush()
    opened = np.load(tmp_path / "images.npy", mmap_mode="r")
    prepared = Prepared(
        folder=tmp_path,
        pin=Pin("many", 1, "0" * 64, number, ("a", "b")),
        task="binary",
        classes=("a", "b"),
        size_hw=size,
        resize="squash",
        sha256_n=tuple(f"{i:064x}" for i in range(number)),
        label_n=np.zeros(number, np.int64),
        targets_nk=None,
        side_n=np.full(number, "train"),
        place_n=np.arange(number),
        shards=Shards(size, number, (opened,)),
        train_shards=None,
    )
    make_bundle(tmp_path / "bundle", size_hw=size)
    encoder = make_bundle_encoder(load_bundle(tmp_path / "bundle"), runtime="onnxruntime")
    seen: list[int] = []
    embed_prepared(
        EmbeddingTable(LocalStore(tmp_path / "store"), encoder.facts.digest),
        encoder,
        prepared,
        prepared.read,
        batch_size=100,
        on_progress=lambda done, total: seen.append(read_memory()),
    )
    assert len(seen) == 31
    in_all = number * size[0] * size[1] * 3
    assert in_all > 80e6
    assert max(seen[3:]) - seen[3] < in_all / 4


def read_memory() -> int:
    """The bytes of this process that no file backs."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) * 1024


def test_missing_prepared_data_is_one_clear_line(home: Path) -> None:
    shutil.rmtree(home / "data" / "prepared")
    with pytest.raises(DatasetError, match=r"is missing or incomplete; .* Run `visionloop prepare`\."):
        run(home)


def test_a_larger_training_side_is_embedded_by_its_middle(home: Path) -> None:
    before = load_features(home / "features", load_prepared(home / "data" / "prepared"))
    (home / "params.yaml").write_text(FROZEN.replace("image_size: 32", "image_size: 32, train_size: 38"))
    settings = load_settings({}, home)
    params = load_params(settings.params_path)
    prepare(connect(settings, params, store=open_store(settings.store_url)))
    assert run(home).num_computed == 120
    prepared = load_prepared(settings.prepared_dir)
    embedding_nd, facts = load_features(settings.features_dir, prepared)
    assert facts.crop == {"dataset": "shapes", "train_size": [38, 38]}
    assert facts.digest != before[1].digest
    rows = np.concatenate([prepared.rows("train")[:5], prepared.rows("val")[:5]])
    expected = make_encoder(connect(settings, params), prepared).embed(prepared.read(rows))
    np.testing.assert_allclose(embedding_nd[rows], expected, atol=1e-5)
    np.testing.assert_allclose(embedding_nd[rows[5:]], before[0][rows[5:]], atol=1e-5)
    assert np.abs(embedding_nd[rows[:5]] - before[0][rows[:5]]).max() > 1e-4
