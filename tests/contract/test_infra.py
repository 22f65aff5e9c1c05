"""The team's stack against itself and against what it starts: compose file, images, secrets, rules, dashboards.

What needs docker is only checked by its own checkers; that is said in infra/team.md.
"""

import json
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from fakes import COMMANDS
from visionloop.params import Serve

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
DOCKERFILES = (INFRA / "docker" / "Dockerfile", ROOT / "mlflow" / "Dockerfile")
STAND_INS = INFRA / "try" / "Dockerfile"
COMPOSE = (INFRA / "compose.yaml").read_text()
BOARDS = sorted((INFRA / "grafana" / "dashboards").glob("*.json"))
RULES = INFRA / "prometheus" / "rules.yml"
SECRETS = set(re.findall(r"\$\{(\w+):\?", COMPOSE))


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services of the compose file, with their anchors resolved."""
    return dict(YAML(typ="safe").load(COMPOSE)["services"])


def make_env(path: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["sh", INFRA / "env.sh", path], capture_output=True, text=True, check=False)


def test_docker_compose_takes_the_file_and_wants_each_secret(tmp_path: Path) -> None:
    compose = shutil.which("docker-compose")
    if compose is None:
        pytest.skip("docker-compose is not installed (Debian 13 has it as a static binary)")
    make_env(tmp_path / "env")
    lines = (tmp_path / "env").read_text().splitlines()

    def check(given: list[str]) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "given").write_text("\n".join(given) + "\n")
        command = [compose, "-f", str(INFRA / "compose.yaml"), "--env-file", str(tmp_path / "given"), "config", "-q"]
        return subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=False)

    assert check(lines).stderr == ""
    for secret in sorted(SECRETS):
        done = check([line for line in lines if not line.startswith(f"{secret}=")])
        assert done.returncode != 0
        assert f"required variable {secret} is missing a value: run make env-team" in done.stderr


def test_git_and_images_never_see_the_secrets() -> None:
    done = subprocess.run(["git", "check-ignore", "infra/.env"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "infra/.env\n"
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*", "all is left out but what is named"
    assert not [line for line in lines if line.startswith("!infra") or ".env" in line]


def test_services_have_limits_health_and_their_networks(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert {"mem_limit", "networks", "restart"} <= set(service), name
        built = service.get("build")
        if built:
            assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        has_check = "healthcheck" in service or (built and name in {"mlflow", "server-1", "server-2"})
        assert has_check or name in {"setup", "worker"}, name
        assert set(service.get("depends_on", ())) <= set(services), name
    for name in ("postgres", "s3", "setup"):
        assert services[name]["networks"] == ["data"], f"{name} is reached from nowhere else"
        assert "ports" not in services[name]
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert len(published) == 4
    assert all(port.startswith(("127.0.0.1:", "${ADDRESS:-127.0.0.1}:")) for port in published)


def test_no_secret_has_a_default(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for variable, value in dict(service.get("environment", {})).items():
            if re.search(r"PASSWORD|SECRET|ACCESS_KEY|KEK|AUTH_STRING", variable):
                assert ":?" in value, f"{name}: {variable}"


def test_what_is_mounted_is_there(services: dict[str, Any]) -> None:
    volumes = set(YAML(typ="safe").load(COMPOSE)["volumes"])
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (INFRA / source).exists() if source.startswith(".") else source in volumes, volume


def test_who_only_reads_the_workspace_can_note_what_it_has_seen_of_the_store(services: dict[str, Any]) -> None:
    """Without that the figures of the loop told nothing but one problem."""
    readers = [one for one in services.values() if "team:/workspace:ro" in one.get("volumes", ())]
    assert [one["tmpfs"] for one in readers] == [["/tmp", "/workspace/.visionloop:uid=10001,gid=10001"]]


def test_dockerfiles_are_clean_and_take_packages_by_hash_alone() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, *DOCKERFILES, STAND_INS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    for path in DOCKERFILES:
        steps = path.read_text().replace("\\\n", " ")
        installs = re.findall(r"pip install[^&\n]*", steps)
        assert len(installs) >= 2
        assert [
            step for step in installs if "--require-hashes" not in step and not re.search(r"--no-deps \S*dist/", step)
        ] == []
        assert re.findall(r"^FROM (\S+)", steps, flags=re.M)[0] == "${BASE}"
        assert steps.rindex("USER 10001:10001") > steps.rindex("FROM ")
        named = set(re.findall(r"^(?:ARG|ENV) (\w+)", steps, flags=re.M))
        assert named <= {"BASE", "PATH", "UV_NO_CACHE", "UV_COMPILE_BYTECODE", "SERVE_EXTRA", "USER"}, "no secret"
        extras = re.findall(r"--extra (\w+)", steps)
        for extra in extras:
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M)


def test_no_python_file_lies_in_the_folder_mlflow() -> None:
    assert sorted(path.name for path in (ROOT / "mlflow").rglob("*")) == ["Dockerfile", "start.sh"]


def test_scripts_are_shell() -> None:
    scripts = [*INFRA.glob("*.sh"), *INFRA.glob("*/*.sh"), ROOT / "mlflow" / "start.sh"]
    assert len(scripts) == 6
    for path in scripts:
        shell = path.read_text().splitlines()[0].rpartition("/")[2].split()[-1]
        assert subprocess.run([shell, "-n", path], capture_output=True, check=False).returncode == 0, path


def test_each_service_has_an_address_where_the_stack_is_tried(services: dict[str, Any]) -> None:
    """Without Grafana; a service that is not there would ask for a network that this engine has not."""
    text = (INFRA / "try" / "compose.yaml").read_text().replace("!reset", "")
    tried = YAML(typ="safe").load(text)["services"]
    assert set(tried) == set(services)
    assert all(one["network_mode"] == "host" for name, one in tried.items() if name != "grafana")


def test_the_try_knows_whom_prometheus_scrapes_and_where_they_are() -> None:
    jobs = YAML(typ="safe").load((INFRA / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = {one for job in jobs for one in job["static_configs"][0]["targets"]}
    assert runpy.run_path(str(INFRA / "try" / "outside.py"))["SCRAPED"] == targets
    names = re.findall(r"^  - (\S+)=127\.0\.16\.\d+$", (INFRA / "try" / "compose.yaml").read_text(), flags=re.M)
    assert {one.partition(":")[0] for one in targets} <= set(names)


def test_the_proxy_takes_bodies_as_large_as_a_server_does() -> None:
    caps = re.findall(r"client_max_body_size (\d+);", (INFRA / "nginx.conf").read_text())
    assert [int(cap) for cap in caps] == [Serve().max_body_bytes, Serve().max_video_bytes]
    refusal = re.findall(r"return 413 '(.*)';", (INFRA / "nginx.conf").read_text())[0]
    assert (json.loads(refusal)["code"], json.loads(refusal)["error"]["code"]) == ("body_too_large",) * 2


def test_a_bill_of_materials_names_what_is_installed() -> None:
    done = subprocess.run([sys.executable, INFRA / "docker" / "sbom.py"], capture_output=True, text=True, check=True)
    bill = json.loads(done.stdout)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    found = {one["purl"]: one for one in bill["components"]}
    assert len(found) == len(bill["components"])
    boto3 = found[f"pkg:pypi/boto3@{version('boto3')}"]
    assert (boto3["name"], boto3["licenses"]) == ("boto3", [{"license": {"name": "Apache-2.0"}}])


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_tells_in_its_own_words_what_it_shows(path: Path) -> None:
    """That its metrics are there and its expressions have answers is in tests/integration/test_prometheus.py."""
    board = json.loads(path.read_text())
    uid = YAML(typ="safe").load((INFRA / "grafana" / "datasource.yaml").read_text())["datasources"][0]["uid"]
    panels, rows = ([p for p in board["panels"] if (p["type"] == "row") == is_row] for is_row in (False, True))
    assert board["uid"] == f"visionloop-{path.stem}"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len(rows) >= 3 and all(row["title"].endswith("?") for row in rows), "rows in the order of questions"
    variables = {one["name"] for one in board["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + k) for i in range(place["w"]) for k in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    for panel in panels:
        assert panel["datasource"]["uid"] == uid and panel["title"] and panel["description"].endswith(".")
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["noValue"], f"{panel['title']}: what is shown before there is anything"
        assert panel["type"] in ("table", "state-timeline") or defaults["unit"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert panel["type"] == "table" or all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        used = {name for target in panel["targets"] for name in re.findall(r"\$(\w+)", target["expr"])}
        assert used <= variables and (used == variables or "ALERTS" in panel["targets"][0]["expr"]), panel["title"]
    named = {
        name
        for panel in panels
        for name in re.findall(r"[Aa]lerts? ([A-Z]\w+)(?: and ([A-Z]\w+))?", panel["description"])
    }
    assert {name for pair in named for name in pair if name} <= {rule["alert"] for rule in read_rules()}


def read_rules() -> list[dict[str, Any]]:
    return [rule for group in YAML(typ="safe").load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_each_alert_says_what_to_do_and_is_tried_with_and_without_its_fault() -> None:
    alerts = {rule["alert"]: rule for rule in read_rules()}
    for name, rule in alerts.items():
        assert rule["labels"]["severity"] in ("page", "warning"), name
        assert rule["annotations"].keys() == {"summary", "do"}, name
    tests = YAML(typ="safe").load(RULES.with_name("rules_test.yml").read_text())["tests"]
    tried = [(one["alertname"], bool(one.get("exp_alerts"))) for test in tests for one in test["alert_rule_test"]]
    assert set(tried) == {(name, fires) for name in alerts for fires in (True, False)}
    commands = {
        word for rule in alerts.values() for word in re.findall(r"visionloop ([a-z]+)", rule["annotations"]["do"])
    }
    assert commands <= set(COMMANDS)


def test_the_proxy_and_prometheus_ask_servers_that_exist(services: dict[str, Any]) -> None:
    asked = set(re.findall(r"server (server-\d):8000", (INFRA / "nginx.conf").read_text()))
    jobs = YAML(typ="safe").load((INFRA / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    scraped = {job["job_name"]: set(job["static_configs"][0]["targets"]) for job in jobs}
    assert {f"{name}:9100" for name in asked} == scraped["visionloop"]
    assert asked == {name for name in services if name.startswith("server-")}
    [figures] = scraped["visionloop-loop"]
    name, _, port = figures.partition(":")
    assert services[name]["command"][-2:] == ["--port", port]


def test_the_proxy_tells_the_port_that_it_was_asked_at() -> None:
    """A server compares it with the origin of a page where the browser says no more, as without TLS."""
    hosts = re.findall(r"proxy_set_header Host (\S+);", (INFRA / "nginx.conf").read_text())
    assert hosts == ["$http_host"], "once, for all of its places"


@pytest.mark.parametrize("check", [("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")])
def test_promtool_takes_the_rules_and_their_faults(check: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    done = subprocess.run([promtool, *check], cwd=RULES.parent, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_amtool_takes_the_routes() -> None:
    amtool = shutil.which("amtool")
    if amtool is None:
        pytest.skip("amtool is not installed (Debian's package prometheus-alertmanager has it)")
    command = [amtool, "check-config", INFRA / "prometheus" / "alertmanager.yml"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dependabot_looks_where_versions_are() -> None:
    """It reads no `FROM ${BASE}`, but `${NAME:-image:tag}` of a compose file."""
    updates = YAML(typ="safe").load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {one["package-ecosystem"]: one["directory"] for one in updates} == {
        "pip": "/",
        "github-actions": "/",
        "docker-compose": "/infra",
    }
    others = [name for name in re.findall(r"image: \$\{\w+:-(\S+)\}", COMPOSE) if not name.startswith("visionloop-")]
    assert others and all(re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", name) for name in others), "a tag that says which"


def test_workflows_run_what_people_run_with_actions_that_cannot_change() -> None:
    """Also checked with `zizmor --offline .github`, without a finding."""
    texts = [path.read_text() for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))]
    jobs = [job for text in texts for job in YAML(typ="safe").load(text)["jobs"].values()]
    steps = [step for job in jobs for step in job["steps"]]
    runs = [step["run"] for step in steps if "run" in step]
    assert {"make test", "make test-long"} <= set(runs)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert {name for run in runs for name in re.findall(r"^make (?:--\w+ )*([a-z-]+)", run)} <= targets
    assert "-m hatchling build" in "".join(runs) and "\nhatchling==" in (ROOT / "requirements.lock").read_text()
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name)] == []
    assert all(job["timeout-minutes"] and job["permissions"] == {"contents": "read"} for job in jobs)
    images = [one for job in jobs for one in job.get("strategy", {}).get("matrix", {}).get("include", [])]
    assert {one["target"] for one in images} == {"serve", "worker", "mlflow"}
    for one in images:
        assert f" AS {one['target']}\n" in (ROOT / one["file"]).read_text()
    piping = [job for job in jobs for step in job["steps"] if " | " in step.get("run", "")]
    assert [job["defaults"] for job in piping] == [{"run": {"shell": "bash"}}], (
        "or what fails before a pipe goes unseen"
    )
