"""The loop's figures for Prometheus: as text, as the file `monitoring/metrics.prom`, and served to who asks again.

A retrain or a `monitor` is over before anybody could ask it. So what they leave in the store is read. All figures are
gauges with the label `name`. Times are told as times, not as ages: what nobody renews gets old by itself.
"""

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from visionloop.errors import ServingError
from visionloop.monitoring.judge import VERDICTS
from visionloop.monitoring.triggers import HELD, NO, RETRAIN
from visionloop.up.overview import Overview, parse_time, read_overview
from visionloop.workfolder import write_file
from visionloop.workspace import Workspace

CONTENT_TYPE = "text/plain; version=0.0.4"
EVERY_S = 30.0
DECISIONS = ("passed", "refused", "inconclusive", "waiting", "same")
LOOPBACK = ("127.0.0.1", "localhost")
Samples = Sequence[tuple[Mapping[str, str], Any]]
Family = tuple[str, str, Samples]


class Figures:
    """The text of a loop that is read again and again. What cannot be read for a while stays as it was."""

    def __init__(self) -> None:
        self._last: Overview | None = None
        self._read_at = 0.0
        self.text = ""

    def take(self, overview: Overview) -> None:
        """Make the text of what was read now."""
        if not overview.problems:
            self._read_at = _to_time(overview.at) or 0.0
        elif self._last is not None:
            overview = replace(overview, **{one: getattr(self._last, one) for one in overview.unread})
        self._last, self.text = overview, make_metrics_text(overview, self._read_at)


def write_metrics(workspace: Workspace, *, now: datetime) -> None:
    """Write the figures into the workspace, for node_exporter: all of them, or nothing."""
    figures = Figures()
    figures.take(read_overview(workspace, now=now))
    write_file(workspace.settings.home / "monitoring" / "metrics.prom", figures.text.encode())


def make_metrics_text(overview: Overview, read_at: float) -> str:
    """Return the figures in Prometheus' text format. `read_at`: when all could be read last; 0: never.

    What there is not yet, and what is no number or time in a damaged record, has no line.
    """
    lines = []
    for name, told, samples in (*_list_loop(overview, read_at), *_list_window(overview)):
        rows = [(labels, value) for labels, found in samples if (value := _to_number(found)) is not None]
        lines += [f"# HELP visionloop_{name} {told}", f"# TYPE visionloop_{name} gauge"] if rows else []
        for labels, value in rows:
            pairs = {"name": overview.name, **labels}.items()
            shown = ",".join(f'{key}="{_escape(text)}"' for key, text in pairs)
            lines.append(f"visionloop_{name}{{{shown}}} {value:.12g}")
    return "\n".join(lines) + "\n"


def _list_loop(overview: Overview, read_at: float) -> Iterator[Family]:
    """Yield what is known of dataset, champion, decisions, triggers, and of what waits for people."""
    dataset, champion, verdict, trigger = (
        one or {} for one in (overview.dataset, overview.champion, overview.verdict, overview.trigger)
    )
    yield "loop_read_timestamp_seconds", "When all parts of the loop could be read last; 0: never", [({}, read_at)]
    yield "loop_problems", "Parts of the loop that cannot be read", [({}, len(overview.problems))]
    yield "loop_dataset_version", "Version of the dataset", [({}, dataset.get("version"))]
    sides = [({"side": str(side)}, number) for side, number in dataset.get("sides", {}).items()]
    yield "loop_dataset_images", "Images of the dataset, by side", sides
    yield "loop_dataset_timestamp_seconds", "When the dataset got its version", [({}, _to_time(dataset.get("at")))]
    known = {key: str(champion.get(key) or "") for key in ("bundle", "version", "action")}
    yield "loop_champion_info", "The champion of the ledger", [(known, 1)] if champion else []
    yield "loop_promoted_timestamp_seconds", "When the champion was promoted", [({}, _to_time(champion.get("at")))]
    judged = [({"verdict": one}, one == verdict["verdict"]) for one in DECISIONS] if verdict else []
    yield "loop_decision", "1 for what the gate has decided last", judged
    yield "loop_decided_timestamp_seconds", "When the gate has decided last", [({}, _to_time(verdict.get("at")))]
    figures = [
        ({"of": of, "figure": str(one["figure"]["name"])}, one["figure"]["value"])
        for of, one in (("champion", champion), ("candidate", verdict))
        if one.get("figure")
    ]
    yield "loop_figure", "On the test side, of the champion and of the last candidate when it was judged", figures
    outcomes = [({"outcome": one}, one == trigger["outcome"]) for one in (RETRAIN, HELD, NO)] if trigger else []
    yield "loop_trigger", "1 for what the triggers have decided last", outcomes
    yield "loop_triggered_timestamp_seconds", "When the triggers were asked last", [({}, _to_time(trigger.get("at")))]
    yield (
        "loop_retraining",
        "1 while a retrain is under way, or has died on another machine",
        [({}, bool(overview.under_way))],
    )
    since = _to_time(overview.under_way_since)
    yield "loop_retraining_since_timestamp_seconds", "When the retrain that is under way began", [({}, since)]
    yield "loop_waiting_labels", "Images of open reviews that wait for a label", [({}, overview.waiting)]
    since = _to_time(overview.waiting_since)
    yield "loop_waiting_since_timestamp_seconds", "Since when the first of them waits", [({}, since)]
    yield "loop_unsent_alerts", "Alerts that the webhook has not taken yet", [({}, overview.unsent)]


