"""Forgetting where others keep copies: a real dvc with its cache and a remote, and a versioned bucket on loopback."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes import make_bundle
from s3_server import point_to
from shapes import run, visionloop_here
from visionloop.bundle import load_bundle, seal_bundle
from visionloop.data.manifest import list_versions, make_image_key, make_pin, write_pin
from visionloop.data.parts import load_version_records
from visionloop.forget import find_everything, forget, resolve_images
from visionloop.params import make_params
from visionloop.records import ImageRecord, canonical_json
from visionloop.settings import Settings, load_settings
from visionloop.store import LocalStore, S3Store
from visionloop.workspace import connect
from workspaces import NAME, NOW, commit, store_image

DVC_YAML = """\
stages:
  prepare: {cmd: "true", deps: [data/dataset.json], outs: [data/prepared]}
  train: {cmd: "true", deps: [data/prepared], outs: [models/candidate]}
  evaluate:
    cmd: "true"
    deps: [models/candidate]
    outs: [reports/figures, reports/report.html, reports/predictions.csv]
"""


def dvc(home: Path, *argv: str) -> str:
    done = run(home, sys.executable, "-m", "dvc", *argv, DVC_SITE_CACHE_DIR=str(home / ".visionloop" / "dvc" / "site"))
    assert done.returncode == 0, done.stderr
    return done.stdout


def list_objects(folder: Path) -> dict[str, bytes]:
    """The objects of a cache or a remote, by md5."""
    files = (p for p in folder.rglob("*") if p.is_file() and "md5" in p.parts)
    return {p.parent.name + p.name: p.read_bytes() for p in files}


def write_outs(home: Path, rows: list[ImageRecord], golden: bytes, word: str) -> None:
    """Write what the stages would: arrays, a bundle, a report; `word` stands for what only these images show."""
    prepared, reports = home / "data" / "prepared", home / "reports"
    (reports / "figures").mkdir(parents=True, exist_ok=True)
    prepared.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"sha256": [r.sha256 for r in rows]}), prepared / "index.parquet")
    (prepared / "images-00000.npy").write_text("the same in every version")
    (prepared / "images-00001.npy").write_text(f"pixels of {word}")
    (reports / "figures" / "mistakes.png").write_text(f"a picture of {word}")
    (reports / "figures" / "confusion.png").write_text("the same in every version")
    (reports / "report.html").write_text(f"a page about {word}")
    (reports / "predictions.csv").write_text("sha256,actual\n" + "".join(f"{r.sha256},cat\n" for r in rows))
    candidate = home / "models" / "candidate"
    shutil.rmtree(candidate, ignore_errors=True)
    make_bundle(candidate, classes=("cat", "dog"), seed=9)
    (candidate / "golden" / "0.png").write_bytes(golden)
    card = load_bundle(candidate, expected_digest=seal_bundle(candidate)).card
    dataset = {"name": NAME, "version": 1}
    (candidate / "card.json").write_bytes(canonical_json(replace(card, name=NAME, dataset=dataset).to_json()))
    seal_bundle(candidate)
    dvc(home, "commit", "-f", "-q")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A workspace whose version 1 holds the image 2, whose cache and remote hold two versions, and git two commits."""
    home = tmp_path / "ws"
    home.mkdir()
    (home / "params.yaml").write_text(f"name: {NAME}\n")
    (home / "dvc.yaml").write_text(DVC_YAML)
    (home / ".gitignore").write_text("/.visionloop/\n/data/prepared\n/models/\n/reports/\n")
    for argv in (("init", "-q"), ("config", "user.email", "a@b.test"), ("config", "user.name", "a")):
        subprocess.run(["git", *argv], cwd=home, check=True)
    dvc(home, "init", "-q")
    (home / ".dvc" / "config").write_text(
        "[core]\n    remote = backup\n['remote \"backup\"']\n    url = ../../remote\n"
    )
    store = LocalStore(home / ".visionloop" / "store")
    rows = [store_image(store, seed) for seed in range(8)]
    pin = make_pin(commit(store, [], rows))
    write_pin(home / "data" / "dataset.json", pin)
    others = [row for row in rows if row.ordinal != 2]
    write_outs(home, rows, store.get(make_image_key(rows[2].sha256)), "anna")
    subprocess.run("git add -A && git commit -qm one", shell=True, cwd=home, check=True)
    write_outs(home, others, store.get(make_image_key(others[0].sha256)), "others")
    shutil.copytree(home / ".dvc" / "cache", tmp_path / "remote")  # what `dvc push` of each version has made
    return home


