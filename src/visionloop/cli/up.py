"""The stack as commands: up, status, down, ui. Each runs other programs, or tells how they are."""

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import Json, app, print_json, say_next
from visionloop.errors import require_installed
from visionloop.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    from visionloop.up.board import Board, State
    from visionloop.up.overview import Overview

NOT_WELL = 3
DOWN_S = 60.0
NEEDED = ("mlflow", "prefect", "uvicorn", "jinja2")
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the home page; the others are chosen free.")]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page, from a desktop's terminal.")]


@app.command()
def up(
    port: Port = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Come back when all is up.")] = False,
    browser: Browser = True,
) -> None:
    """Start the whole stack on this machine: home page, MLflow, Prefect with the schedule, the prediction server.

    Ctrl-C stops all of it, `visionloop down` too. A part that ends is started again. The ports stay the same the next
    time, and so does what MLflow and Prefect know. Logs are in .visionloop/up.

    Examples:

      visionloop up

      visionloop up --detach --port 8080
    """
    from visionloop.data.known_store import check_store
    from visionloop.up.board import Board

    for library in NEEDED:
        require_installed(library)
    workspace = open_workspace()
    check_store(workspace)
    board = Board(workspace.settings.hidden_dir)
    if not detach:
        _supervise(workspace, board, port, browser=browser)
        return
    with board.lock():  # told here, where a person sees it; the one behind takes it anew
        pass
    url = _start_behind(workspace, board, port)
    say_next("`visionloop status` shows how it is, `visionloop down` stops it")
    _open_page(url, browser=browser)


def _supervise(workspace: Workspace, board: "Board", port: int | None, *, browser: bool) -> None:
    """Run the supervisor in this process until it is stopped."""
    from visionloop.pipeline import make_stage_environment
    from visionloop.up.parts import PORTS, make_parts
    from visionloop.up.supervise import Supervisor, stop_left

    home = workspace.settings.home
    with board.lock():
        if left := stop_left(board):
            print(f"the last one was killed: stopped {left} processes that it had left")
        prefect_url = os.environ.get("PREFECT_API_URL")
        ports, told = board.choose_ports(PORTS, {} if port is None else {"home": port})
        for line in told:
            print(line)
        parts = make_parts(workspace, ports, prefect_url)
        page = parts[0].url
        print(f"starting the stack of {workspace.name} ({home}); the page is {page}", flush=True)

        def tell_up() -> None:
            print(f"{workspace.name} is up: {page}  (Ctrl-C stops all of it)", flush=True)
            _open_page(page, browser=browser)

        environment = make_stage_environment(home, os.environ)
        Supervisor(board, parts, environment, lambda line: print(line, flush=True)).run(tell_up)


def _start_behind(workspace: Workspace, board: "Board", port: int | None) -> str:
    """Start the supervisor in a session of its own, show what it says until all is up, and return the page's address.

    Exits with its code if it ends before.
    """
    from visionloop.lifetime import start_apart
    from visionloop.up.board import UP

    log = board.folder / "up.log"
    command = [sys.executable, "-m", "visionloop", "up", "--no-browser"]
    command += [] if port is None else ["--port", str(port)]
    with log.open("w") as sink, log.open() as lines:
        home = workspace.settings.home
        process = start_apart(command, sink, cwd=home, env={**os.environ, "VISIONLOOP_HOME": str(home)})
        while True:
            ended = process.poll() is not None
            state = board.read_live()
            for line in lines:
                print(line.replace("  (Ctrl-C stops all of it)", ""), end="", flush=True)
            if ended:
                raise typer.Exit(process.returncode)
            if state and state.phase == UP and state.pid == process.pid:
                return state.get_url("home")
            time.sleep(0.1)


