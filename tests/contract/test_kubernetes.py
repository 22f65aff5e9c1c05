"""infra/kubernetes as kustomize builds it: by the schemas of Kubernetes, and each object against the others.

There is no Kubernetes here. Of what its schemas do not know (RayCluster, InferenceService) the pods are checked; what
Prometheus' operator takes is written down here (its own schemas are 80 kB).
What the objects say of images, commands, routes and variables: test_kubernetes_code.py.
"""

import json
import re
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from manifests import (
    KUBECTL,
    KUBERNETES,
    ROOT,
    Thing,
    build,
    build_changed,
    build_with,
    is_part,
    list_pods,
    make_job,
    pick,
    to_number,
)
from visionloop.params import load_params
from visionloop.serving.main import GRACE_S

BUILDS = ("dev", "prod", "prod with ray", "prod with kserve", "prod with prometheus")
OF_OPERATORS = {"RayCluster", "InferenceService", "PodMonitor"}
DNS, STORE, POSTGRES, METRICS, LOOP_METRICS = 53, 443, 5432, 9100, 9101


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Thing]]:
    """The overlays as they are, and prod with each of the components that it has as comments."""
    made = {name: build(KUBERNETES / "overlays" / name) for name in ("dev", "prod")}
    for component in ("ray", "kserve", "prometheus"):
        made[f"prod with {component}"] = build_with(tmp_path_factory.mktemp(component), component)
    return made


@pytest.fixture(params=BUILDS)
def things(request: pytest.FixtureRequest, builds: dict[str, list[Thing]]) -> list[Thing]:
    return builds[request.param]


def test_each_object_is_as_kubernetes_wants_it(builds: dict[str, list[Thing]]) -> None:
    every = [thing for things in builds.values() for thing in (*things, make_job(things))]
    for thing in {json.dumps(thing): thing for thing in every}.values():
        if thing["kind"] not in OF_OPERATORS:
            kubernetes_validate.validate(thing, "1.37", strict=True)
            continue
        for pods in list_pods([thing]):
            head = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "labels": pods.labels}}
            kubernetes_validate.validate(head | {"spec": pods.spec}, "1.37", strict=True)
    assert {thing["kind"] for thing in every} > OF_OPERATORS


def test_all_are_of_one_namespace_and_named_once(things: list[Thing]) -> None:
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in things]
    assert len(names) == len(set(names))
    (namespace,) = pick(things, "Namespace")
    found = {thing["metadata"].get("namespace", namespace) for thing in (*things, make_job(things))}
    assert found == {namespace}


