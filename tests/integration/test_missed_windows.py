"""What `visionloop monitor` makes up for: missed windows, alerts that nobody took, requests without a row."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fakes import run_here
from http_server import Answer, serve
from visionloop.data.prediction_log import PREDICTIONS, REQUESTS
from visionloop.monitoring.alert import send_unsent
from visionloop.monitoring.watch import accept_window, find_missed, list_unsent, list_windows, load_verdict
from visionloop.params import make_params
from watched import FIRST, Watched, at_end_of, find_check, make_watched, watch


def watch_broken(watched: Watched, number: int) -> str:
    """Judge a day that one client sent alone; return the window."""
    watched.write_day(number, client=f"client {number}")
    verdict = watch(watched, number, again=True)
    assert verdict.verdict == "broken"
    return verdict.window


class Clock(datetime):
    @classmethod
    def now(cls, tz: object = None) -> "Clock":
        assert tz is UTC
        return cls.fromisoformat(at_end_of(6).isoformat())


def test_windows_that_were_missed_are_judged_the_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = make_watched(tmp_path)
    assert find_missed(watched.place, now=at_end_of(6)) == ([], 0), "on the first day there is nothing to catch up with"
    for number in range(7):
        alone = {"client": "gate"} if number == 4 else {}
        watched.write_day(number, shift=3.0 if number in (2, 6) else 0.0, **alone)
    watch(watched, 0)
    monkeypatch.setattr("visionloop.monitoring.watch.CAUGHT_UP", 4)
    days = [datetime(2026, 3, day, tzinfo=UTC) for day in range(3, 8)]
    assert find_missed(watched.place, now=at_end_of(6)) == (days[1:], 1)
    assert find_missed(watched.place, now=at_end_of(6), everything=True) == (days, 0)
    monkeypatch.setattr("visionloop.cli.monitoring.open_workspace", lambda: watched.place)
    monkeypatch.setattr("visionloop.cli.monitoring.datetime", Clock)
    watched.place.tracking.champion = "7"  # type: ignore[attr-defined]
    assert run_here(monkeypatch, "monitor") == 4
    told, noted = capsys.readouterr()
    late = [line for line in told.splitlines() if line.startswith("missed before: ")]
    assert [line.rpartition("images: ")[2].partition(" (")[0] for line in late] == ["drift", "fine", "broken", "fine"]
    assert late[0].startswith(
        "missed before: window 2026-03-04 00:00 to 2026-03-05 00:00 UTC, 192 images: drift (drift"
    )
    assert noted == "LOOK: 1 older windows were missed: --all judges them too\n"
    last = load_verdict(watched.place, "20260308T0000")
    assert last and find_check(last, "alias")["state"] == "alert", "moved by hand: told of the last window"
    assert last.reference == ("20260302T0000", "20260305T0000", "20260307T0000"), "neither drifted nor broken ones"
    assert run_here(monkeypatch, "monitor") == 3
    assert capsys.readouterr().err == "", "what was left out is not told each day"
    assert run_here(monkeypatch, "monitor", "--all") == 3
    told = capsys.readouterr().out
    assert told.count("missed before: ") == 1
    assert told.splitlines()[-1].startswith(
        "next: `serve.keep_images` in params.yaml keeps images that `visionloop review"
    )
    assert len(list_windows(watched.place)) == 7
    assert run_here(monkeypatch, "monitor", "--at", "2026-03-03") == 0
    figures = (tmp_path / "monitoring" / "metrics.prom").read_text()
    assert 'visionloop_monitor_verdict{name="fake",verdict="drift"} 1\n' in figures, "those of the newest window"
    assert run_here(monkeypatch, "monitor", "--all", "--at", "2026-03-03") == 2
    assert "--all: is with --at" in capsys.readouterr().err


def test_windows_that_have_expired_are_not_missed(tmp_path: Path) -> None:
    """Their rows are gone: they would look empty. A change of `window_hours` is no gap either."""
    watched = make_watched(tmp_path)
    watched.write_day(0)
    watch(watched, 0)
    for number in (5, 6, 7):
        watched.write_day(number)
    watched.place.store.delete(PREDICTIONS.make_key("fake", FIRST, "part"))
    days = [datetime(2026, 3, day, tzinfo=UTC) for day in (7, 8)]
    assert find_missed(watched.place, now=at_end_of(7)) == (days, 0)
    watched.place = replace(watched.place, params=make_params({"name": "fake", "monitor": {"window_hours": 12}}))
    assert find_missed(watched.place, now=at_end_of(7)) == ([], 0)


def test_alerts_that_could_not_be_sent_come_later_in_order(tmp_path: Path) -> None:
    watched = make_watched(tmp_path)
    with serve({}) as site:
        hook = {"url": f"{site.url}/hook", "tries": 1}
        params = make_params({"name": "fake", "monitor": {"webhook": hook, "max_client_share": 0.9}})
        watched.place = replace(watched.place, params=params)
        names = [watch_broken(watched, number) for number in range(4)]
        watch(watched, 3)  # once more: nothing is new
        store, folder = watched.place.store, "monitoring/fake"
        assert list_unsent(watched.place) == names

        def send(day: int) -> list[str]:
            return send_unsent(watched.place, {}, now=at_end_of(day))

        site.routes["/hook"] = Answer(status=503)
        told = send(3)
        assert told[0].startswith(
            "the alert was not sent: the webhook answers 503; the next `visionloop monitor` sends"
        )
        assert told[1:] == ["3 later alerts wait too"]
        assert (len(site.requests), list_unsent(watched.place)) == (1, names), "nothing is lost that was not taken"
        site.requests.clear()
        answers = iter([Answer(), Answer(status=400), Answer()])
        site.routes["/hook"] = lambda _: next(answers)
        store.delete(f"{folder}/{names[2]}/verdict.json")  # killed while it was judged
        assert len(send(3)) == 1
        sent = [json.loads(request.body)["window"]["name"] for request in site.requests]
        assert sent == [names[0], names[1], names[3]], "the oldest first; one that is refused holds up no other"
        assert list_unsent(watched.place) == names[1:3]
        assert watch_broken(watched, 2) == names[2]
        site.requests.clear()
        site.routes["/hook"] = Answer()
        accept_window(watched.place, names[2], by="ann", why="known", now="2026-03-06T10:00:00Z")
        assert send(20) == [f"the alert of window {names[1]} was not sent for 7 days: given up"]
        assert (site.requests, list_unsent(watched.place)) == ([], [])
        store.put(f"{folder}/{names[0]}/unsent.json", b"{}")
        store.put(f"{folder}/{names[0]}/verdict.json", b"{")
        assert "cannot be sent: store object" in send(20)[0]


def test_refused_and_failed_requests_are_checked(tmp_path: Path) -> None:
    watched = make_watched(tmp_path)
    for number, counts in enumerate([(1000, 50, 10), (1000, 51, 11), (6, 4, 0)]):
        watched.write_day(number)
        for server in ("a", "b"):
            time = datetime(2026, 3, 2 + number, 12, tzinfo=UTC)
            row = {"time": time, "server": server, **dict(zip(("requests", "refused", "errors"), counts, strict=True))}
            watched.place.store.put(REQUESTS.make_key("fake", time.date(), server), REQUESTS.encode([row]))
    assert watch(watched, 0).verdict == "fine"
    full = watch(watched, 1)
    assert full.verdict == "service"
    assert {check["name"]: check["found"] for check in full.list_alerts()} == {
        "refused": "102 of 2,000 requests were refused (429, 503)",
        "errors": "22 of 2,000 requests failed (5xx)",
    }
    assert find_check(watch(watched, 2), "refused")["state"] == "alert"
    watched.write_day(3)
    assert find_check(watch(watched, 3), "requests")["state"] == "unknown", "a server of an older version"