@app.command()
def status(
    as_json: Json = False,
) -> None:
    """Show how the stack and the loop are: each part, dataset, champion, last verdict, drift, next run.

    Exit code 3: it is not up, or a part is not well. With a broken params.yaml the parts are shown, with exit code 2.

    Examples:

      visionloop status

      visionloop status --json
    """
    from dataclasses import asdict
    from datetime import UTC, datetime

    from visionloop.errors import ParamsError
    from visionloop.settings import load_settings
    from visionloop.up.board import Board
    from visionloop.up.overview import read_overview

    state = Board(load_settings(os.environ).hidden_dir).read_live()
    is_well = state is not None and state.is_well
    found = {"is_up": state is not None, "is_well": is_well, "up": asdict(state) if state else None}
    try:
        workspace = open_workspace()
    except ParamsError as exc:  # it runs on with what it has read before
        if as_json:
            print_json({**found, "loop": None, "problem": str(exc)})
        else:
            print("\n".join(describe_parts(state)))
            if state:
                print("the parts run on with the settings that they have read before; params.yaml is broken:")
        raise
    url = state.get_url("prefect") if state else ""
    overview = read_overview(workspace, now=datetime.now(UTC), prefect_api=f"{url}/api" if url else None)
    if as_json:
        print_json({**found, "loop": overview.to_json()})
    else:
        for line in [*describe_parts(state), "", *describe_overview(overview)]:
            print(line)
        _advise_next(overview, state)
    if not is_well:
        raise typer.Exit(NOT_WELL)


def _advise_next(overview: "Overview", state: "State | None") -> None:
    from visionloop.up.overview import advise

    text, command = advise(overview)
    if command:
        print(text)
        say_next(f"`{command}`")
    else:
        say_next(f"open {state.get_url('home')}" if state else "`visionloop up` starts the stack")


def describe_parts(state: "State | None") -> list[str]:
    """Return a line for each part, with its address or what is wrong."""
    from visionloop.words import fit

    if state is None:
        return ["not up"]
    lines = [f"{state.phase} since {_show_time(state.started_at)} (process {state.pid})"]
    for part in state.parts:
        again = f"started again {part.restarts} x" if part.restarts else ""
        told = "; ".join(filter(None, (part.url if part.state == "ready" else part.why, again)))
        lines.append(f"  {part.title:<10} {part.state:<11} {fit(told)}".rstrip())
    return lines


def describe_overview(overview: "Overview") -> list[str]:
    """Return the state of the loop, a line each."""
    from visionloop.up.overview import FROM_STORE
    from visionloop.words import fit

    lines = [f"{overview.name} in {overview.home}"]
    dataset, champion, verdict, window = overview.dataset, overview.champion, overview.verdict, overview.window
    rows = {"dataset": "none yet", "champion": "none yet", "verdict": "none yet", "served": "no window was judged yet"}
    away = " (the store is away)" if {*FROM_STORE} <= {*overview.unread} else ""
    for what, name in {
        "dataset": "dataset",
        "champion": "champion",
        "verdict": "decisions",
        "served": "window",
    }.items():
        if name in overview.unread:
            rows[what] = f"not known{away}"
    if dataset:
        rows["dataset"] = f"version {dataset['version']}, {dataset['num_images']:,} images"
        rows["dataset"] += f", {len(dataset['classes'])} classes"
    if champion:
        since = f"since {_show_time(champion['at'])}, by {champion['by']}: {champion['why']}"
        rows["champion"] = f"entry {champion['entry']}, version {champion['version']}, {since}"
    if verdict:
        figure = verdict["figure"]
        shown = f", {figure['name']} {100 * figure['value']:.1f} %" if figure else ""
        held = f" ({'; '.join(verdict['held'])})" if verdict["held"] else ""
        by_person = f", {verdict['by_person']}" if verdict["by_person"] else ""
        rows["verdict"] = f"decision {verdict['number']}: {verdict['verdict']}{by_person}{held}{shown}"
    if window:
        quality = f", {100 * window['labelled']['value']:.1f} % right by labels" if window["labelled"] else ""
        drift = "" if window["p"] is None else f", drift p = {window['p']:.3g}"
        rows["served"] = f"{window['verdict']}: {window['num_images']:,} images{drift}{quality}"
    if overview.under_way:
        since = f", since {_show_time(overview.under_way_since)}" if overview.under_way_since else ""
        rows["under way"] = f"{overview.under_way}{since}"
    if overview.plan and overview.plan["next"]:
        rows["next"] = f"{overview.plan['next'][0]['name']}, {_show_time(overview.plan['next'][0]['at'])}"
    if overview.waiting is not None:
        rows["waiting"] = f"{overview.waiting:,} images for a label"
    lines += [f"  {what:<10} {fit(told)}" for what, told in rows.items()]
    lines += [f"  LOOK       {problem}" for problem in overview.problems]
    return lines