def test_pods_have_no_rights(things: list[Thing]) -> None:
    for pods in list_pods(things):
        whole = pods.spec["securityContext"]
        assert whole["runAsNonRoot"] and whole["runAsUser"] == whole["runAsGroup"] == 10001, pods.owner
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}, pods.owner
        assert pods.spec["enableServiceLinks"] is False, (
            f"{pods.owner}: the Service mlflow would set MLFLOW_PORT=tcp://"
        )
        has_token = pods.spec.get("automountServiceAccountToken", True)
        assert has_token == (pods.owner == "Deployment worker"), pods.owner
        for one in pods.containers:
            rights = one["securityContext"]
            assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"], one["name"]
            assert rights["capabilities"] == {"drop": ["ALL"]}, one["name"]
            assert "/tmp" in {mount["mountPath"] for mount in one["volumeMounts"]}, "HOME of our images"
    (namespace,) = pick(things, "Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_only_the_worker_may_ask_kubernetes_and_only_for_jobs(things: list[Thing]) -> None:
    (role,), (binding,) = pick(things, "Role").values(), pick(things, "RoleBinding").values()
    may = {(name, verb) for rule in role["rules"] for name in rule["resources"] for verb in rule["verbs"]}
    reads = {"get", "list", "watch"}
    of_others = {(name, verb) for name, verb in may if name != "jobs"}
    assert of_others == {(name, verb) for name in ("pods", "pods/log", "pods/status", "events") for verb in reads}
    assert {verb for name, verb in may if name == "jobs"} == {*reads, "create", "patch", "delete"}
    assert (binding["roleRef"]["name"], binding["subjects"][0]["name"]) == (role["metadata"]["name"], "worker")
    accounts = pick(things, "ServiceAccount")
    open_ones = {name for name, one in accounts.items() if one.get("automountServiceAccountToken", True)}
    assert open_ones == {"worker"}
    assert {pods.spec["serviceAccountName"] for pods in list_pods(things)} <= set(accounts)


def test_resources_can_be_read_and_fit(things: list[Thing]) -> None:
    for pods in list_pods(things):
        for one in pods.containers:
            asked, most = one["resources"]["requests"], one["resources"]["limits"]
            assert {"cpu", "memory"} <= set(asked) & set(most), one["name"]
            assert all(0 < to_number(asked[name]) <= to_number(most[name]) for name in asked), one["name"]
    (claim,) = pick(things, "PersistentVolumeClaim").values()
    assert to_number(claim["spec"]["resources"]["requests"]["storage"]) > 2**30


def test_what_is_referred_to_is_there(things: list[Thing]) -> None:
    maps, claims = pick(things, "ConfigMap"), pick(things, "PersistentVolumeClaim")
    for pods in list_pods(things):
        sources = [source for one in pods.containers for source in one.get("envFrom", ())]
        assert {source["configMapRef"]["name"] for source in sources if "configMapRef" in source} <= set(maps)
        volumes = {volume["name"]: volume for volume in pods.spec["volumes"]}
        mounts = [mount for one in pods.containers for mount in one["volumeMounts"]]
        assert {mount["name"] for mount in mounts} == set(volumes), f"{pods.owner}: mounted, and of use"
        for volume in volumes.values():
            assert "configMap" not in volume or volume["configMap"]["name"] in maps
            assert "persistentVolumeClaim" not in volume or volume["persistentVolumeClaim"]["claimName"] in claims
        for mount in mounts:
            if "subPath" in mount:
                assert mount["subPath"] in maps[volumes[mount["name"]]["configMap"]["name"]]["data"]


def test_selectors_find_their_pods(things: list[Thing]) -> None:
    pods = list(list_pods(things))
    for name, one in pick(things, "Deployment").items():
        (own,) = (each for each in pods if each.owner == f"Deployment {name}")
        chosen = one["spec"]["selector"]["matchLabels"]
        assert [each.owner for each in pods if is_part(chosen, each.labels)] == [own.owner], "its own, and no others"
        for spread in own.spec.get("topologySpreadConstraints", ()):
            assert is_part(spread["labelSelector"]["matchLabels"], own.labels)
    for name, one in pick(things, "Service").items():
        found = [each for each in pods if is_part(one["spec"]["selector"], each.labels)]
        assert [each.owner for each in found] == [f"Deployment {name}"]
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= set(found[0].ports)
    (budget,) = pick(things, "PodDisruptionBudget").values()
    assert len([each for each in pods if is_part(budget["spec"]["selector"]["matchLabels"], each.labels)]) == 1


def test_the_network_lets_through_what_is_needed_and_no_more(things: list[Thing]) -> None:
    rules, pods = pick(things, "NetworkPolicy"), list(list_pods(things))
    assert rules.pop("nothing-comes-in")["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    assert set(pick(things, "Service")) | {"server"} <= set(rules), "who has an address has a way in"
    for name, rule in rules.items():
        found = [each for each in pods if is_part(rule["spec"]["podSelector"]["matchLabels"], each.labels)]
        assert found, name
        has = {port for each in found for port in each.ports.values()} | ({METRICS} if name == "server" else set())
        assert {port["port"] for way in rule["spec"]["ingress"] for port in way.get("ports", ())} <= has, name
        assert ("egress" in rule["spec"]) == ("Egress" in rule["spec"]["policyTypes"])
    ways_out = {
        name: {port["port"] for way in rule["spec"].get("egress", ()) for port in way["ports"]}
        for name, rule in rules.items()
    }
    assert {name: out for name, out in ways_out.items() if name != "ray"} == {
        "server": {DNS, STORE},
        "figures": {DNS, STORE},
        "mlflow": {DNS, STORE, POSTGRES},
        "prefect": {DNS, POSTGRES},
    }, "what reads strangers' images reaches nothing else here"


@pytest.mark.parametrize("served_by", ["prod with prometheus", "prod with kserve"])
def test_prometheus_knows_the_pods_by_the_jobs_of_the_alerts(builds: dict[str, list[Thing]], served_by: str) -> None:
    things, monitors = builds[served_by], pick(builds["prod with prometheus"], "PodMonitor")
    scrapes = YAML(typ="safe").load((ROOT / "infra" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    for monitor in monitors.values():
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        chosen = monitor["spec"]["selector"]["matchLabels"]
        (found,) = (pods for pods in list_pods(things) if is_part(chosen, pods.labels))
        (scrape,) = (one for one in scrapes if one["job_name"] == endpoint["relabelings"][0]["replacement"])
        assert endpoint["relabelings"][0]["targetLabel"] == "job"
        (port,) = {target.rpartition(":")[2] for target in scrape["static_configs"][0]["targets"]}
        assert found.ports[endpoint["port"]] == int(port), "the operator finds a port by its name alone"
        rule = pick(things, "NetworkPolicy")[found.labels["app.kubernetes.io/name"]]["spec"]["ingress"][-1]
        assert [one["port"] for one in rule["ports"]] == [int(port)]
        assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert len(monitors) == len(scrapes)


def closed(required: str, **fields: Thing) -> Thing:
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": fields}


def many(of: Thing) -> Thing:
    return {"type": "array", "items": of}


TEXT: Thing = {"type": "string"}
TEXTS: Thing = {"type": "object", "additionalProperties": TEXT}
TIME: Thing = TEXT | {"pattern": r"^(0|(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?)$"}
RELABELING = closed("targetLabel replacement", targetLabel=TEXT, replacement=TEXT)
ALERT = closed("alert expr labels annotations", alert=TEXT, expr=TEXT, labels=TEXTS, annotations=TEXTS, **{"for": TIME})
# What we use of the schemas of Prometheus' operator 0.91. A key that they do not know is cut off in silence.
OF_PROMETHEUS = {
    "PodMonitor": closed(
        "selector podMetricsEndpoints",
        selector=closed("matchLabels", matchLabels=TEXTS),
        podMetricsEndpoints=many(closed("port interval", port=TEXT, interval=TIME, relabelings=many(RELABELING))),
    ),
    "PrometheusRule": closed("groups", groups=many(closed("name rules", name=TEXT, interval=TIME, rules=many(ALERT)))),
}


def test_prometheus_operator_takes_its_objects(builds: dict[str, list[Thing]]) -> None:
    """Once, by hand, also by all of its own schemas (npm's @kubernetes-models/prometheus-operator 6.0.0)."""
    monitors = pick(builds["prod with prometheus"], "PodMonitor").values()
    for thing in (*monitors, read_rules_of_the_page()):
        assert thing["apiVersion"] == "monitoring.coreos.com/v1"
        jsonschema.validate(thing["spec"], OF_PROMETHEUS[thing["kind"]])


def read_rules_of_the_page() -> Thing:
    """README.md wraps them into an object of Prometheus' operator; kubectl is a stand-in that shows what it gets."""
    (command,) = re.findall(
        r"^ +(\(printf 'apiVersion: monitoring.*)$", (KUBERNETES / "README.md").read_text(), flags=re.M
    )
    assert command.endswith("| kubectl apply -f -")
    shown = subprocess.run(
        ["sh", "-c", command.replace("kubectl apply -f -", "cat")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return dict(YAML(typ="safe").load(shown.stdout))


def test_the_rules_of_the_page_are_those_of_the_repository() -> None:
    rule = read_rules_of_the_page()
    assert (rule["kind"], rule["metadata"]) == ("PrometheusRule", {"name": "visionloop"})
    assert rule["spec"] == YAML(typ="safe").load((ROOT / "infra" / "prometheus" / "rules.yml").read_text())


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_the_autoscaler_has_what_it_counts_by(builds: dict[str, list[Thing]], name: str) -> None:
    (scaler,) = pick(builds[name], "HorizontalPodAutoscaler").values()
    aim = scaler["spec"]["scaleTargetRef"]
    target = pick(builds[name], aim["kind"])[aim["name"]]
    assert target["apiVersion"] == aim["apiVersion"]
    assert "replicas" not in target["spec"], "each apply would set them back"
    assert all("cpu" in one["resources"]["requests"] for one in target["spec"]["template"]["spec"]["containers"])
    assert scaler["spec"]["minReplicas"] <= scaler["spec"]["maxReplicas"]


def test_a_server_that_goes_has_the_time_it_needs(things: list[Thing]) -> None:
    params = load_params(KUBERNETES / "base" / "params.yaml")
    (server,) = (pods for pods in list_pods(things) if pods.labels["app.kubernetes.io/name"] == "server")
    needs_s = params.serve.lame_duck_s + GRACE_S + 5 + 5  # docs/server.md, "Swaps and the end"
    assert server.spec["terminationGracePeriodSeconds"] >= needs_s + 10
    probe = server.containers[0]["readinessProbe"]
    assert params.serve.lame_duck_s >= probe["periodSeconds"], "who asks for himself has seen it by then"
    assert params.serve.admin_port == METRICS
    for name, deployment in pick(things, "Deployment").items():
        port = {"server": METRICS, "figures": LOOP_METRICS}.get(name)
        told = deployment["spec"]["template"]["metadata"].get("annotations")
        assert told == (port and {"prometheus.io/scrape": "true", "prometheus.io/port": str(port)}), name
    for service in pick(things, "InferenceService").values():
        assert service["spec"]["predictor"]["annotations"]["prometheus.io/port"] == str(METRICS)


def test_prod_is_larger_than_dev_and_shares_its_volume(builds: dict[str, list[Thing]]) -> None:
    facts = {}
    for name in ("dev", "prod"):
        things = builds[name]
        (scaler,), (claim,) = (
            pick(things, "HorizontalPodAutoscaler").values(),
            pick(things, "PersistentVolumeClaim").values(),
        )
        (server,) = (pods for pods in list_pods(things) if pods.owner == "Deployment server")
        (keys,) = (volume["secret"] for volume in server.spec["volumes"] if volume["name"] == "keys")
        size = server.containers[0]["resources"]["requests"]["cpu"]
        spread = (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"])
        facts[name] = (next(iter(pick(things, "Namespace"))), spread, size, keys, claim["spec"]["accessModes"])
    dev_keys = {"secretName": "keys", "optional": True}
    assert facts["dev"] == ("visionloop-dev", (1, 2), "250m", dev_keys, ["ReadWriteOnce"])
    assert facts["prod"] == ("visionloop", (3, 30), "2", {"secretName": "keys"}, ["ReadWriteMany"])


@pytest.mark.parametrize(
    ("change", "renewed"),
    [
        (("base/params.yaml", "max_epochs: 15", "max_epochs: 16"), {"server", "worker", "figures"}),
        (("base/job-template.json", '"default": "8Gi"', '"default": "16Gi"'), {"worker"}),
        (("overlays/prod/kustomization.yaml", "eu-central-1", "eu-west-1"), {"server", "worker", "mlflow", "figures"}),
    ],
    ids=["params", "jobs", "store"],
)
def test_a_change_of_configuration_starts_what_reads_it_anew(
    builds: dict[str, list[Thing]], tmp_path: Path, change: tuple[str, str, str], renewed: set[str]
) -> None:
    before = pick(builds["prod"], "Deployment")
    after = pick(build_changed(tmp_path, "prod", *change), "Deployment")
    assert {name for name, one in after.items() if one != before[name]} == renewed


@pytest.mark.long
def test_checkov_finds_only_what_we_know(tmp_path: Path) -> None:
    """Known: secrets as variables, images by tag, and the token of the worker, which makes jobs."""
    uv = KUBECTL.with_name("uv")
    text = subprocess.run(
        [KUBECTL, "kustomize", KUBERNETES / "overlays" / "prod"], capture_output=True, check=True
    ).stdout
    (tmp_path / "prod.yaml").write_bytes(text)
    command = [uv, "tool", "run", "--from", "checkov==3.3.30", "checkov", "-f", str(tmp_path / "prod.yaml")]
    options = ["--framework", "kubernetes", "--compact", "--quiet", "--skip-download"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=ROOT)
    if "scan results" not in done.stdout:
        pytest.skip(f"checkov cannot be had here: {done.stderr.strip()[-200:]}")
    found = {line.split('"')[0].strip() for line in done.stdout.splitlines() if line.startswith("Check: ")}
    assert found == {f"Check: CKV_K8S_{number}:" for number in (15, 35, 38, 43)}, done.stdout
