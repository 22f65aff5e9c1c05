"""The home page: links, and the state of the loop, which refreshes itself. A process of its own, on loopback alone.

    python -m visionloop.up.home PORT      (`visionloop up` starts it; VISIONLOOP_HOME names the workspace)

It only shows: it takes no input, and answers GET from this machine's own addresses. The state is read in the
background, so that a page is there at once, also while a store hangs.
"""

import base64
import hashlib
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from http.server import ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from visionloop.lifetime import die_with_parents
from visionloop.promotion.report import load_template
from visionloop.up.board import HOST, Board, State
from visionloop.up.metrics import CONTENT_TYPE, Figures, LocalHandler
from visionloop.up.overview import Overview, advise, parse_time, read_overview
from visionloop.up.parts import find_runs_page
from visionloop.workspace import Workspace, open_workspace

EVERY_S, EVERY_REMOTE_S = 4.0, 30.0
REPORTS = {  # what a person may read, and where it is in the workspace
    "decision": ("decisions/latest.html", "the last decision"),
    "evaluation": ("reports/report.html", "the candidate alone"),
    "monitoring": ("monitoring/latest.html", "the last window"),
}
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
SHOWN_CLASSES = 14
TONES = {
    **dict.fromkeys(("passed", "fine", "ready", "COMPLETED"), "good"),
    **dict.fromkeys(("same", "learning", "waiting", "stopped", "Unchanged", "NotDue", "CANCELLED"), "calm"),
    **dict.fromkeys(("inconclusive", "service", "starting", "Inconclusive", "RUNNING"), "odd"),
    **dict.fromkeys(("refused", "drift", "quality", "broken", "restarting", "silent"), "bad"),
    **dict.fromkeys(("Drift", "Quality", "Broken", "Refused", "FAILED", "CRASHED"), "bad"),
}


@dataclass
class Watch:
    """Reads the state of a workspace again and again, in a thread; the newest is what is shown."""

    workspace: Workspace
    overview: Overview | None = None
    runs_page: str = ""
    state: State | None = None
    read_at: float = 0.0
    figures: Figures = field(default_factory=Figures)
    board: Board = field(init=False)

    def __post_init__(self) -> None:
        self.board = Board(self.workspace.settings.hidden_dir)

    def read(self) -> None:
        """Read it once."""
        self.state = state = self.board.read()
        url = state.get_url("prefect") if state else ""
        mlflow = state.get_url("mlflow") if state else ""
        self.runs_page = find_runs_page(mlflow, self.workspace.name) if mlflow else ""
        api = f"{url}/api" if url else None
        self.overview = read_overview(self.workspace, now=datetime.now(UTC), prefect_api=api)
        self.figures.take(self.overview)
        self.read_at = time.monotonic()

    def follow(self) -> None:
        """Read it until the process ends: often where the store is a folder."""
        every_s = EVERY_S if self.workspace.settings.store_url.startswith("file:") else EVERY_REMOTE_S
        while True:
            self.read()
            time.sleep(every_s)


def render(watch: Watch, *, whole: bool = True) -> str:
    """Return the page, or its changing part alone."""
    now = datetime.now(UTC)
    state, overview = watch.board.read(), watch.overview
    home = watch.workspace.settings.home
    age_s = time.monotonic() - watch.read_at if watch.read_at else 0
    return load_template("visionloop.up", "home.html").render(
        whole=whole,
        name=watch.workspace.name,
        home=home,
        state=state,
        parts={part.name: part for part in state.parts} if state else {},
        overview=overview,
        age_s=age_s,
        advice=advise(overview) if overview else ("", ""),
        reports=[(key, title) for key, (path, title) in REPORTS.items() if (home / path).is_file()],
        runs_page=watch.runs_page,
        chart=draw_decisions(overview.decisions) if overview else "",
        shown_classes=SHOWN_CLASSES,
        tones=TONES,
        ago=lambda text: describe_time(text, now),
        exact=_describe_exact,
        percent=_describe_percent,
        spans=mark_commands,
        script=Markup(_read("home.js")),
        style=Markup(_read("home.css")),
    )


def describe_time(text: str | None, now: datetime) -> str:
    """Return a time as a person says it: `3 min ago`, `in 5 h`, `2 days ago`."""
    time_ = parse_time(text)
    if time_ is None:
        return "at a time unknown"
    seconds = (now - time_).total_seconds()
    size = abs(seconds)
    if size < 50:
        return "just now" if seconds >= 0 else "in a moment"
    units = ((3000, 60, "min"), (86_400, 3600, "h"), (float("inf"), 86_400, "days"))
    unit_s, unit = next((unit_s, unit) for limit, unit_s, unit in units if size < limit)
    number = max(1, round(size / unit_s))
    told = f"{number} {unit.removesuffix('s') if number == 1 else unit}"
    return f"{told} ago" if seconds >= 0 else f"in {told}"