def _show_time(text: str) -> str:
    from visionloop.up.overview import parse_time

    time = parse_time(text)
    return time.astimezone().strftime("%Y-%m-%d %H:%M") if time else "a time unknown"


@app.command()
def down() -> None:
    """Stop what `visionloop up` has started in this workspace, also what a killed one has left.

    Examples:

      visionloop down
    """
    import signal

    from visionloop.errors import BusyError
    from visionloop.settings import load_settings
    from visionloop.up.board import Board
    from visionloop.up.supervise import stop_left

    board = Board(load_settings(os.environ).hidden_dir)  # a broken params.yaml keeps nothing running
    state = board.read_live()
    if state:
        os.kill(state.pid, signal.SIGTERM)
        deadline = time.monotonic() + DOWN_S
        while board.read_live() and time.monotonic() < deadline:
            time.sleep(0.1)
        if board.read_live():
            raise BusyError(
                "visionloop up", f"did not stop in {DOWN_S:.0f} s", "it to end", f"Try `kill -9 {state.pid}`."
            )
        print("stopped")
        say_next("`visionloop up` starts it again")
        return
    with board.lock():
        left = stop_left(board)
    print(f"stopped {left} processes that a killed one had left" if left else "nothing is up in this workspace")
    say_next("`visionloop up`")


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 5000,
    browser: Browser = True,
) -> None:
    """Look at the training runs in MLflow: its server alone, on this workspace's experiment. Ctrl-C stops it.

    Examples:

      visionloop ui

      visionloop ui --port 0 --no-browser
    """
    from visionloop.secrets import mask
    from visionloop.up.board import Board
    from visionloop.up.parts import find_runs_page

    require_installed("mlflow")
    workspace = open_workspace()
    uri = workspace.settings.tracking_uri
    state = Board(workspace.settings.hidden_dir).read_live()
    server = (state.get_url("mlflow") if state else "") or ("" if uri.startswith("sqlite:") else uri)
    if not server:
        _run_mlflow(workspace, port, browser=browser)
        return
    page = mask(find_runs_page(server, workspace.name))
    print(f"the runs of {workspace.name}: {page}")
    _open_page(page, browser=browser)


def _run_mlflow(workspace: Workspace, port: int, *, browser: bool) -> None:
    """Run MLflow over the SQLite file of a workspace until Ctrl-C."""
    from visionloop.errors import ServingError
    from visionloop.lifetime import start_apart, stop_process, stop_with_us, terminable
    from visionloop.pipeline import make_stage_environment
    from visionloop.up.board import HOST, choose_port
    from visionloop.up.parts import MLFLOW_ENVIRONMENT, ask, find_runs_page, make_mlflow_command

    chosen = choose_port(port)
    server = f"http://{HOST}:{chosen}"
    log = workspace.settings.hidden_dir / "mlflow" / "ui.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"starting MLflow on {workspace.settings.tracking_uri} ...", flush=True)
    with log.open("w") as sink, terminable():
        home = workspace.settings.home
        environment = {**make_stage_environment(home, os.environ), **MLFLOW_ENVIRONMENT}
        process = start_apart(make_mlflow_command(workspace, chosen), sink, cwd=home, env=environment)
        stop_with_us(process.pid)
        try:
            while ask(f"{server}/health", limit_s=2) is None:
                if process.poll() is not None:
                    raise ServingError("MLflow", f"ended with code {process.returncode}", "it to answer", f"See {log}.")
                time.sleep(0.2)
            page = find_runs_page(server, workspace.name)
            print(f"the runs of {workspace.name}: {page}  (Ctrl-C stops it)", flush=True)
            _open_page(page, browser=browser)
            process.wait()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
        finally:
            stop_process(process)


def _open_page(url: str, *, browser: bool) -> None:
    """Open a page for a person at a desktop: not from a script, and no browser of the terminal."""
    has_desktop = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if browser and url and sys.stdout.isatty() and has_desktop:
        import webbrowser

        webbrowser.open(url)
