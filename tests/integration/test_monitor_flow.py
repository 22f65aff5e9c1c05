"""The flow `monitor` on a real log: its states, its artifact, its events, each alert once. Prefect is stood in for."""

import importlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from shapes import ROOT
from watched import Watched, at_end_of, make_watched


class Told:
    """What the flow has told Prefect, and the day that it runs on."""

    def __init__(self, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(ROOT / "flows"))
        self.module, self.day = importlib.import_module("monitor"), 0
        self.lines: list[str] = []
        self.artifacts: list[tuple[str, str, str]] = []
        self.events: list[tuple[str, str, str]] = []
        monkeypatch.setattr(self.module, "open_workspace", lambda home: watched.place)
        monkeypatch.setattr(self.module, "datetime", self)
        monkeypatch.setattr(self.module.told, "create_markdown_artifact", self.keep)
        monkeypatch.setattr(self.module.steps, "say", self.lines.append)
        monkeypatch.setattr(self.module.told, "emit_event", self.emit)

    def keep(self, text: str, *, key: str, description: str) -> None:
        self.artifacts.append((text, key, description))

    def emit(self, *, event: str, resource: dict[str, str], payload: dict[str, Any]) -> None:
        self.events.append((event, resource["prefect.resource.id"], payload["window"]))

    def run(self, day: int) -> tuple[str, str]:
        self.day = day
        state = self.module.monitor.fn("/anywhere")
        assert state.is_completed()
        return state.name, state.message

    def now(self, zone: Any) -> datetime:
        assert zone is UTC
        return at_end_of(self.day)


def test_each_verdict_is_a_state_and_an_alert_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = make_watched(tmp_path)
    told = Told(watched, monkeypatch)
    watched.write_day(0)
    assert told.run(0) == ("Fine", "window 20260302T0000: no alert")
    assert told.events == []
    watched.write_day(1, shift=3.0, client="`\n# owned")
    name, message = told.run(1)
    assert name == "Broken"
    assert message == "window 20260303T0000: one_client"
    text, key, description = told.artifacts[-1]
    assert text.startswith("# fake: broken\n\n```\nwindow 2026-03-03 00:00 to 2026-03-04 00:00 UTC, 192 images\n")
    assert text.count("`") == 8, "the block, and the path of the page"
    assert key.startswith("monitor-fake-")
    assert description.endswith("UTC, 192 images")
    assert told.lines[-1] == "verdict: broken"
    watched.write_day(2, shift=3.0)
    assert [told.run(2)[0] for _ in range(2)] == ["Drift", "Drift"]
    assert told.events == [
        ("visionloop.broken", "visionloop.fake", "20260303T0000"),
        ("visionloop.drift", "visionloop.fake", "20260304T0000"),
    ]
