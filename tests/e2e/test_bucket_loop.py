"""The whole loop with its store in a real S3 server: from images to a champion, and on to another machine."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from s3_server import make_client, point_to
from shapes import run

BUCKET = "digits-loop"
STORE = f"s3://{BUCKET}/team"
SHORTER = {
    "max_epochs: 15": "max_epochs: 2\n  precision: fp32",
    "learning_rate: 2.0e-3": "learning_rate: 5.0e-3",
    "resamples: 2000": "resamples: 200",
}
IN_GIT = ("params.yaml", "dvc.yaml", "dvc.lock", "code.json", "data/dataset.json", ".dvc/config")


def ask(home: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a workspace; it must succeed."""
    command = [sys.executable, "-m", *argv] if argv[0] == "visionloop" else argv
    done = run(home, *command, VISIONLOOP_STORE=STORE, DVC_SITE_CACHE_DIR=str(home / "site"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# Long: each step of it on a bucket is in test_s3_setup, test_s3 and test_store_away, the digits in test_readme.
@pytest.mark.long
def test_digits_from_images_to_a_champion_that_another_machine_uses(
    seaweed_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(monkeypatch, seaweed_url)
    here, there = tmp_path / "here", tmp_path / "there"
    ask(tmp_path, "visionloop", "new", str(here), "--example", "digits")
    params = (here / "params.yaml").read_text()
    for longer, shorter in SHORTER.items():
        assert longer in params
        params = params.replace(longer, shorter)
    (here / "params.yaml").write_text(params)
    told = ask(here, "visionloop", "store", "init").stdout
    for line in told.partition("to keep DVC's cache there too:\n")[2].partition("next: ")[0].splitlines():
        ask(here, *line.split())

    told = ask(here, "visionloop", "start").stdout
    assert "digits has a new champion" in told
    assert not (here / ".visionloop" / "store").exists(), "nothing lies in the local store"
    images = make_client(seaweed_url).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="team/images/")
    assert sum(page["KeyCount"] for page in images) == 1797

    ask(here, "dvc", "push", "-q")
    for name in IN_GIT:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(here / name, there / name)
    ask(there, "dvc", "config", "core.no_scm", "true")
    ask(there, "dvc", "pull", "-q")
    for name in ("models/candidate/model.onnx", "reports/metrics.json", "data/prepared/index.parquet"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert json.loads((there / "reports" / "metrics.json").read_text())["accuracy"] >= 0.9
    sevens = here / ".visionloop" / "sources" / "digits" / "7"
    ask(there, "visionloop", "predict", str(sevens), "--out", "answers.csv")
    with (there / "answers.csv").open(encoding="utf-8") as file:
        answers = [row["prediction"] for row in csv.DictReader(file)]
    assert answers.count("7") >= 0.9 * len(answers) > 100
