"""infra/kubernetes as kustomize builds it, and the pods that come of it, whoever makes them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "infra" / "kubernetes"
KUBECTL = Path(sys.executable).with_name("kubectl")

Thing = dict[str, Any]


@dataclass(frozen=True)
class Pods:
    """The pods of one object: their labels and their specification."""

    owner: str
    labels: dict[str, str]
    spec: Thing

    @property
    def containers(self) -> list[Thing]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for one in self.containers for port in one.get("ports", ())}

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that are set one by one, not by a ConfigMap or a Secret."""
        return {each["name"]: each.get("value") for one in self.containers for each in one.get("env", ())}


def build(folder: Path) -> list[Thing]:
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(YAML(typ="safe").load_all(done.stdout))


def build_changed(folder: Path, overlay: str, file: str, old: str, new: str) -> list[Thing]:
    """Build an overlay of a copy in which one file says something else."""
    copy = Path(shutil.copytree(KUBERNETES, folder / "kubernetes"))
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    return build(copy / "overlays" / overlay)


def build_with(folder: Path, component: str) -> list[Thing]:
    """Build prod with one of the components that it has as comments."""
    line = f"components: [../../{component}]"
    return build_changed(folder, "prod", "overlays/prod/kustomization.yaml", f"# {line}", line)


def pick(things: list[Thing], kind: str) -> dict[str, Thing]:
    return {thing["metadata"]["name"]: thing for thing in things if thing["kind"] == kind}


def find_package(name: str) -> Path:
    """Where a package is installed; it is not imported."""
    spec = find_spec(name)
    assert spec and spec.origin
    return Path(spec.origin).parent


def find_config(things: list[Thing], name: str) -> dict[str, str]:
    """The data of a ConfigMap, whose name kustomize has made longer."""
    (found,) = (one for full, one in pick(things, "ConfigMap").items() if re.fullmatch(rf"{name}-[a-z0-9]{{10}}", full))
    return dict(found["data"])


def make_job(things: list[Thing]) -> Thing:
    """The Job that Prefect's worker makes of the template, without the two keys that it wants in a wrong place."""
    namespace = next(iter(pick(things, "Namespace")))
    template = json.loads(find_config(things, "pool")["job-template.json"].replace("IN-NAMESPACE", namespace))
    variables = template["variables"]["properties"]
    values = {name: one["default"] for name, one in variables.items() if "default" in one}
    values |= {
        "image": "visionloop-worker:1",
        "name": "retrain",
        "labels": {"a": "b"},
        "env": [],
        "command": ["prefect"],
    }

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(one) for key, one in value.items()}
        if isinstance(value, list):
            return [fill(one) for one in value]
        if not isinstance(value, str):
            return value
        whole = re.fullmatch(r"\{\{ (\w+) \}\}", value)
        return values[whole[1]] if whole else re.sub(r"\{\{ (\w+) \}\}", lambda hit: str(values[hit[1]]), value)

    job: Thing = fill(template["job_configuration"]["job_manifest"])
    inside = job["spec"]["template"]["spec"]
    assert (inside.pop("parallelism"), inside.pop("completions")) == (1, 1), "Prefect refuses a template without them"
    return job


def list_pods(things: list[Thing]) -> Iterator[Pods]:
    """The pods of some objects; with the pool's template among them, those of its jobs too."""
    jobs = [make_job(things)] if "job-template.json" in str(things) else []
    for thing in (*things, *jobs):
        spec, owner = thing.get("spec", {}), f"{thing['kind']} {thing['metadata'].get('name', 'of a flow')}"
        if thing["kind"] in {"Deployment", "Job"}:
            yield Pods(owner, spec["template"]["metadata"]["labels"], spec["template"]["spec"])
        elif thing["kind"] == "RayCluster":
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                yield Pods(owner, group["template"]["metadata"]["labels"], group["template"]["spec"])
        elif thing["kind"] == "InferenceService":
            of_kserve = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "labels", "annotations"}
            inside = {key: value for key, value in spec["predictor"].items() if key not in of_kserve}
            yield Pods(owner, spec["predictor"]["labels"], inside)


def is_part(some: dict[str, str], labels: dict[str, str]) -> bool:
    return some.items() <= labels.items()


def to_number(quantity: str) -> float:
    """A quantity of Kubernetes: cores, or bytes. `banana` is none."""
    found = re.fullmatch(r"([0-9.]+)(m|Mi|Gi|)", quantity)
    assert found, quantity
    return float(found[1]) * {"": 1, "m": 0.001, "Mi": 2**20, "Gi": 2**30}[found[2]]
