"""The flow `review` on a real log: a batch is made and told once, and waits until it is answered. Without Prefect."""

import importlib
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from shapes import ROOT
from visionloop.data.answers import LABEL, load_batches, write_answers
from visionloop.errors import DatasetError
from visionloop.monitoring.alert import Failure
from visionloop.params import make_params
from watched import FIRST, Watched, at_end_of, make_watched


class Told:
    """The flow, and what it has told: lines, pages, events, alerts to the webhook."""

    def __init__(self, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(ROOT / "flows"))
        self.module = importlib.import_module("review")
        self.lines, self.pages = list[str](), list[str]()
        self.events, self.alerts = list[tuple[str, Any]](), list[dict[str, Any]]()
        monkeypatch.setattr(self.module, "open_workspace", lambda home: watched.place)
        monkeypatch.setattr(self.module, "datetime", self)
        monkeypatch.setattr(self.module, "post_alert", self.post)
        monkeypatch.setattr(self.module.steps, "say", self.lines.append)
        told = self.module.told
        monkeypatch.setattr(told, "create_markdown_artifact", lambda text, **_: self.pages.append(text))
        monkeypatch.setattr(told, "emit_event", lambda *, event, payload, **_: self.events.append((event, payload)))

    def post(self, webhook: Any, alert: dict[str, Any], variables: Any) -> Failure:
        self.alerts.append(alert)
        return Failure("nobody answers")

    def now(self, zone: Any) -> datetime:
        return at_end_of(0)

    def run(self) -> tuple[str, str]:
        state = self.module.review.fn("/anywhere")
        assert state.is_completed()
        return state.name, state.message


def test_a_batch_is_told_once_and_waits_until_it_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = make_watched(tmp_path)
    hook, review = {"url": "https://chat.example/hook"}, {"count": 6, "random": 0.5}
    params = make_params({"name": "fake", "review": review, "monitor": {"webhook": hook}})
    watched.place = replace(watched.place, params=params)
    told = Told(watched, monkeypatch)
    assert told.run() == ("NothingToAsk", "the server has kept no image in 14 days")
    assert (told.pages, told.events, told.alerts) == ([], [], [])

    rows = watched.write_day(0)
    watched.keep(0, rows, 0.5)
    watched.write_rows(FIRST, rows)
    first = "batch 1: 6 images wait for a label, 0 have an answer"
    assert told.run() == ("Asked", first)
    about = {"name": "fake", "batch": 1, "images": 6}
    assert told.events == [("visionloop.review", about)]
    how = "Answer on a page: `visionloop review --serve --by NAME`"
    assert told.alerts == [{"event": "visionloop.review", "text": f"fake: {first}. {how}", **about}]
    assert told.lines[-1] == "note: the alert was not sent: nobody answers"
    assert told.pages[0].startswith(f"# fake: batch 1\n\n```\n{first}\nwhy: 3 ")

    (batch,) = load_batches(watched.place.store, "fake")
    one, *others = [image.sha256 for image in batch.images]
    write_answers(watched.place.store, "fake", batch, {one: (LABEL, ("ant",))}, by="ann", via="csv")
    assert told.run() == ("StillOpen", "batch 1: 6 images wait for a label, 1 has an answer")
    said = dict.fromkeys(others, (LABEL, ("bee",)))
    write_answers(watched.place.store, "fake", batch, said, by="ann", via="csv")
    assert told.run()[0] == "Asked"
    assert [payload["batch"] for _, payload in told.events] == [1, 2]

    def fail(*_: Any, **__: Any) -> None:
        raise DatasetError("store object datasets/fake/000001.json", "is damaged", "a version")

    monkeypatch.setattr(told.module, "ask", fail)
    with pytest.raises(DatasetError, match="is damaged"):
        told.run()
