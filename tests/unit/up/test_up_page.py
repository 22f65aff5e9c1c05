"""The home page: what it shows of a loop, also of a hostile one; what it answers, and to whom."""

import http.client
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from memory_tracking import MemoryTracking
from visionloop.cli.up import describe_overview
from visionloop.data.prediction_log import RequestCounts
from visionloop.monitoring.watch import watch_window
from visionloop.params import make_params
from visionloop.promotion.ledger import append_entry, find_verdict, read_champion, store_decision
from visionloop.records import Decision, RuleResult
from visionloop.store import LocalStore
from visionloop.store.lease import Claim
from visionloop.up.board import UP, PartState, State
from visionloop.up.home import Handler, Watch, describe_time, draw_decisions, make_policy, mark_commands, render
from visionloop.up.overview import FROM_STORE, Overview, advise, read_overview
from visionloop.workspace import Workspace, connect
from watched import at_end_of, make_watched
from workspaces import build, make_settings, store_image

NOW = datetime(2026, 3, 5, 12, tzinfo=UTC)
LABELS = ("猫", "<img src=x onerror=alert(1)>", "Zwerghuhn")


def make_decision(number: int, verdict: str, value: float, **facts: Any) -> Decision:
    metrics: dict[str, dict[str, float | None]] = {
        "accuracy": {"value": value, "low": value - 0.04, "high": value + 0.02}
    }
    rule = RuleResult("better", verdict == "passed", "equal to the champion", "a gain")
    at = (NOW - timedelta(days=9 - number)).isoformat()
    known: dict[str, Any] = {
        "name": "pets", "number": number, "verdict": verdict, "candidate": str(number) * 64, "champion": None,
        "test_digest": "t", "num_test": 40, "rules": (rule,), "metrics": metrics, "champion_metrics": {},
        "state": {"try": str(number)}, "dataset": {"version": 1}, "run_id": None, "decided_at": at,
    }  # fmt: skip
    return Decision(**{**known, **facts})


def make_place(home: Path) -> Workspace:
    """A workspace of pets with images of three classes, two decisions and a champion."""
    settings, store = make_settings(home), LocalStore(home / "store")
    rows = [store_image(store, seed, labels=(LABELS[seed % 3],)) for seed in range(12)]
    place = build(settings, make_params({"name": "pets"}), store, rows, prepared=False)
    store_decision(store, make_decision(1, "passed", 0.9))
    store_decision(store, make_decision(2, "refused", 0.8))
    facts = {"action": "promote", "bundle": "1" * 64, "model_version": "1", "decision": 1, "dataset": {"version": 1}}
    append_entry(store, "pets", None, **facts, run_id=None, by="ann", why="<b>first</b>", at=NOW.isoformat())
    return place


def make_watch(place: Workspace, overview: Overview | None) -> Watch:
    watch = Watch(place, overview)
    watch.board.folder.mkdir(parents=True)
    server = PartState("server", "server", "restarting", "ended with code 2: `serve` <i>fails</i>", "http://x:8000", 1)
    home = PartState("home", "home page", "ready", "", "http://127.0.0.1:8080", 1, NOW.isoformat(), 2)
    watch.board.write(State(1, "m", UP, NOW.isoformat(), (home, server)))
    return watch


def test_a_loop_is_shown_whole_and_escaped(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    overview = read_overview(place, now=NOW)
    assert overview.problems == ()
    page = render(make_watch(place, overview))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("<main>")[2]))
    assert "90.0 % accuracy 95 %: 86.0 % to 92.0 %" in text
    assert "Promoted" in text and "by ann : &lt;b&gt;first&lt;/b&gt;" in text
    assert "12 images, 3 classes" in text and "猫 4" in text
    assert "better: equal to the champion" in text and "refused" in text
    assert "ended with code 2: serve &lt;i&gt;fails&lt;/i&gt;" in text
    assert "server: restarting" in text and "started again 2 times" in text
    assert "http://x:8000" not in page, "no link to a part that does not answer"
    assert "<img" not in page and "<b>first" not in page
    assert page.count("<script>") == 1 and "http-equiv" not in page