def mark_commands(text: str) -> Markup:
    """Return a text as HTML: what stands in backticks is code."""
    parts = enumerate(text.split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(one) if i % 2 else one for i, one in parts)


def draw_decisions(decisions: tuple[dict[str, Any], ...]) -> Markup:
    """Draw the figure of each decision with its interval, by what came of it; "" for fewer than two."""
    rows = [one for one in decisions if one["figure"]]
    if len(rows) < 2:
        return Markup("")
    bounds = [(one["figure"]["low"], one["figure"]["high"]) for one in rows]
    values = [one["figure"]["value"] for one in rows]
    low = min([*values, *(bottom for bottom, _ in bounds if bottom is not None)])
    high = max([*values, *(top for _, top in bounds if top is not None)])
    step, height, span = 44, 96, max(high - low, 1e-3)

    def place(value: float) -> float:
        return float(8 + (height - 16) * (high - value) / span)

    width, marks = 76 + step * (len(rows) - 1), []
    for value in (low, high):
        y = f"{place(value):.1f}"
        marks.append(f'<line x1="42" x2="{width}" y1="{y}" y2="{y}"/>')
        marks.append(f'<text class="axis" y="{y}" dy="4">{100 * value:.0f} %</text>')
    for i, (one, (bottom, top)) in enumerate(zip(rows, bounds, strict=True)):
        x, tone = 56 + step * i, TONES.get(one["verdict"], "odd")
        if bottom is not None and top is not None:
            marks.append(f'<path class="{tone}" d="M{x} {place(bottom):.1f}V{place(top):.1f}"/>')
        marks.append(f'<circle class="{tone}" cx="{x}" cy="{place(one["figure"]["value"]):.1f}" r="5"/>')
        marks.append(f'<text x="{x}" y="{height + 14}">{int(one["number"])}</text>')
    label = f"{rows[-1]['figure']['name']} of the last {len(rows)} decisions, {100 * low:.0f} to {100 * high:.0f} %"
    head = f'<svg viewBox="0 0 {width} {height + 20}" width="{width}" role="img" aria-label="{label}">'
    return Markup(f"{head}{''.join(marks)}</svg>")


class Handler(LocalHandler):
    """Answers a few paths, to whoever asks by an address of this machine's own."""

    refusal = "this page is for this machine alone\n"
    watch: Watch

    def route(self, path: str) -> None:
        if path in ("/", "/part"):
            self.answer(200, render(self.watch, whole=path == "/"), "text/html", make_policy())
        elif path == "/metrics" and self.watch.figures.text:
            self.answer(200, self.watch.figures.text, CONTENT_TYPE)
        elif path == "/health":
            self.answer(200, "{}", "application/json")
        elif path.removeprefix("/reports/") in REPORTS:
            self._answer_report(path.removeprefix("/reports/"))
        else:
            self.answer(404, "there is no such page\n")

    def _answer_report(self, key: str) -> None:
        try:
            text = (self.watch.workspace.settings.home / REPORTS[key][0]).read_text(encoding="utf-8")
        except (OSError, ValueError):
            self.answer(404, "there is no such report yet\n")
            return
        self.answer(200, text, "text/html", REPORT_POLICY)


@cache
def make_policy() -> str:
    """Return the Content-Security-Policy of the page: its own script and style, and what it asks itself."""
    script, style = (
        base64.b64encode(hashlib.sha256(_read(name).encode()).digest()).decode() for name in ("home.js", "home.css")
    )
    own = f"script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@cache
def _read(name: str) -> str:
    return files("visionloop.up").joinpath(name).read_text(encoding="utf-8").strip()


def _describe_exact(text: str | None) -> str:
    """Return a time by the clock of this machine."""
    time_ = parse_time(text)
    return time_.astimezone().strftime("%a %d %b %Y, %H:%M") if time_ else "unknown"


def _describe_percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def main() -> None:
    """Serve the page until the process is ended."""
    if os.environ.get("VISIONLOOP_GUARDIAN"):
        die_with_parents()
    port = int(sys.argv[1])
    Handler.watch = Watch(open_workspace())
    Handler.hosts = frozenset(f"{name}:{port}" for name in (HOST, "localhost", "[::1]"))
    threading.Thread(target=Handler.watch.follow, daemon=True, name="follow").start()
    with ThreadingHTTPServer((HOST, port), Handler) as server:
        server.daemon_threads = True
        print(f"home page on http://{HOST}:{port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
