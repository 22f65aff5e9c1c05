"""What a person has put stays: a rollback, through nightly runs; and a champion, through damage and a broken server.

The tests are one story: each goes on where the one before ended.
"""

import json
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from shapes import ROOT, ask_prefect, find_flow_run, retrain, set_train, visionloop, visionloop_here

DAMAGE = (
    "golden/answers.json is missing or differs from its digest in file://{home}/.visionloop/store; expected the files "
    "as they were made. `visionloop doctor --fix` puts it back from a copy, if there is one."
)
BROKEN = "import sys\nif 'serve' in sys.argv:\n    import os; print('no such symbol', flush=True); os._exit(1)\n"


@pytest.fixture(scope="module")
def stopped(
    copied: Path, prefect_api: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A workspace with a champion, where a second model was trained and then no server started; what was said."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "sitecustomize.py").write_text(BROKEN)
    edit(copied, "gate: {", "gate: {rule: no_worse, margin: 0.99, ")
    set_train(copied, seed=2)
    return copied, retrain(copied, PREFECT_API_URL=prefect_api, PYTHONPATH=str(folder))


@pytest.fixture(scope="module")
def home(stopped: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """The same, with the second, bad one as champion, and rolled back from."""
    home, _ = stopped
    done = visionloop_here(home, "start")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loading torch to train" not in done.stdout
    assert "golden images as the bundle does\n  registered as shapes version 2" in done.stdout
    assert "has a new champion" in done.stdout
    done = visionloop_here(home, "rollback", "--why", "it barks")
    assert done.returncode == 0, done.stderr
    return home


def list_ledger(home: Path) -> list[dict[str, Any]]:
    folder = home / ".visionloop" / "store" / "ledger" / "shapes"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def edit(home: Path, old: str, new: str) -> None:
    path = home / "params.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def read_last_run(api: str, home: Path) -> tuple[str, str]:
    run = find_flow_run(api, home)
    return run["state_name"], run["state_type"]


def read_artifact(api: str, home: Path) -> str:
    """The last page of this workspace: the key has a digest of its address."""
    key = f"retrain-shapes-{sha256(str(home).encode()).hexdigest()[:6]}%"
    query = {"artifacts": {"key": {"like_": key}, "type": {"any_": ["markdown"]}}, "sort": "CREATED_DESC", "limit": 1}
    (artifact,) = ask_prefect(api, "artifacts/filter", query)
    return str(artifact["data"])


def test_a_server_that_cannot_start_stops_before_the_ledger(
    stopped: tuple[Path, subprocess.CompletedProcess[str]], prefect_api: str
) -> None:
    home, done = stopped
    assert done.returncode == 2, done.stdout
    assert done.stderr == (
        "error: server, tried before it is needed: did not start (no such symbol); expected a server that listens.\n"
    )
    (entry,) = list_ledger(home)
    assert read_last_run(prefect_api, home) == ("Failed", "FAILED")
    page = "# shapes: retrain failed\n\nerror: server, tried before it is needed: did not start"
    assert read_artifact(prefect_api, home).startswith(page)
    assert [path.name for path in (home / ".visionloop" / "store" / "bundles").iterdir()] == [entry["bundle"]]


def test_after_a_rollback_a_run_with_nothing_changed_promotes_nothing(home: Path, prefect_api: str) -> None:
    before = list_ledger(home)
    assert [entry["action"] for entry in before] == ["promote", "promote", "rollback"]
    done = retrain(home, PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    assert "\nnothing changed: dataset 2, params, code\n" in done.stdout
    bad = before[1]["bundle"][:12]
    assert f"\nbundle {bad} was rolled back from by {before[2]['by']} on " in done.stdout
    assert "(entry 3): it barks; it stays down\n" in done.stdout
    assert list_ledger(home) == before
    assert read_last_run(prefect_api, home) == ("Unchanged", "COMPLETED")
    copy = shutil.copytree(home.parent / "photos", home.parent / "copied")
    assert "new places of known ones" in visionloop_here(home, "ingest", str(copy)).stdout
    done = visionloop_here(home, "start")
    assert (done.returncode, "it barks; it stays down\n" in done.stdout) == (0, True), done.stdout + done.stderr
    assert list_ledger(home) == before


def test_a_change_that_yields_the_same_bundle_is_refused_by_the_rule(home: Path, prefect_api: str) -> None:
    before = list_ledger(home)
    edit(home, "resamples: 200", "resamples: 300")
    for still in ("", "still "):
        done = retrain(home, PREFECT_API_URL=prefect_api)
        assert done.returncode == 3, done.stdout + done.stderr
        assert done.stderr.startswith(
            f"not promoted: gate: the candidate is {still}refused by the rule rolled_back (rolled back from by "
        )
        assert read_last_run(prefect_api, home) == (("Unchanged" if still else "Refused"), "CANCELLED"), "no green"
        assert "| gate: rolled_back | FAIL: rolled back from by " in read_artifact(prefect_api, home)
    assert list_ledger(home) == before


def test_a_person_may_take_it_back_with_a_reason(home: Path) -> None:
    done = visionloop_here(home, "promote", "--again")
    assert (done.returncode, done.stderr) == (
        2,
        "error: visionloop promote --again: has no --why; expected a reason, kept in the ledger. "
        'Say why it should serve after all: `visionloop promote --again --why "..."`.\n',
    )


def test_an_upgrade_that_yields_the_champion_itself_is_no_refusal_and_damage_has_a_way_out(
    home: Path, tmp_path: Path
) -> None:
    """The code of a stage has changed, and its model is the same. Then a golden image of it is lost in the store."""
    shutil.copytree(ROOT / "src" / "visionloop", tmp_path / "src" / "visionloop")
    path = tmp_path / "src" / "visionloop" / "evaluation" / "evaluate.py"
    path.write_text(path.read_text() + "\nUPGRADED = True\n")
    edit(home, ", seed: 2", "")
    before = list_ledger(home)

    def start() -> tuple[int, str]:
        done = visionloop(home, "start", PYTHONPATH=str(tmp_path / "src"))
        return done.returncode, done.stdout + done.stderr

    for outcome in ("the candidate is the champion of shapes itself; nothing moved", "nothing changed: dataset "):
        code, said = start()
        assert (code, outcome in said) == (0, True), said
    champion = before[-1]["bundle"]
    shutil.rmtree(home / ".visionloop" / "bundles", ignore_errors=True)
    (home / ".visionloop" / "store" / "bundles" / champion / "golden" / "answers.json").unlink()
    code, said = start()
    assert (code, said.splitlines()[-1]) == (2, f"error: champion {champion[:12]}: {DAMAGE.format(home=home)}")
    done = visionloop_here(home, "predict", str(home.parent / "photos" / "disc"))
    assert (done.returncode, "`visionloop doctor --fix` puts it back" in done.stderr) == (2, True), done.stderr
    done = visionloop_here(home, "doctor", "--fix")
    assert done.returncode == 0, done.stdout
    fix = next(line for line in done.stdout.splitlines() if not line.startswith("mending: "))  # on a slow machine
    assert fix.startswith(f"fix   restored golden/answers.json of bundle {champion[:12]} in file://")
    assert start()[0] == 0
    assert visionloop_here(home, "predict", str(home.parent / "photos" / "disc")).returncode == 0
    assert list_ledger(home) == before
    *told, after = visionloop_here(home, "history").stdout.splitlines()
    assert after == "next: `visionloop rollback --to NUMBER` puts an earlier one back"
    assert [line.split("  decision")[0][26:] for line in told] == [
        f"{entry['action']:<8}  {(entry['previous'] or 'none')[:12]:>12} -> {entry['bundle'][:12]}  "
        f"model {entry['model_version']:<4}  dataset 2"
        for entry in reversed(before)
    ]
    said = visionloop_here(home, "lineage", "champion").stdout
    assert said.startswith(f"bundle    {champion[:12]} (champion): binary, 2 classes: disc, ring\nledger    entry 1, ")
    photo = next((home.parent / "photos" / "disc").iterdir())
    assert f"\nbundle    {champion[:12]} (candidate, champion): " in visionloop_here(home, "lineage", str(photo)).stdout
