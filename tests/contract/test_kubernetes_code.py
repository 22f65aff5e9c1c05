"""What infra/kubernetes and infra/ray say of images, commands, routes, variables and secrets, against what there is."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from fakes import COMMANDS, run_here
from manifests import (
    KUBERNETES,
    ROOT,
    Thing,
    build,
    build_with,
    find_config,
    find_package,
    list_pods,
    make_job,
    pick,
)
from visionloop.serving.app import make_app
from visionloop.serving.swap import ModelSlot
from visionloop.workspace import list_examples

PAGE = (KUBERNETES / "README.md").read_text()
DOCKERFILE = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
START_MLFLOW = (ROOT / "mlflow" / "start.sh").read_text()
JOBS = sorted((KUBERNETES / "ray" / "jobs").glob("*.yaml"))
# Of prefect-kubernetes, which is in the worker's image alone: held against its release 0.7.10.
OF_WORKER = {
    "PREFECT_INTEGRATIONS_KUBERNETES_CLUSTER_UID",
    "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME",
}


def load(path: Path) -> Thing:
    return dict(YAML(typ="safe").load(path.read_text()))


def find_locked(name: str) -> str:
    found = re.search(rf"^{name}(?:\[\S+\])?==(\S+)", (ROOT / "requirements.lock").read_text(), flags=re.M)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def prod(tmp_path_factory: pytest.TempPathFactory) -> list[Thing]:
    """All that there is at once: prod with the Ray cluster."""
    return build_with(tmp_path_factory.mktemp("prod"), "ray")


@pytest.fixture(scope="module")
def kserve(tmp_path_factory: pytest.TempPathFactory) -> Thing:
    things = build_with(tmp_path_factory.mktemp("kserve"), "kserve")
    (service,) = pick(things, "InferenceService").values()
    return service


def test_images_are_those_of_the_overlay_and_of_the_lock(prod: list[Thing], kserve: Thing) -> None:
    theirs = f"prefecthq/prefect:{find_locked('prefect')}-python3.11-kubernetes"
    for things, name in (
        (prod, "registry.example.com/visionloop-{}:1"),
        (build(KUBERNETES / "overlays" / "dev"), "visionloop-{}:dev"),
    ):
        deployed = [pods for pods in list_pods(things) if not pods.owner.startswith("Job")]
        used = {one["image"] for pods in deployed for one in pods.containers}
        assert used == {name.format(part) for part in ("serve", "worker", "mlflow")} | {theirs}
        told = {pods.variables["IMAGE"] for pods in deployed if "IMAGE" in pods.variables}
        assert told == {name.format("worker")}, "jobs run what the worker's pod runs"
    (served,) = kserve["spec"]["predictor"]["containers"]
    assert served["image"] == "registry.example.com/visionloop-serve:1"
    assert {"serve", "worker"} <= set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, flags=re.M))
    assert pick(prod, "RayCluster")["visionloop"]["spec"]["rayVersion"] == find_locked("ray")


def test_the_workers_image_has_what_jobs_and_ray_ask_for() -> None:
    stage = DOCKERFILE[DOCKERFILE.index("AS worker\n") : DOCKERFILE.index("AS serve\n")]
    assert {"flows", "train", "ray"} <= set(re.findall(r"--extra (\w+)", stage))
    (folder,) = re.findall(r'^IMAGE_FLOWS_DIR = "(.*)"$', (ROOT / "flows" / "environment.py").read_text(), flags=re.M)
    assert f"COPY flows {folder}\n" in stage
    assert "/opt/visionloop/bin/ray /usr/local/bin/" in stage, "KubeRay may start it in a login shell"
    user = {
        re.search(r"^USER (\d+):", text, flags=re.M)[1]
        for text in (DOCKERFILE, (ROOT / "mlflow" / "Dockerfile").read_text())
    }  # type: ignore[index]
    assert user == {"10001"}, "as the manifests say"


@cache
def find_routes(program: str) -> set[str]:
    """The paths that a program answers, as its source says."""
    if program == "visionloop metrics":
        return set(re.findall(r'"(/[\w/]+)"', (ROOT / "src" / "visionloop" / "up" / "metrics.py").read_text()))
    if program == "visionloop serve":
        return {str(getattr(route, "path", "")) for route in make_app(ModelSlot()).routes}
    package, file, prefix = {
        "/opt/start.sh": ("mlflow", "server/__init__.py", ""),
        "prefect server": ("prefect", "server/api/server.py", "/api"),
        "prefect worker": ("prefect", "workers/server.py", ""),
        "ray start": ("ray", "dashboard/modules/reporter/healthz_agent.py", ""),
    }[program]
    return {f"{prefix}{path}" for path in re.findall(r'"(/[\w/]+)"', (find_package(package) / file).read_text())}


def test_probes_ask_what_the_programs_answer(prod: list[Thing], kserve: Thing) -> None:
    of_image = {"visionloop-mlflow": "/opt/start.sh", "visionloop-worker": "ray start"}
    seen = set()
    for pods in (*list_pods(prod), *list_pods([kserve])):
        for one in pods.spec["containers"]:
            image = re.sub(r".*/|:[^:]*$", "", one["image"])
            program = " ".join(one["args"][:2]) if "args" in one else of_image[image]
            asked = {kind: one[kind]["httpGet"] for kind in one if kind.endswith("Probe")}
            assert asked.keys() >= {"readinessProbe", "livenessProbe"} or pods.owner.startswith("Job"), pods.owner
            for probe in asked.values():
                assert probe["path"] in find_routes(program), pods.owner
                assert probe["port"] in pods.ports, pods.owner
            if program == "visionloop serve":
                assert asked["readinessProbe"]["path"].endswith("/health/ready")
                assert asked["livenessProbe"]["path"].endswith("/health/live"), "not ready is no reason to be killed"
                assert asked["startupProbe"]["path"].endswith("/health/live")
            seen.add(program)
    assert len(seen) == 7, "six programs, and the job"


def read_commands(prod: list[Thing], kserve: Thing) -> Iterator[list[str]]:
    """Every command of visionloop and Prefect: of containers, of RayJobs, of `ray up`."""
    texts = [
        shlex.join(one["args"][:-1]) + "\n" + one["args"][-1] if "-euc" in one["args"] else shlex.join(one["args"])
        for pods in (*list_pods(prod), *list_pods([kserve]))
        for one in pods.containers
        if "args" in one
    ]
    texts += [load(path)["spec"]["entrypoint"] for path in JOBS]
    for text in texts:
        for found in re.findall(r"\b(?:visionloop|prefect) [a-z][^\n;|>]*", text):
            yield shlex.split(found)


def test_commands_are_those_that_there_are(prod: list[Thing], kserve: Thing) -> None:
    source = "".join(
        (find_package("prefect") / "cli" / f"{name}.py").read_text() for name in ("work_pool", "worker", "server")
    )
    named = set()
    for program, name, *rest in read_commands(prod, kserve):
        options = [word for word in rest if word.startswith("--")]
        named.add((program, name))
        if program == "prefect":
            assert [one for one in options if f'"{one}"' not in source] == []
            continue
        assert name in COMMANDS
        shown = read_help(name, *(word for word in rest[:1] if word in {"init"}))
        assert [one for one in options if one not in shown] == [], name
        if "--example" in rest:
            assert rest[rest.index("--example") + 1] in list_examples()
    assert {name for program, name in named if program == "visionloop"} == {
        *("serve", "new", "store", "metrics", "schedule", "prepare", "train", "retrain", "predict")
    }
    assert {name for program, name in named if program == "prefect"} == {"server", "worker", "work-pool"}


def read_help(*command: str) -> str:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as shown:
        patch.setenv("COLUMNS", "200")
        assert run_here(patch, *command, "--help") == 0
    return shown.getvalue()


def read_secrets() -> dict[str, set[str]]:
    """The secrets that README.md makes, each with its keys."""
    commands = re.findall(r"create secret generic (\w+)((?:.*\\\n)*.*)", PAGE)
    found: dict[str, set[str]] = {}
    for name, rest in commands:
        found.setdefault(name, set()).update(
            re.findall(r"--from-literal=(\w+)=", rest), re.findall(r"--from-file=(\S+)", rest)
        )
    return found


def read_prefect_settings() -> set[str]:
    """The variables of Prefect, from its source: to import it takes seconds."""
    found = set()
    for path in (find_package("prefect") / "settings" / "models").rglob("*.py"):
        for text in path.read_text().split("\nclass ")[1:]:
            (inside,) = re.findall(r"build_settings_config\(\s*\(([^)]*)\)", text) or [""]
            prefix = "_".join(["PREFECT", *re.findall(r'"(\w+)"', inside)]).upper()
            found |= {name.upper() for name in re.findall(r'"(prefect_\w+)"', text)}  # aliases
            found |= {f"{prefix}_{name.upper()}" for name in re.findall(r"^    (\w+): ", text, flags=re.M)}
    return found


def test_variables_are_those_that_something_reads(prod: list[Thing], kserve: Thing) -> None:
    known = set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), flags=re.M))
    known |= set(re.findall(r"MLFLOW_\w+", START_MLFLOW)) | read_prefect_settings() | OF_WORKER
    known |= set(
        re.findall(r"^(MLFLOW_\w+) =", (find_package("mlflow") / "environment_variables.py").read_text(), flags=re.M)
    )
    known |= {"HOME", "PROTOCOL"}  # of the system; of KServe
    for pods in (*list_pods(prod), *list_pods([kserve])):
        script = " ".join(word for one in pods.containers for word in one.get("args", ()))
        assert [name for name in pods.variables if name not in known and f"${name}" not in script] == [], pods.owner
    for config in ("store", "loop", "mlflow"):
        assert set(find_config(prod, config)) <= known
    secrets = read_secrets()
    assert {name for keys in secrets.values() for name in keys} <= known | {"keys.json"}
    assert not known & {"VISIONLOOP_STOER", "MLFLOW_TRACKING_URL"}, "a slip is seen"


def test_secrets_are_made_as_they_are_asked_for(prod: list[Thing], kserve: Thing) -> None:
    secrets, asked = read_secrets(), set()
    for pods in (*list_pods(prod), *list_pods([kserve])):
        for one in pods.containers:
            asked |= {source["secretRef"]["name"] for source in one.get("envFrom", ()) if "secretRef" in source}
        asked |= {volume["secret"]["secretName"] for volume in pods.spec["volumes"] if "secret" in volume}
        if "VISIONLOOP_KEYS" in pods.variables:
            (place,) = (
                mount["mountPath"]
                for one in pods.containers
                for mount in one["volumeMounts"]
                if mount["name"] == "keys"
            )
            assert pods.variables["VISIONLOOP_KEYS"] == f"{place}/{next(iter(secrets['keys']))}"
        name, key = (f"PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_{one}" for one in ("NAME", "KEY"))
        assert name not in pods.variables or pods.variables[key] in secrets[pods.variables[name]]
    assert asked == set(secrets), "each that is asked for, and no other"
    needed = set(re.findall(r"^ *need (\w+)", START_MLFLOW, flags=re.M))
    assert needed <= secrets["mlflow"] | set(find_config(prod, "mlflow"))
    assert "secret" not in {thing["kind"].lower() for thing in prod}, "none is in the repository"


def test_addresses_are_services_of_this_namespace(prod: list[Thing]) -> None:
    services = {name: {port["port"] for port in one["spec"]["ports"]} for name, one in pick(prod, "Service").items()}
    asked = [re.fullmatch(r"http://(\w+):(\d+)(/api)?", address) for address in find_config(prod, "loop").values()]
    assert [one and int(one[2]) in services[one[1]] for one in asked] == [True, True]
    hosts = find_config(prod, "mlflow")["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert "mlflow:*" in hosts.split(","), "else MLflow answers 403 to that name"


def test_the_workspace_is_made_once_and_gets_the_params_each_time(prod: list[Thing], tmp_path: Path) -> None:
    (worker,) = (pods for pods in list_pods(prod) if pods.owner == "Deployment worker")
    shell, options, script = worker.containers[0]["args"]
    for name in ("team", "params", "bin"):
        (tmp_path / name).mkdir()
    fake = tmp_path / "bin" / "visionloop"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/called\n[ "$1" = store ] && exit\nmkdir "$2" && touch "$2/dvc.yaml"\n'
        f"[ -e {tmp_path}/bin/whole ]  # or it is killed in the middle\n"
    )
    fake.chmod(0o755)
    for text, code in (("name: a\n", 1), ("name: a\n", 0), ("name: b\n", 0)):
        (tmp_path / "params" / "params.yaml").write_text(text)
        there = script.replace("/team", f"{tmp_path}/team").replace("/params/", f"{tmp_path}/params/")
        done = subprocess.run([shell, options, there], check=False, env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"})
        assert done.returncode == code
        assert code or (tmp_path / "team" / "workspace" / "params.yaml").read_text() == text
        (tmp_path / "bin" / "whole").touch()
    assert (tmp_path / "called").read_text().splitlines() == [
        *["new workspace.new --example digits"] * 2,
        *["store init"] * 2,
    ]
    assert [path.name for path in (tmp_path / "team").iterdir()] == ["workspace"]
    assert worker.variables["VISIONLOOP_HOME"] == "/team/workspace"


def test_the_template_of_jobs_is_one_of_prefects(prod: list[Thing]) -> None:
    views = find_package("prefect") / "server/api/collections_data/views/aggregate-worker-metadata.json"
    theirs = json.loads(views.read_text())["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]
    text = find_config(prod, "pool")["job-template.json"]
    ours = json.loads(text)
    names = set(ours["variables"]["properties"])
    assert names == set(theirs["variables"]["properties"]) - {"cluster_config"}, "it makes jobs where it is"
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == names
    assert set(theirs["job_configuration"]) - set(ours["job_configuration"]) == {"cluster_config"}
    (worker,) = (pods for pods in list_pods(prod) if pods.owner == "Deployment worker")
    assert "s/IN-NAMESPACE/$NAMESPACE/" in worker.containers[1]["args"][-1]
    (container,) = make_job(prod)["spec"]["template"]["spec"]["containers"]
    team = {"name": "team", "mountPath": "/team"}
    assert team in container["volumeMounts"], "the workspace is where the deployments say"
    assert team in worker.containers[0]["volumeMounts"]


@pytest.mark.parametrize(
    "page", [KUBERNETES / "README.md", ROOT / "infra" / "ray" / "README.md"], ids=["kubernetes", "ray"]
)
def test_pages_name_only_what_there_is(page: Path, prod: list[Thing]) -> None:
    text = page.read_text()
    paths = set(re.findall(r"(?:-[kf] |ray (?:up|exec|down|dashboard) )(infra/\S+)", text))
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (page.parent / link).exists()] == []
    workloads = set(pick(prod, "Deployment")) | {"NAME"}
    assert set(re.findall(r"deployment/(\w+)", text)) <= workloads
    assert set(re.findall(r"service/(\w+)(?= )", text)) <= set(pick(prod, "Service"))
    inits = {one["name"] for pods in list_pods(prod) if pods.owner == "Deployment worker" for one in pods.containers}
    assert set(re.findall(r"`?-c (\w+)", text)) <= inits
    metrics = set(re.findall(r"visionloop_\w+", text))
    assert all(f"`{name}`" in (ROOT / "docs" / "server.md").read_text() for name in metrics)
