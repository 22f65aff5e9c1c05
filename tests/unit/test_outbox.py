"""The events of a camera on their way to a webhook: in order, once each where it answers, kept where it does not."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from http_server import Answer, WebServer, serve
from visionloop.errors import BusyError
from visionloop.params.loop import Webhook
from visionloop.predict.lines import Outbox

LIMIT_S = 60.0


def open_outbox(folder: Path, site: WebServer, **keys: Any) -> Outbox:
    headers = {"Authorization": "Bearer ${TOKEN}"}
    hook = Webhook(url=f"{site.url}/hook", headers=headers, tries=1, timeout_s=5.0)
    return Outbox(folder, "rtsp://***@gate/1", hook, {"TOKEN": "s3cret"}, **keys)


def numbers(site: WebServer) -> list[int]:
    return [json.loads(request.body)["number"] for request in site.requests]


def test_events_are_sent_in_order_and_gone(tmp_path: Path) -> None:
    with serve({"/hook": Answer(status=204)}) as site:
        box = open_outbox(tmp_path, site)
        for number in range(5):
            assert box.put({"number": number})
        assert box.close(LIMIT_S) == []
        assert numbers(site) == [0, 1, 2, 3, 4]
        assert len({json.loads(request.body)["id"] for request in site.requests}) == 5
        assert {request.headers["authorization"] for request in site.requests} == {"Bearer s3cret"}
    assert not list(tmp_path.glob("*/*.json"))


def test_an_event_that_comes_just_before_the_end_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread has seen that nothing waits; before it looks whether it is to end, an event comes, and the end."""
    has_looked, is_closing, send_all = threading.Event(), threading.Event(), Outbox._send_all

    def be_late(box: Outbox) -> bool:
        is_through = send_all(box)
        has_looked.set()
        is_closing.wait(LIMIT_S)
        return is_through

    monkeypatch.setattr(Outbox, "_send_all", be_late)
    with serve({"/hook": Answer()}) as site:
        box = open_outbox(tmp_path, site)
        assert has_looked.wait(LIMIT_S)
        box.put({"number": 0})
        close = box._closing.set
        monkeypatch.setattr(box._closing, "set", lambda: (close(), is_closing.set()))
        assert box.close(LIMIT_S) == []
        assert numbers(site) == [0]


def test_what_a_webhook_did_not_take_is_sent_by_the_next_run(tmp_path: Path) -> None:
    status = 503
    with serve({"/hook": lambda _: Answer(status=status)}) as site:
        box = open_outbox(tmp_path, site)
        for number in range(3):
            box.put({"number": number})
        (told,) = box.close(LIMIT_S)
        assert told.startswith("3 events wait for the webhook (the webhook answers 503)")
        assert set(numbers(site)) == {0}, "those behind it wait, so that all come in order"
        site.requests.clear()
        status = 200
        assert open_outbox(tmp_path, site).close(LIMIT_S) == []
        assert numbers(site) == [0, 1, 2]


def test_an_event_that_is_refused_holds_no_other_up_and_is_kept(tmp_path: Path) -> None:
    answers = iter([Answer(status=400), Answer(), Answer()])
    with serve({"/hook": lambda _: next(answers)}) as site:
        box = open_outbox(tmp_path, site)
        for number in range(3):
            box.put({"number": number})
        (told,) = box.close(LIMIT_S)
        assert told.startswith("1 event waits for the webhook")
        assert numbers(site) == [0, 1, 2]
    assert [json.loads(path.read_bytes())["number"] for path in tmp_path.glob("*/*.json")] == [0]


def test_a_full_outbox_takes_nothing_and_says_so(tmp_path: Path) -> None:
    is_open = threading.Event()

    def answer(_: object) -> Answer:
        is_open.wait(LIMIT_S)
        return Answer()

    with serve({"/hook": answer}) as site:
        box = open_outbox(tmp_path, site, most=2)
        assert [box.put({"number": number}) for number in range(4)] == [True, True, False, False]
        is_open.set()
        assert box.close(LIMIT_S) == ["2 events were not taken for the webhook: 2 waited already"]
        assert numbers(site) == [0, 1]


def test_one_process_sends_for_a_camera(tmp_path: Path) -> None:
    with serve({"/hook": Answer()}) as site:
        box = open_outbox(tmp_path, site)
        with pytest.raises(BusyError, match=r"rtsp://\*\*\*@gate/1: another process watches it"):
            open_outbox(tmp_path, site)
        box.close(LIMIT_S)
        open_outbox(tmp_path, site).close(LIMIT_S)


def test_an_event_of_long_ago_and_a_torn_file_are_given_up(tmp_path: Path) -> None:
    with serve({"/hook": Answer()}) as site:
        open_outbox(tmp_path, site).close(LIMIT_S)
        (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
        (folder / "00000000000000000001.json").write_text("{}")
        (folder / "99999999999999999999.json").write_text("{")
        assert open_outbox(tmp_path, site).close(LIMIT_S) == []
        assert site.requests == []
    assert not list(folder.glob("*.json"))
