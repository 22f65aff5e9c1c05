"""similar, map and suspects on real embeddings: the matches, the page, turned labels found and put right by ingest."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fakes import make_bundle, run_here
from shapes import PARAMS, make_environment, make_workspace, write_shapes
from visionloop.bundle import load_bundle
from visionloop.data.manifest import load_pin
from visionloop.data.parts import iterate_records
from visionloop.data.prepare import prepare
from visionloop.data.shards import load_prepared
from visionloop.features import album
from visionloop.features.embed import embed
from visionloop.features.encoder import make_bundle_encoder
from visionloop.features.table import EmbeddingTable
from visionloop.features.view import load_features
from visionloop.forget import forget, resolve_images
from visionloop.monitoring.review_page import ReviewPage
from visionloop.params import load_params
from visionloop.settings import load_settings
from visionloop.store import open_store
from visionloop.workspace import connect
from worlds import list_encoders

FROZEN = PARAMS.replace("EPOCHS", "1").replace("max_epochs", "way: frozen, max_epochs")
NUM_TURNED = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A workspace of shapes of which some bear the other's label, embedded; and the names of those files."""
    folder = tmp_path_factory.mktemp("seeing")
    write_shapes(folder / "photos", 80)
    files = {name: sorted((folder / "photos" / name).iterdir()) for name in ("disc", "ring")}
    rng = np.random.default_rng(0)
    turned = set()
    for name, other in (("disc", "ring"), ("ring", "disc")):
        for i in rng.choice(80, NUM_TURNED // 2, replace=False):
            path = files[name][i].rename(folder / "photos" / other / f"was-{name}-{i}.png")
            turned.add(f"{other}/{path.name}")
    home = make_workspace(folder / "ws", number=0)
    (home / "params.yaml").write_text(FROZEN)
    settings = load_settings({}, home)
    params, store = load_params(settings.params_path), open_store(settings.store_url)
    prepare(connect(settings, params, store=store))
    embed(connect(settings, params, store=store))
    return home, turned


@pytest.fixture
def home(made: tuple[Path, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made[0], tmp_path / "ws")
    shutil.copytree(made[0].parent / "photos", tmp_path / "photos")
    for name, value in make_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path / "ws")
    return tmp_path / "ws"


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_data(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, object] = json.loads(found.group(1))
    return data


def test_turned_labels_are_found_and_ingest_puts_them_right(
    made: tuple[Path, set[str]], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = made[1]
    assert run_here(monkeypatch, "suspects", "--top", "24") == 0
    said = capsys.readouterr().out
    assert "train.weights is none" in said
    share = re.search(
        r"^neighbours agree with the labels in (\d\d\.\d)% of cases, by chance it would be 4", said, re.MULTILINE
    )
    assert share
    assert 60 < float(share[1]) < 95
    path = home / "suspects" / "corrections.csv"
    rows = read_rows(path)
    assert run_here(monkeypatch, "suspects", "--top", "24", "--json") == 0, (
        "writes nothing, so corrections.csv may stay"
    )
    found = json.loads(capsys.readouterr().out)
    assert [(one["sha256"], one["old"], one["new"]) for one in found["suspects"]] == [
        (row["sha256"], row["old"], row["new"]) for row in rows
    ]
    assert found["agreement"]["share"] == pytest.approx(float(share[1]) / 100, abs=0.001)
    assert found["num_found"] == len(rows)
    assert list(rows[0]) == ["sha256", "old", "new", "score", "side", "origin"]
    assert [float(r["score"]) for r in rows] == sorted((float(r["score"]) for r in rows), reverse=True)
    right = [r for r in rows if r["origin"].partition(":")[2] in turned]
    assert len(right) >= 0.8 * NUM_TURNED
    assert all(r["new"] == re.search(r"was-(\w+)-", r["origin"])[1] for r in right)  # type: ignore[index]
    with Image.open(home / "suspects" / "suspects.png") as picture:
        assert picture.width > 800
        assert np.asarray(picture).std() > 10
    # What a person does: keep the lines that are right, name the file, ingest.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *(line for line in lines[1:] if "was-" in line)]))
    (home / "params.yaml").write_text(FROZEN + "ingest: {corrections: suspects/corrections.csv}\n")
    assert run_here(monkeypatch, "ingest", "../photos") == 0
    settings = load_settings({}, home)
    records = {r.sha256: r for r in iterate_records(open_store(settings.store_url), load_pin(settings.pin_path))}
    assert [records[r["sha256"]].labels for r in right] == [(r["new"],) for r in right]
    assert load_pin(settings.pin_path).version == 2


def test_answers_on_the_page_put_turned_labels_right(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first two are corrected and the third is confirmed; a file that keeps its old folder changes nothing."""
    asked: list[list[dict[str, Any]]] = []

    def answer(page: ReviewPage) -> None:
        images = page.describe()["images"]
        asked.append(images)
        chosen = [images[0]["proposed"], images[1]["proposed"], images[2]["model"]]
        given = [
            {"sha256": one["sha256"], "verdict": "label", "labels": labels}
            for one, labels in zip(images, chosen, strict=False)
        ]
        assert page.take({"answers": given}) == 3

    monkeypatch.setattr(ReviewPage, "serve", answer)
    settings = load_settings({}, home)
    store = open_store(settings.store_url)
    before = {r.sha256: r for r in iterate_records(store, load_pin(settings.pin_path))}
    (home / "params.yaml").write_text(FROZEN + "ingest: {sources: [{kind: review}]}\n")
    assert run_here(monkeypatch, "suspects", "--top", "5", "--serve", "--by", "ann") == 0
    first, second, third = asked[0][:3]
    assert (len(asked[0]), len(first["similar"]), first["proposed"]) == (
        5,
        6,
        [{"disc": "ring"}.get(*first["model"], "disc")],
    )
    assert run_here(monkeypatch, "review", "--accept") == 0
    capsys.readouterr()
    for command in (["ingest"], ["ingest", "../photos"]):
        assert run_here(monkeypatch, *command) == 0
        assert "label_conflict" not in capsys.readouterr().out
    rows = {r.sha256: r for r in iterate_records(store, load_pin(settings.pin_path))}
    changed = {sha256: row.labels for sha256, row in rows.items() if row.labels != before[sha256].labels}
    assert changed == {one["sha256"]: tuple(one["proposed"]) for one in (first, second)}
    assert all(row.side == before[sha256].side for sha256, row in rows.items())
    assert f"review:ann/suspect/{first['sha256'][:16]}" in rows[first["sha256"]].origins
    assert not (home / "suspects").exists()

    monkeypatch.setattr(ReviewPage, "serve", lambda page: asked.append(page.describe()["images"]))
    assert run_here(monkeypatch, "suspects", "--top", "5", "--serve") == 0
    assert "more have an answer of a person already" in capsys.readouterr().out
    assert not {one["sha256"] for one in (first, second, third)} & {one["sha256"] for one in asked[1]}


def test_an_encoder_that_cannot_tell_the_classes_writes_no_corrections(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bundle(home / "models" / "candidate", classes=("disc", "ring"))
    settings = load_settings({}, home)
    prepared = load_prepared(settings.prepared_dir)
    encoder = make_bundle_encoder(load_bundle(settings.candidate_dir)).facts.digest
    vectors = np.random.default_rng(0).normal(size=(160, 8)).astype(np.float32)
    EmbeddingTable(open_store(settings.store_url), encoder).write(prepared.sha256_n, vectors)
    assert run_here(monkeypatch, "suspects", "--encoder", "candidate") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "cannot tell the classes: neighbours agree with the labels in " in said[0]
    assert "and `--encoder params`" in said[0]
    assert not (home / "suspects").exists()


def test_an_edited_corrections_file_is_never_overwritten(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "suspects").mkdir()
    (home / "suspects" / "corrections.csv").write_text("mine")
    assert run_here(monkeypatch, "suspects") == 2
    assert "is there already, perhaps edited; expected a folder without it" in capsys.readouterr().err
    assert (home / "suspects" / "corrections.csv").read_text() == "mine"
    assert run_here(monkeypatch, "suspects", "--out", "review", "--top", "3") == 0
    assert len(read_rows(home / "review" / "corrections.csv")) == 3


def test_similar_finds_a_file_itself_first_and_draws_the_matches(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = sorted((home.parent / "photos" / "disc").iterdir())[0]
    assert run_here(monkeypatch, "similar", str(photo), "--k", "5", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    matches = answer["queries"][0]["matches"]
    assert len(matches) == 5
    assert matches[0]["sha256"] == answer["queries"][0]["sha256"]
    assert matches[0]["distance"] == pytest.approx(0, abs=1e-5)
    assert [m["distance"] for m in matches] == sorted(m["distance"] for m in matches)
    assert not (home / ".visionloop" / "features").exists()
    digits = matches[0]["sha256"][:10]
    for name in (digits, str(photo), str(photo)):
        assert run_here(monkeypatch, "similar", name, "--k", "4") == 0
    kept = sorted(path.name for path in (home / ".visionloop" / "features").iterdir())
    assert kept == sorted([f"similar-{digits}.png", f"similar-{photo.stem}.png", f"similar-{photo.stem}-2.png"])
    capsys.readouterr()
    assert run_here(monkeypatch, "similar", digits, str(photo), "--k", "4", "--out", "like.png") == 0
    said = capsys.readouterr().out
    assert said.count("the same file") == 1, "an image of the dataset is not among its own matches"
    assert f"{matches[1]['sha256'][:12]}" in said
    with Image.open(home / "like.png") as picture:
        assert picture.width > 5 * 150


def test_similar_says_what_it_cannot_use(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    for argument, words in [
        (str(tmp_path / "text.jpg"), "is text, not an image"),
        (str(tmp_path / "empty.png"), "empty.png"),
        ("nowhere.png", "nowhere.png: does not exist; expected an image file, or 8 digits or more of a sha256"),
        ("0123456789", "is no image of the prepared dataset, and no file"),
        ("..", "is a folder"),
    ]:
        assert run_here(monkeypatch, "similar", argument) == 2
        assert words in capsys.readouterr().err
    photo = sorted((home.parent / "photos" / "ring").iterdir())[0]
    assert run_here(monkeypatch, "similar", str(photo), "--encoder", "champion") == 2
    assert "has no champion" in capsys.readouterr().err


def test_a_bundle_is_an_encoder_too(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bundle(home / "models" / "candidate", classes=("disc", "ring"))
    digest = load_bundle(home / "models" / "candidate").digest
    photo = sorted((home.parent / "photos" / "ring").iterdir())[0]
    assert run_here(monkeypatch, "similar", str(photo), "--encoder", "candidate", "--k", "200") == 0
    said = capsys.readouterr().out
    assert f"encoder: linear of bundle {digest[:12]} at 32 x 32" in said
    assert len(list_encoders(open_store(load_settings({}, home).store_url))) == 2
    assert len(re.findall(r"^  \d\.\d{4}  ", said, re.MULTILINE)) == 160, "all there are"


def test_the_map_holds_every_image_and_loads_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, "map", "--method", "pca", "--out", "map.html", "--thumbnails", "40") == 0
    assert "40 of 160 have a thumbnail" in capsys.readouterr().out
    page = (home / "map.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(http|//)|@import|url\(""", page)
    assert "default-src 'none'" in page
    data = read_data(page)
    assert data["classes"] == ["disc", "ring"]
    assert (len(data["sha256_n"]), len(data["origins"]), len(data["thumbs"])) == (160, 160, 40)  # type: ignore[arg-type]
    before = page
    assert run_here(monkeypatch, "map", "--method", "pca", "--out", "map.html", "--thumbnails", "40") == 0
    assert (home / "map.html").read_text() == before


def test_embeddings_can_be_had_with_paths_and_labels(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in (home / "features").iterdir()}
    assert run_here(monkeypatch, "embed", "--out", "out/vectors.parquet") == 0
    assert "out/vectors.parquet holds 160 embeddings of 64 numbers" in capsys.readouterr().out
    frame = pd.read_parquet(home / "out" / "vectors.parquet")
    assert list(frame) == ["path", "labels", "side", "sha256", "vector"]
    settings = load_settings({}, home)
    records = {r.sha256: r for r in iterate_records(open_store(settings.store_url), load_pin(settings.pin_path))}
    embedding_nd, facts = load_features(settings.features_dir, load_prepared(settings.prepared_dir))
    assert np.array_equal(np.stack(frame["vector"]), embedding_nd)
    seen = [(row.path, tuple(row.labels), row.side) for row in frame.itertuples()]
    assert seen == [(records[s].origins[0], records[s].labels, records[s].side) for s in frame["sha256"]]
    file = pq.read_schema(home / "out" / "vectors.parquet")
    assert file.field("vector").type == pa.list_(pa.float32(), 64)
    assert file.metadata[b"visionloop.encoder"] == facts.digest.encode()
    assert file.metadata[b"visionloop.dataset"] == b"shapes version 1"
    assert {path.name: path.read_bytes() for path in (home / "features").iterdir()} == before


def test_a_way_that_needs_no_embeddings_has_them_too_and_its_stage_stays_as_it_was(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "params.yaml").write_text(FROZEN.replace("way: frozen", "way: scratch"))
    before = {path.name: path.read_bytes() for path in (home / "features").iterdir()}
    assert run_here(monkeypatch, "embed", "--out", "vectors.parquet") == 0
    assert len(pd.read_parquet(home / "vectors.parquet")) == 160
    assert {path.name: path.read_bytes() for path in (home / "features").iterdir()} == before
    # A candidate is asked first, as by `similar`; what is written over is a file of this command alone.
    make_bundle(home / "models" / "candidate", classes=("disc", "ring"))
    assert run_here(monkeypatch, "embed", "--out", "vectors.parquet") == 0
    digest = make_bundle_encoder(load_bundle(home / "models" / "candidate")).facts.digest
    assert pq.read_schema(home / "vectors.parquet").metadata[b"visionloop.encoder"] == digest.encode()
    assert list(home.glob("vectors*")) == [home / "vectors.parquet"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out", "v.csv"], "--out v.csv: has the suffix .csv; expected a file *.parquet. Name it v.parquet."),
        (["--out", "v"], "--out v: has no suffix; expected a file *.parquet. Name it v.parquet."),
        (["--out", "features/embeddings.parquet"], "is there already, and not from `embed --out`; expected a new file"),
        (["--out", "params.yaml/v.parquet"], "lies below params.yaml, which is a file; expected a folder"),
        (["--out", "folder.parquet"], "is there already, and not from `embed --out`"),
        (["--encoder", "champion"], "--encoder: got champion without --out; expected --out FILE.parquet with it."),
    ],
)
def test_embeddings_that_cannot_be_written_are_refused_in_a_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    (home / "folder.parquet").mkdir()
    before = (home / "features" / "embeddings.parquet").read_bytes()
    assert run_here(monkeypatch, "embed", *argv) == 2
    assert words in capsys.readouterr().err
    assert (home / "features" / "embeddings.parquet").read_bytes() == before


def test_forgetting_an_image_takes_its_embeddings_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_here(monkeypatch, "map", "--method", "pca", "--thumbnails", "0", "--quiet") == 0
    monkeypatch.setattr(album, "KEPT_FROM", 100)
    assert run_here(monkeypatch, "similar", str(sorted((home.parent / "photos" / "disc").iterdir())[0])) == 0
    assert run_here(monkeypatch, "suspects", "--top", "5") == 0
    assert (home / ".visionloop" / "features" / "vectors").is_file()
    settings = load_settings({}, home)
    store = open_store(settings.store_url)
    gone, *kept = [row["sha256"] for row in read_rows(home / "suspects" / "corrections.csv")]
    (encoder,) = list_encoders(store)
    wanted = resolve_images(store, "shapes", [gone], [])
    done = forget(
        connect(settings, load_params(settings.params_path), store=store),
        wanted,
        now="2026-01-01T00:00:00+00:00",
        by="me",
        why="asked",
    )
    assert sum("embedding table" in what for what in done.removed) == 1
    assert "the vectors that `similar` kept" in done.removed
    _, has_n = EmbeddingTable(store, encoder).lookup([gone, *kept])
    assert has_n.tolist() == [False, True, True, True, True]
    assert not (home / "features").exists()
    assert not (home / ".visionloop" / "features" / "map.html").exists()
    assert not (home / "suspects" / "suspects.png").exists()
    assert not list((home / ".visionloop" / "features").iterdir()), (
        "the map, the vectors, the pictures of similar images"
    )
    assert [row["sha256"] for row in read_rows(home / "suspects" / "corrections.csv")] == kept
