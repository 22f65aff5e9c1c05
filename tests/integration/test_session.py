"""All commands, one after the other as a person types them: each says what is next, and its --json can be read."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from fakes import make_image, run_here, write_photos
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.cli.app import app
from visionloop.promotion.ledger import append_entry
from worlds import GOOD, POOR, make_world, write_bundle

# These do one thing and tell of it in a sentence or two: no table, no verdict. `metrics` speaks as Prometheus reads.
ACTS = """
new / prepare / embed / train / map / explain / register / serve / export / retrain / schedule / up / down / ui
keys new / keys revoke / predictions export / predictions tidy / datasets export / store accept
shadow start / shadow stop / metrics
"""
# What a person types in a workspace with a candidate and a champion, one after the other, with the exit code.
SESSION = """
gate =3 / approve --why ok / gate / history / compare models/candidate kept/poor
similar one.png / explain one.png --bundle kept/poor --out why.png / suspects / suspects --out again
map --method pca / embed --out vectors.parquet / shadow start models/candidate / shadow report / shadow stop
store / store init
status =3 / down / keys list / keys revoke ann / predictions / predictions show
predictions export all.csv / predictions tidy / review --accept / triggers decide =3 / triggers history
datasets / datasets show / ingest photos --dry-run / ingest photos / ingest photos --json / datasets diff 1
datasets export 2 exported / datasets drop 2 / datasets drop 3 --json / forget --origin photos:a/* --dry-run
forget / prepare / export kept/poor handed / new other --example digits / serve --check kept/poor
"""
# With MLflow, torch or a stack; then what says nothing after: a key, what does not end, another's script.
ELSEWHERE = """
start / tune / lr-find / runs / train / evaluate / register / promote / rollback / predict / lineage / monitor
doctor / store accept
"""
NO_NEXT = "metrics / keys new / serve / ui / up / retrain / schedule"
ONCE = ("approve", "suspects --out", "ingest photos", "datasets drop", "serve")


def split(text: str) -> list[str]:
    return [" ".join(one.split()) for line in text.strip().splitlines() for one in line.split(" / ")]


def list_commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Return the options of each command that can be typed; a group alone is none, unless it does something."""
    assert run_here(monkeypatch) == 0, "all commands are loaded by now"
    found: dict[str, set[str]] = {}

    def visit(command: Any, path: str) -> None:
        children = getattr(command, "commands", {})
        if not children or command.invoke_without_command:
            found[path] = {name for param in command.params for name in param.opts}
        for name, child in children.items():
            visit(child, f"{path} {name}".strip())

    visit(typer.main.get_command(app), "")
    return found


def test_every_command_that_lists_or_judges_has_json(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {path for path, options in list_commands(monkeypatch).items() if "--json" not in options} == set(split(ACTS))


def test_every_command_says_what_is_next_and_its_json_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = make_session(tmp_path, monkeypatch)
    commands, seen = list_commands(monkeypatch), set[str]()
    capsys.readouterr()
    for typed in split(SESSION):
        words, _, code = typed.partition(" =")
        path = max((one for one in commands if f"{words} ".startswith(f"{one} ")), key=len)
        seen.add(path)
        if "--json" not in words:
            assert run_here(monkeypatch, *words.split()) == int(code or 0), (words, capsys.readouterr())
            last = capsys.readouterr().out.splitlines()[-1]
            assert last.startswith("next: ") or path == "gate", (words, last)  # its refusal says what to do
        if "--json" in words or ("--json" in commands[path] and not words.startswith(ONCE)):
            json_words = words if "--json" in words else f"{words} --json"
            assert run_here(monkeypatch, *json_words.split()) == int(code or 0), (words, capsys.readouterr())
            assert isinstance(json.loads(capsys.readouterr().out), dict), words
    assert run_here(monkeypatch, "similar", "one.png", "--quiet") == 0
    quiet = capsys.readouterr().out.splitlines()
    assert (quiet[0], quiet[-1].partition("/")[0], len(quiet)) == ("one.png:", "look at ", 10), "no encoder, no next"
    assert set(commands) - seen == set(split(ELSEWHERE)) | set(split(NO_NEXT)) - {"serve"}
    assert home.is_dir()


def make_session(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a workspace with a candidate that waits for approval, a champion, a second model, a key, and photos."""
    world = make_world(folder, prepared=True)
    home = world.settings.home
    gate = "{min_images: {all: 50, per_class: 5}, baseline: {mode: 'off'}, approval: required, rule: no_worse}"
    text = f"name: fake\nprepare: {{image_size: 32}}\nevaluate: {{resamples: 400}}\ngate: {gate}\n"
    (home / "params.yaml").write_text(text)
    monkeypatch.setenv("VISIONLOOP_HOME", str(home))
    monkeypatch.setenv("VISIONLOOP_STORE", world.settings.store_url)
    monkeypatch.chdir(home)
    world.write_candidate(GOOD)
    poor = write_bundle(home / "kept" / "poor", world.pin, POOR)
    upload_bundle(world.store, load_bundle(home / "kept" / "poor"))
    facts = {"decision": None, "dataset": {"version": 1}, "run_id": None, "by": "ann", "at": "2026-01-01T00:00:00Z"}
    append_entry(world.store, "fake", None, action="promote", bundle=poor, model_version="1", why="first", **facts)
    write_photos(home / "photos", 10, 5000, ("a", "b"))
    (home / "one.png").write_bytes(make_image(9))
    assert run_here(monkeypatch, "keys", "new", "--role", "predict", "--name", "ann") == 0
    return home
