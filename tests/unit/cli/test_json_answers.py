"""--json: one object on stdout with the figures that the text has, and the same exit code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from fakes import make_bundle, make_image, run_here
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.cli.app import app, print_json
from visionloop.promotion.ledger import append_entry, read_champion
from worlds import GOOD, POOR, make_world, write_bundle

Ask = Callable[..., dict[str, Any]]
GATE = "{min_images: {all: 50, per_class: 5}, baseline: {mode: 'off'}}"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    def run(*argv: str, code: int = 0) -> dict[str, Any]:
        assert run_here(monkeypatch, *argv, "--json") == code
        value = json.loads(capsys.readouterr().out)
        assert isinstance(value, dict)
        return value

    return run


def test_what_is_no_number_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (2, None)}})
    assert capsys.readouterr().out == '{"a": null, "b": [1.5, null], "c": {"d": [2, null]}}\n'


def test_models_on_a_small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    world = make_world(tmp_path, prepared=True)
    home = world.settings.home
    section = "prepare: {image_size: 32}\nevaluate: {resamples: 400}\n"
    (home / "params.yaml").write_text(f"name: fake\n{section}gate: {GATE}\n")
    monkeypatch.setenv("VISIONLOOP_HOME", str(home))
    monkeypatch.setenv("VISIONLOOP_STORE", world.settings.store_url)
    monkeypatch.chdir(home)
    good = world.write_candidate(GOOD)
    poor = write_bundle(tmp_path / "poor", world.pin, POOR)
    for digest, folder in ((good, world.settings.candidate_dir), (poor, tmp_path / "poor")):
        shutil.copytree(folder, home / "kept" / digest)

    judged = ask("evaluate")
    assert judged["bundle"] == good
    assert judged["metrics"]["accuracy"]["value"] > 0.7
    assert judged["page"] == "reports/report.html"

    compared = ask("compare", "models/candidate", str(tmp_path / "poor"))
    assert (compared["candidate"], compared["champion"]) == (good, poor)
    assert compared["names"] == ["models/candidate", str(tmp_path / "poor")]
    assert compared["metrics"]["accuracy"] == judged["metrics"]["accuracy"]
    assert Path(compared["page"]).is_file()

    decided = ask("gate")
    assert (decided["verdict"], decided["candidate"], decided["champion"]) == ("passed", good, None)
    assert {rule["rule"]: rule["passed"] for rule in decided["rules"]}["first"] is True

    world.write_candidate(POOR)
    (home / "params.yaml").write_text(f"name: fake\n{section}gate: {{floors: {{accuracy: 0.99}}}}\n")
    assert ask("gate", code=3)["verdict"] == "refused"
    assert ask("history") == {"name": "fake", "entries": [], "num_before": 0, "problems": []}
    facts = {"decision": None, "dataset": {"version": 1}, "run_id": None, "by": "ann", "at": "2026-01-01T00:00:00Z"}
    for bundle, why in ((good, "first"), (poor, "by mistake")):
        upload_bundle(world.store, load_bundle(home / "kept" / bundle))
        before = read_champion(world.store, "fake")
        entry = {"action": "promote", "bundle": bundle, "model_version": "1", "why": why, **facts}
        append_entry(world.store, "fake", before, **entry)
    newest, oldest = ask("history")["entries"]
    found = ask("history", "--last", "1")
    assert ([one["number"] for one in found["entries"]], found["num_before"]) == ([2], 1)
    assert (newest["number"], newest["bundle"], newest["why"], newest["champion"]) == (2, poor, "by mistake", True)
    assert (oldest["bundle"], oldest["champion"], oldest["dataset"]) == (good, False, {"version": 1})


def test_a_revoked_key_is_listed_without_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ask: Ask
) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    monkeypatch.chdir(tmp_path)
    assert ask("keys", "list") == {"keys": [], "open_to_all": True}
    for argv in (("new", "--role", "predict", "--name", "camera-3"), ("revoke", "camera-3")):
        assert run_here(monkeypatch, "keys", *argv) == 0
    capsys.readouterr()
    found = ask("keys", "list")
    (key,) = found["keys"]
    assert (key["name"], key["roles"], found["open_to_all"]) == ("camera-3", ["predict"], False)
    assert key["revoked_at"]
    assert "sha256" not in key


def test_store_and_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    monkeypatch.chdir(tmp_path)
    (fact,) = ask("store")["facts"]
    assert (fact["subject"], fact["ok"]) == ("store", True)
    assert fact["found"].startswith("file://")
    found = ask("doctor", code=2)
    by_subject = {one["subject"]: one for one in found["findings"]}
    assert (found["ok"], found["mended"]) == (False, [])
    assert by_subject["python"]["ok"] is True
    assert (by_subject["dataset"]["ok"], bool(by_subject["dataset"]["todo"])) == (False, True)


def test_datasets_runs_and_decisions_of_an_empty_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    monkeypatch.chdir(tmp_path)
    assert ask("datasets") == {"name": "pets", "versions": []}
    assert ask("triggers", "history") == {"decisions": []}
    assert ask("predictions") == {"name": "pets", "days": []}
    assert ask("predictions", "show") == {"name": "pets", "answers": []}


def test_predict_answers_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "b", classes=("cat", "dog"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(make_image(1))
    (tmp_path / "photos" / "2.png").write_bytes(b"no image")
    found = ask("predict", "photos", "--bundle", "b")
    first, second = found["answers"]
    assert first["path"] == "photos/1.png"
    assert first["probabilities"][first["prediction"]] == first["confidence"]
    assert found["counts"] == {first["prediction"]: 1}
    assert "prediction" not in second
    assert second["error"].startswith("is text, not an image")


def list_options(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Return the command, the name and the words of each option."""
    assert run_here(monkeypatch) == 0, "all commands are loaded by now"
    found: list[tuple[str, str, str]] = []

    def visit(command: Any, path: str) -> None:
        for param in command.params:
            found.extend((path, name, param.help or "") for name in param.opts if name.startswith("--"))
        for name, child in getattr(command, "commands", {}).items():
            visit(child, f"{path} {name}".strip())

    visit(typer.main.get_command(app), "")
    return found


@pytest.mark.parametrize("name", ["--json", "--quiet", "--encoder", "--by", "--allow-new-classes"])
def test_a_flag_has_the_same_words_everywhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {text for _, option, text in list_options(monkeypatch) if option == name}
    assert len(words) <= 1, words
