"""Alerts and dashboards against what is really scraped: a server after traffic, a loop in which all has happened.

With Prometheus each expression is asked, and an alert comes to a webhook; without it those tests are skipped.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from fakes import make_image
from http_server import Answer, serve
from model_server import serving
from watched import make_whole_loop

INFRA = Path(__file__).parents[2] / "infra"
RULES = INFRA / "prometheus" / "rules.yml"
BOARDS = {path.stem: json.loads(path.read_text()) for path in (INFRA / "grafana" / "dashboards").glob("*.json")}
DOCS = Path(__file__).parents[2] / "docs"
NEEDED = "is not installed (Debian's packages prometheus and prometheus-alertmanager)"
TIMEOUT_S = 120.0  # for a state that comes in a second


def read_rules() -> list[dict[str, Any]]:
    return [rule for group in YAML(typ="safe").load(RULES.read_text())["groups"] for rule in group["rules"]]


def list_board_expressions() -> list[tuple[str, str]]:
    """Board and panel, and each expression with its variables filled in."""
    found = []
    for name, board in BOARDS.items():
        targets = [(one["title"], target["expr"]) for one in board["panels"] for target in one.get("targets", ())]
        targets += [(one["name"], one["expr"]) for one in board["annotations"]["list"]]
        found += [(f"{name}: {title}", re.sub(r"\$\w+", ".*", expr)) for title, expr in targets]
    return found


@contextmanager
def running(*command: str | Path, told: str, cwd: Path, **env: str) -> Iterator[str]:
    """Run a program; yield where it listens, when it has said so in a line of the pattern `told`."""
    log = cwd / f"{Path(command[0]).name}.log"
    with log.open("w") as sink:
        process = subprocess.Popen(command, cwd=cwd, stdout=sink, stderr=sink, env={**os.environ, **env})
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := re.search(told, log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield found[1]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def fetch(address: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The server after some traffic, and the loop's figures, by the names of their jobs."""
    home = tmp_path_factory.mktemp("home")
    watched = make_whole_loop(home)
    (home / "params.yaml").write_text("name: fake\n")
    watched.place.settings.hidden_dir.mkdir(exist_ok=True)
    command = (Path(sys.executable).with_name("visionloop"), "metrics", "--port", "0")
    env = {"VISIONLOOP_HOME": str(home), "VISIONLOOP_STORE": watched.place.settings.store_url}
    with (
        serving(home, log_flush_s=1) as server,
        running(*command, told=r"on http://(\S+)/metrics", cwd=home, **env) as figures,
    ):
        assert [server.ask(make_image(seed)).status for seed in range(3)] == [200] * 3
        assert server.ask(b"text").status == 415
        yield {"visionloop": f"127.0.0.1:{server.port}", "visionloop-loop": figures}


@pytest.fixture(scope="module")
def scraped(targets: dict[str, str]) -> dict[str, set[str]]:
    """Each metric that a scrape has, and the names of its labels."""
    found: dict[str, set[str]] = {"up": set(), "ALERTS": {"alertstate"}}
    for address in targets.values():
        for family in text_string_to_metric_families(fetch(address, "/metrics")):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_each_metric_and_label_that_is_named_is_in_a_scrape(scraped: dict[str, set[str]]) -> None:
    expressions = [expr for _, expr in list_board_expressions()] + [rule["expr"] for rule in read_rules()]
    queries = [one["query"]["query"] for board in BOARDS.values() for one in board["templating"]["list"]]
    named = set()
    for expr in expressions + queries:
        for name, matchers in re.findall(r"\b(visionloop_\w+|process_\w+|up|ALERTS)\b(?:\{([^}]*)\})?", expr):
            labels = set(re.findall(r"(\w+)[=!]", matchers))
            assert labels - {"job", "instance", "name"} <= scraped[name], expr
            named.add(name)
        for words in re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", expr):
            assert set(words.split(", ")) <= set.union(*scraped.values()) | {"job", "instance", "name"}, expr
    assert len(named) > 50
    unseen = {re.sub(r"_(bucket|count|sum)$", "", name) for name in scraped.keys() - named if name.startswith("vis")}
    assert unseen - {re.sub(r"_(bucket|count|sum)$", "", name) for name in named} == {"visionloop_shadow"}


def test_the_pages_tell_of_each_metric_and_of_no_other(scraped: dict[str, set[str]]) -> None:
    real = {re.sub(r"_(bucket|count|sum)$", "", name) for name in scraped if name.startswith("visionloop_")}
    loop = {name for name in real if name.startswith(("visionloop_loop_", "visionloop_monitor_"))}
    for page, names in (("server.md", real - loop), ("monitoring.md", loop)):
        rows = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| `visionloop_")]
        assert {name for row in rows for name in re.findall(r"`(visionloop_\w+)", row.split(" | ")[0])} == names, page