def test_dvc_keeps_no_copy_of_a_forgotten_image_and_all_else(home: Path) -> None:
    cache, remote = home / ".dvc" / "cache", home.parent / "remote"
    store = LocalStore(home / ".visionloop" / "store")
    row = next(r for r in load_version_records(store, list_versions(store, NAME)[0]) if r.ordinal == 2)
    data = store.get(make_image_key(row.sha256))
    before = list_objects(cache)
    assert data in before.values()
    assert data in list_objects(remote).values()
    settings = load_settings({}, home)
    found = find_everything(connect(settings, make_params({"name": NAME}), store=store), frozenset({row.sha256}))
    told = [copy.what for copy in found.copies if "object" in copy.what]
    assert [what.partition("object")[2] for what in told] == ["s in dvc's cache", "s in dvc's remote backup"]
    assert list_objects(cache) == before
    done = visionloop_here(home, "forget", row.sha256[:12], "--yes", "--why", "asked")
    assert done.returncode == 0, done.stderr
    assert "dataset pets version 2 holds 7 images, which is pinned now" in done.stdout
    for place in (cache, remote):
        left = list_objects(place)
        held = [text for text in left.values() if data in text or b"anna" in text or row.sha256.encode() in text]
        assert held == [], place
        assert b"the same in every version" in left.values()
    # The version without it is whole: what it shares with the other one was kept.
    kept = list_objects(cache)
    texts = [b"pixels of others", b"a picture of others", b"a page about others"]
    assert all(text in kept.values() for text in texts)
    lists = [json.loads(text) for md5, text in kept.items() if md5.endswith(".dir")]
    assert len(lists) == 3
    assert all(entry["md5"] in kept for files in lists for entry in files)
    assert "git commits that pin a version with them: " in done.stdout
    assert (home / "models" / "candidate").is_dir(), "the candidate of today never saw it"
    assert (
        find_everything(
            connect(settings, make_params({"name": NAME}), store=store),
            frozenset({row.sha256}),
            gone=frozenset({row.sha256}),
        ).copies
        == []
    )


def test_a_versioned_bucket_keeps_no_earlier_version(
    endpoint_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    point_to(monkeypatch, endpoint_url)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket="pets")
    client.put_bucket_versioning(Bucket="pets", VersioningConfiguration={"Status": "Enabled"})
    store = S3Store("s3://pets/team")
    first = [store_image(store, seed) for seed in range(6)]
    first[2] = replace(first[2], origins=("photos:anna/1.png",))
    one = commit(store, [], first)
    two = commit(store, first, [store_image(store, seed) for seed in (6, 7)], one)
    store.put(make_image_key(first[2].sha256), store.get(make_image_key(first[2].sha256)))
    settings = Settings(tmp_path, store.url, "http://127.0.0.1:1", (tmp_path / "artifacts").as_uri())
    write_pin(settings.pin_path, make_pin(two))
    wanted = resolve_images(store, NAME, [], ["photos:anna/*"])
    done = forget(connect(settings, make_params({"name": NAME}), store=store), wanted, now=NOW, by="me", why="asked")
    assert done.version is not None
    assert [len(load_version_records(store, version)) for version in list_versions(store, NAME)] == [6, 8, 7]
    answer = client.list_object_versions(Bucket="pets")
    keys = [entry["Key"] for kind in ("Versions", "DeleteMarkers") for entry in answer.get(kind, ())]
    assert not any(first[2].sha256 in key for key in keys if "/images/" in key)
    assert sum(first[3].sha256 in key for key in keys) == 1
    for entry in answer["Versions"]:
        body = client.get_object(Bucket="pets", Key=entry["Key"], VersionId=entry["VersionId"])["Body"].read()
        origins = pq.read_table(pa.BufferReader(body))["origins"].to_pylist() if body[:4] == b"PAR1" else []
        assert b"anna" not in body, entry["Key"]
        assert not any("anna" in str(place) for place in origins), entry["Key"]