def test_what_a_person_promoted_again_is_not_called_refused(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    first = read_champion(place.store, "pets")
    facts = {"action": "promote", "bundle": "2" * 64, "model_version": "2", "decision": 2, "dataset": {"version": 1}}
    entry = append_entry(place.store, "pets", first, **facts, run_id=None, by="ann", why="again", at=NOW.isoformat())
    assert find_verdict(place.store, "pets", entry) == "decision 2: promoted by a person (`--again`), as entry 2"
    assert first and find_verdict(place.store, "pets", first) == "decision 1: passed"
    overview = read_overview(place, now=NOW)
    assert [one["by_person"] for one in overview.decisions] == ["", "promoted by a person (`--again`), as entry 2"]
    page = render(make_watch(place, overview), whole=False)
    assert '<span class="pill bad">refused</span>' not in page
    assert "promoted by a person (<code>--again</code>), as entry 2" in page
    assert "promoted by a person (`--again`), as entry 2" in "".join(describe_overview(overview))


def test_status_of_a_store_that_is_away_says_that_nothing_is_known() -> None:
    away = Overview("pets", "/ws", NOW.isoformat(), problems=("the store is away",), unread=FROM_STORE)
    lines = describe_overview(away)
    assert [line.split()[0] for line in lines if line.endswith("not known (the store is away)")] == [
        *("dataset", "champion", "verdict", "served")
    ]
    assert "none yet" not in "".join(lines)
    part = Overview("pets", "/ws", NOW.isoformat(), unread=("champion",))
    assert [line.split(maxsplit=1) for line in describe_overview(part)[1:3]] == [
        ["dataset", "none yet"],
        ["champion", "not known"],
    ]


def test_a_retrain_under_way_began_as_people_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Claim(1, "t", "ann", "box", 7, started_at=(NOW - timedelta(minutes=6)).isoformat())
    monkeypatch.setattr("visionloop.up.overview.read_holder", lambda store, name: claim)
    overview = read_overview(place := make_place(tmp_path), now=NOW)
    page = render(make_watch(place, overview), whole=False)
    assert "by ann on box (process 7), began <time" in page and f">{claim.started_at}<" not in page
    assert "T" not in next(one for one in describe_overview(overview) if "under way" in one)


def test_an_empty_workspace_says_what_to_do_first(tmp_path: Path) -> None:
    place = connect(make_settings(tmp_path), make_params({"name": "pets"}), store=LocalStore(tmp_path / "store"))
    page = render(make_watch(place, overview := read_overview(place, now=NOW)))
    assert overview == Overview("pets", str(tmp_path), NOW.isoformat(), unsent=0)
    assert "no images yet" in page and "no candidate was judged yet" in page
    assert "<code>visionloop ingest PHOTOS --save</code>" in page
    assert "Reading the state of the loop" in render(Watch(place), whole=False), "before the first reading is done"


def test_what_is_damaged_is_told_and_the_rest_stands(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.store.put("ledger/pets/000001.json", b"[]")
    (tmp_path / "data" / "dataset.json").write_text('{"name": "pets"')
    overview = read_overview(place, now=NOW)
    assert (overview.champion, overview.dataset, len(overview.decisions)) == (None, None, 2)
    assert [one.partition(":")[0] for one in overview.problems] == [
        "data/dataset.json",
        "store object ledger/pets/000001.json",
    ]
    page = render(make_watch(place, overview), whole=False)
    assert page.count('class="problem"') == len(overview.problems)
    assert "decision" in page.lower()


def test_the_last_window_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = make_watched(tmp_path)
    watched.write_day(0)
    watch_window(watched.place, now=at_end_of(0))
    overview = read_overview(watched.place, now=at_end_of(0))
    assert overview.window is not None
    assert (overview.window["verdict"], overview.window["num_images"]) == ("fine", 192)
    page = render(make_watch(watched.place, overview), whole=False)
    text = re.sub(r"<[^>]+>", "", page)
    assert "192 images in the window that ended" in text and "answered since" not in text
    counts = RequestCounts(120, 3, 1)
    monkeypatch.setattr("visionloop.up.overview.read_requests", lambda *_: counts)
    later = read_overview(watched.place, now=at_end_of(0) + timedelta(hours=5))
    page = render(Watch(watched.place, later), whole=False)
    assert "; 116 requests answered since, which nothing judges by itself: set <code>schedule.monitor</code>" in page
    assert later.window is not None
    planned = replace(later, window={**later.window, "is_planned": True})
    assert "; 116 requests answered since, judged with the next window" in render(
        Watch(watched.place, planned), whole=False
    )
    assert "192 images" in page and "accuracy expected by the confidence" in page


@pytest.mark.parametrize(("number", "said"), [(1, "1</b> image waits for"), (3, "3</b> images wait for")])
def test_images_that_wait_are_told_in_their_number(tmp_path: Path, number: int, said: str) -> None:
    watched = make_watched(tmp_path)
    watched.write_day(0)
    overview = replace(read_overview(watched.place, now=at_end_of(0)), waiting=number)
    assert said in render(make_watch(watched.place, overview), whole=False)


@pytest.mark.parametrize(
    ("facts", "command"),
    [
        ({"dataset": None}, "visionloop ingest PHOTOS --save"),
        ({"champion": None, "decisions": ()}, "visionloop start"),
        ({"champion": None, "decisions": ({"verdict": "waiting"},)}, "visionloop approve --why WHY"),
        ({"champion": None}, "visionloop retrain"),
        ({"waiting": 3}, "visionloop review --serve"),
        ({"window": {"verdict": "drift"}}, "visionloop retrain"),
        ({"window": {"verdict": "drift"}, "under_way": "ann"}, ""),
        ({"window": {"verdict": "drift"}, "plan": {"running": [1]}}, ""),
        ({"dataset": None, "champion": None, "problems": ("the store is away",)}, ""),
        ({}, ""),
    ],
)
def test_the_next_step(facts: dict[str, Any], command: str) -> None:
    known: dict[str, Any] = {
        "dataset": {"version": 1},
        "champion": {"entry": 1},
        "decisions": ({"verdict": "refused"},),
    }
    if facts.get("dataset", 1) is None:
        known |= {"champion": None, "decisions": ()}
    assert advise(replace(Overview("pets", "/pets", ""), **{**known, **facts}))[1] == command


@pytest.mark.parametrize(
    ("delta", "told"),
    [
        (timedelta(seconds=20), "just now"),
        (timedelta(minutes=5), "5 min ago"),
        (timedelta(hours=3), "3 h ago"),
        (timedelta(days=1), "1 day ago"),
        (timedelta(days=40), "40 days ago"),
        (timedelta(hours=-2), "in 2 h"),
        (timedelta(seconds=-5), "in a moment"),
    ],
)
def test_times_are_told_as_people_do(delta: timedelta, told: str) -> None:
    assert describe_time((NOW - delta).isoformat(), NOW) == told
    assert describe_time("gestern", NOW) == describe_time(None, NOW) == "at a time unknown"


def test_decisions_are_drawn_with_their_intervals() -> None:
    rows = tuple(
        {"number": n, "verdict": "passed", "figure": {"name": "accuracy", "value": v, "low": v - 0.1, "high": None}}
        for n, v in ((1, 0.5), (2, 0.7))
    )
    assert draw_decisions(rows[:1]) == ""
    svg = draw_decisions(rows)
    assert [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)] == [61.3, 8.0]
    assert "accuracy of the last 2 decisions, 40 to 70 %" in svg


def test_only_backticks_become_code() -> None:
    assert mark_commands("run `a <b>` & see") == "run <code>a &lt;b&gt;</code> &amp; see"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[int]:
    place = make_place(tmp_path)
    (tmp_path / "decisions").mkdir()
    (tmp_path / "decisions" / "latest.html").write_text("<h1>decision</h1>")
    watch = make_watch(replace(place, tracking=MemoryTracking()), None)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"watch": watch})) as server:
        port = server.server_address[1]
        server.RequestHandlerClass.hosts = frozenset({f"localhost:{port}"})  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield port
        server.shutdown()
        thread.join()


def ask(port: int, path: str, method: str = "GET", host: str = "") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={"Host": host or f"localhost:{port}"})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), answer.headers["Content-Security-Policy"] or ""
    connection.close()
    return found


def test_it_answers_this_machine_alone_and_only_shows(served: int) -> None:
    code, page, policy = ask(served, "/")
    assert (code, policy) == (200, make_policy())
    assert "'unsafe" not in policy and "default-src 'none'" in policy
    assert ask(served, "/?a=1")[1] == page
    assert ask(served, "/", host="evil.test")[0] == 403
    assert ask(served, "/", "HEAD")[:2] == (200, "")
    assert ask(served, "/", "POST")[0] == 501
    assert ask(served, "/reports/decision")[1:] == (
        "<h1>decision</h1>",
        "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    )
    for path in ("/reports/evaluation", "/reports/../params.yaml", "/reports/", "/state.json", "/%2e%2e/etc/passwd"):
        assert ask(served, path)[0] == 404, path