def test_no_label_holds_what_a_client_sends(scraped: dict[str, set[str]]) -> None:
    """Their number has a bound: codes of errors, classes of the model, checks; and a model a promotion."""
    of_server = {"outcome", "status", "step", "le", "prediction", "by", "state", "digest"}
    of_loop = {"side", "bundle", "action", "verdict", "of", "figure", "check", "kind"}
    assert set.union(*scraped.values()) - {"alertstate"} == of_server | of_loop | {"name", "version"}


@pytest.mark.parametrize("job", ["visionloop", "visionloop-loop"])
def test_promtool_has_nothing_to_say_of_a_scrape(targets: dict[str, str], job: str) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip(f"promtool {NEEDED}")
    text = fetch(targets[job], "/metrics")
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def prometheus(targets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """The files of infra/ in a real Prometheus and Alertmanager: their address, and the site of the webhook.

    Other than in the file are only the addresses, and how long each waits.
    """
    program, manager = (
        shutil.which("prometheus"),
        shutil.which("prometheus-alertmanager") or shutil.which("alertmanager"),
    )
    if program is None or manager is None:
        pytest.skip(f"prometheus {NEEDED}")
    folder, yaml = tmp_path_factory.mktemp("prometheus"), YAML(typ="safe")
    with serve({"/hook": Answer()}) as site:
        routing = yaml.load((INFRA / "prometheus" / "alertmanager.yml").read_text())
        routing["route"] |= {"group_wait": "1ms", "group_interval": "1s"}
        routing["receivers"] = [{"name": "team", "webhook_configs": [{"url": f"{site.url}/hook"}]}]
        (folder / "alertmanager.yml").write_text(json.dumps(routing))
        listen = "--web.listen-address=127.0.0.1:0"
        told = r'msg="Listening on" address=(\S+)'
        alerting = [manager, "--config.file=alertmanager.yml", f"--storage.path={folder}/am", listen]
        with running(*alerting, "--cluster.listen-address=", told=told, cwd=folder) as address:
            config = yaml.load((INFRA / "prometheus" / "prometheus.yml").read_text())
            config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
            config["rule_files"] = [str(RULES)]
            config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [address]
            assert {job["job_name"] for job in config["scrape_configs"]} == targets.keys()
            for job in config["scrape_configs"]:
                job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
            (folder / "prometheus.yml").write_text(json.dumps(config))
            command = [program, "--config.file=prometheus.yml", f"--storage.tsdb.path={folder}/tsdb", listen]
            ready = rf"{told}\b[\s\S]*ready to receive web requests"
            with running(*command, told=ready, cwd=folder, NO_PROXY="127.0.0.1") as own:
                yield own, site


def ask(address: str, expr: str) -> list[Any]:
    """Ask Prometheus; raises for an expression that it does not understand."""
    answer = json.loads(fetch(address, f"/api/v1/query?{urllib.parse.urlencode({'query': expr})}"))
    return list(answer["data"]["result"])


def test_each_expression_of_a_dashboard_has_an_answer(prometheus: tuple[str, Any]) -> None:
    """After two scrapes. That of an annotation is asked without its comparison: nothing was swapped here."""
    address, _ = prometheus
    left = [(what, re.sub(r"^(changes\(.*\)) > 0$", r"\1", expr)) for what, expr in list_board_expressions()]
    assert len(left) > 60
    deadline = time.monotonic() + TIMEOUT_S
    while left := [(what, expr) for what, expr in left if not ask(address, expr)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_each_alert_can_be_asked_and_those_of_this_loop_fire(prometheus: tuple[str, Any]) -> None:
    """The labels of the loop say that the model is bad; an alert waits for its webhook, a candidate for nobody."""
    address, _ = prometheus
    deadline = time.monotonic() + TIMEOUT_S
    while "QualityLow" not in (fired := {one["metric"]["alertname"] for one in ask(address, "ALERTS")}):
        assert time.monotonic() < deadline, fired
        time.sleep(0.1)
    asked = {rule["alert"]: bool(ask(address, rule["expr"])) for rule in read_rules()}
    true = {"QualityLow", "AlertsUnsent", "NoRetrain", "NotWatched", "LabelsWait", "RetrainTooLong"}
    slow = {"SlowAnswers"}  # on a machine that is busy it may be true
    assert {name for name, holds in asked.items() if holds} - slow == true


def test_an_alert_comes_to_the_webhook(prometheus: tuple[str, Any]) -> None:
    _, site = prometheus
    deadline = time.monotonic() + TIMEOUT_S
    while not site.requests:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    [alert] = json.loads(site.requests[0].body)["alerts"]
    assert (alert["status"], alert["labels"]["alertname"], alert["labels"]["name"]) == ("firing", "QualityLow", "fake")
    assert alert["annotations"]["summary"] == "fake: by labels the accuracy of what is served is below its floor"
