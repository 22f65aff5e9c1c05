"""The whole loop, as `make demo-loop` shows it: against a real Prefect server, a real worker, a real model server."""

import importlib
import json
from pathlib import Path

import pytest

from shapes import ROOT


@pytest.mark.long
def test_the_loop_closes_and_what_a_person_put_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "flows"))
    module, lines = importlib.import_module("demo_loop"), list[str]()
    home = tmp_path / "ws"
    client = module.run_demo(home, lines.append)
    told = "\n".join(lines)
    assert client.failed == [], "no request fails while a model is swapped"
    assert [version for version, _ in client.answers[:: len(client.answers) - 1]] == ["1", "1"]
    shares = client.measure()
    assert shares["2"] > shares["1"] + 0.1, "it has learned the new look"
    entries = [json.loads(path.read_text()) for path in sorted((home / ".visionloop/store/ledger/demo-loop").iterdir())]
    assert [entry["action"] for entry in entries] == ["promote", "promote", "rollback"]
    assert entries[2]["bundle"] == entries[0]["bundle"] != entries[1]["bundle"]
    decisions = [json.loads(p.read_text()) for p in sorted((home / ".visionloop/store/triggers/demo-loop").iterdir())]
    assert [one["outcome"] for one in decisions] == ["held", "retrain"]
    for line in ("monitor/demo-loop ended as Drift", "retrain/demo-loop-if-due ended as Promoted", "it stays down"):
        assert line in told, told
