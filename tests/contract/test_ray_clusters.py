"""The Ray cluster of infra/kubernetes/ray and those of infra/ray: their jobs, who reaches them, and `ray up`."""

import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from manifests import (
    KUBERNETES,
    ROOT,
    Thing,
    build,
    build_with,
    find_package,
    is_part,
    list_pods,
    make_job,
    pick,
)

DOCKERFILE = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
JOBS = sorted((KUBERNETES / "ray" / "jobs").glob("*.yaml"))
CLUSTERS = sorted((ROOT / "infra" / "ray").glob("*.yaml"))


@pytest.fixture(scope="module")
def prod(tmp_path_factory: pytest.TempPathFactory) -> list[Thing]:
    return build_with(tmp_path_factory.mktemp("prod"), "ray")


def load(path: Path) -> Thing:
    return dict(YAML(typ="safe").load(path.read_text()))


def test_ray_jobs_run_on_the_cluster_and_fit_on_it(prod: list[Thing]) -> None:
    cluster = pick(prod, "RayCluster")["visionloop"]
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"], (
        "a training asks for the nodes at its start"
    )
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert [path.stem for path in JOBS] == ["predict", "prepare", "retrain", "train"]
    for path in JOBS:
        job = load(path)
        assert job["metadata"] == {"generateName": f"{path.stem}-"}, "kubectl create makes one each time"
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
        assert job["spec"]["entrypoint"].split()[:2] == ["visionloop", path.stem]
        assert "entrypointNumCpus" not in job["spec"], "the head lets them wait, the workers compute"


def test_jobs_of_prefect_reach_the_ray_cluster(prod: list[Thing]) -> None:
    """By KubeRay's Service of the head, with its token; where there is no cluster, nothing asks for one."""
    cluster = pick(prod, "RayCluster")["visionloop"]
    (worker,) = (pods for pods in list_pods(prod) if pods.owner == "Deployment worker")
    assert [one["name"] for one in worker.containers] == ["workspace", "pool", "plan", "worker"], "in this order"
    (plan,) = (one for one in worker.containers if one["name"] == "plan")
    handed = {one["name"]: one["value"] for one in plan["env"] if one["name"].startswith("RAY_")}
    assert handed == {
        "RAY_ADDRESS": "ray://visionloop-head-svc:10001",
        "RAY_AUTH_MODE": cluster["spec"]["authOptions"]["mode"],
    }
    passed_on = (ROOT / "flows" / "deploy.py").read_text()
    assert all(f'"{name}"' in passed_on[: passed_on.index("def deploy")] for name in handed)
    head = cluster["spec"]["headGroupSpec"]["template"]
    ports = {one["name"]: one["containerPort"] for one in head["spec"]["containers"][0]["ports"]}
    assert ports["client"] == 10001, "KubeRay's Service has the ports of the head's container"
    job = make_job(prod)["spec"]["template"]
    (asked,) = job["spec"]["containers"][0]["env"]
    token = {"name": cluster["metadata"]["name"], "key": "auth_token", "optional": True}  # as KubeRay makes it
    assert asked == {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": token}}
    let_in = [
        (source["podSelector"]["matchLabels"], [port["port"] for port in way.get("ports", ())])
        for way in pick(prod, "NetworkPolicy")["ray"]["spec"]["ingress"]
        for source in way["from"]
    ]
    assert [ports for labels, ports in let_in if is_part(labels, job["metadata"]["labels"])] == [[10001]]
    alone = build(KUBERNETES / "overlays" / "prod")
    (worker,) = (pods for pods in list_pods(alone) if pods.owner == "Deployment worker")
    assert [name for name in worker.variables if name.startswith("RAY_")] == []


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ray_up_takes_the_clusters(path: Path) -> None:
    schema = json.loads((find_package("ray") / "autoscaler" / "ray-schema.json").read_text())
    value = load(path)
    jsonschema.validate(value, schema)
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        jsonschema.validate(value | {"max_wrokers": 1}, schema)
    assert value["cluster_name"] == "visionloop"
    starts = [value[f"{role}_start_ray_commands"][-1] for role in ("head", "worker")]
    assert all(". ~/visionloop.env" in line and "~/visionloop/.venv/bin/ray start" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    sent = dict(value["file_mounts"])
    secrets = sent.pop("~/visionloop.env")
    assert {f"~/visionloop/{path}": path for path in sent.values()} == sent
    built = set(re.findall(r"^COPY ((?:[\w.]+ )+)", DOCKERFILE[: DOCKERFILE.index("AS serve-packages")], flags=re.M))
    assert set(sent.values()) == {name for line in built for name in line.split()} | {"Makefile"}
    for command in (*value["setup_commands"], *starts):
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    done = subprocess.run(["git", "check-ignore", secrets], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 0, "git never sees the secrets"


def test_a_machine_without_the_workspace_says_so(tmp_path: Path) -> None:
    check = load(CLUSTERS[0])["setup_commands"][0]
    assert {load(path)["setup_commands"][0] for path in CLUSTERS} == {check}
    (tmp_path / "visionloop.env").write_text(f"VISIONLOOP_HOME={tmp_path}/ws\n")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["bash", "-c", check], env=env, capture_output=True, text=True, check=False)

    assert (run().returncode, f"has no workspace at {tmp_path}/ws; expected" in run().stderr) == (2, True)
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "params.yaml").touch()
    assert (run().returncode, run().stderr) == (0, "")