def _list_window(overview: Overview) -> Iterator[Family]:
    """Yield what was found in the newest window that was judged; nothing before the first one."""
    if (window := overview.window) is None:
        return
    start, end = _to_time(window["start"]), _to_time(window["end"])
    labelled, checks = window["labelled"] or {}, window["checks"]
    floor = next((check["line"] for check in checks if check["name"] == "accuracy"), None)
    yield "monitor_window_end_seconds", "When the newest window that was judged has ended", [({}, end)]
    length = end - start if end and start else None
    yield "monitor_window_seconds", "How long a window is", [({}, length)]
    yield "monitor_images", "Images of the window", [({}, window["num_images"])]
    verdicts = [({"verdict": one}, one == window["verdict"]) for one in VERDICTS]
    yield "monitor_verdict", "1 for the verdict of the window", verdicts
    alerts = [({"check": str(c["name"]), "kind": str(c["kind"])}, c["state"] == "alert") for c in checks]
    yield "monitor_alert", "1 for each check of the window that alerts", alerts
    yield "monitor_drift_p", "p of the test for drift", [({}, window["p"])]
    yield "monitor_drift_level", "It is drift at or below this p", [({}, window["level"])]
    yield "monitor_expected_accuracy", "Accuracy by the confidence of the model", [({}, window["expected"])]
    yield "monitor_expected_is_trusted", "1 where that can be believed", [({}, window["expected_is_trusted"])]
    yield "monitor_labels", "Labels by which the accuracy is told", [({}, window["num_labels"])]
    yield "monitor_labelled_accuracy", "Accuracy by labels", [({}, labelled.get("value"))]
    yield "monitor_labelled_accuracy_low", "Low end of its 95 % interval", [({}, labelled.get("low"))]
    yield "monitor_labelled_accuracy_high", "High end of its 95 % interval", [({}, labelled.get("high"))]
    yield "monitor_accuracy_floor", "The accuracy by labels is too low when all of its interval is below", [({}, floor)]


def _to_number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _to_time(text: Any) -> float | None:
    return time_.timestamp() if (time_ := parse_time(text)) else None


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class LocalHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD, where `hosts` are named only to whoever asks by one of them; `route` is for the rest."""

    timeout = 20
    server_version, sys_version = "visionloop", ""
    refusal = "these figures are for this machine alone\n"
    hosts: frozenset[str]  # that it answers to; none: to all

    def do_GET(self) -> None:
        if self.hosts and self.headers.get("Host") not in self.hosts:
            self.answer(403, self.refusal)  # a name that an attacker points here
        else:
            self.route(self.path.partition("?")[0])

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: a line for each request would fill the log."""

    def route(self, path: str) -> None:
        """Answer what is asked of this path."""
        raise NotImplementedError

    def answer(self, code: int, text: str, kind: str = "text/plain", policy: str = "default-src 'none'") -> None:
        """Send a text, which no cache keeps and no other page shows."""
        body = text.encode()
        self.send_response(code)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", policy),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def make_server(workspace: Workspace, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server of the figures that listens; they are read in the background from now on. Port 0: a free one.

    Raises:
        ServingError: the port cannot be had.
    """
    figures = Figures()

    class Handler(LocalHandler):
        def route(self, path: str) -> None:
            if path == "/metrics":
                self.answer(200, figures.text, CONTENT_TYPE)
            else:
                self.answer(404, "figures are at /metrics\n", CONTENT_TYPE)

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as exc:
        found = f"cannot be had ({exc.strerror or exc})"
        raise ServingError(f"port {host}:{port}", found, "a free port", "Give another --port or --host.") from exc
    is_alone = host in LOOPBACK
    Handler.hosts = frozenset(f"{name}:{server.server_port}" for name in LOOPBACK) if is_alone else frozenset()
    server.daemon_threads = True

    def follow() -> None:
        while True:
            time.sleep(EVERY_S)
            figures.take(read_overview(workspace, now=datetime.now(UTC)))

    figures.take(read_overview(workspace, now=datetime.now(UTC)))
    threading.Thread(target=follow, daemon=True, name="read-the-loop").start()
    return server
