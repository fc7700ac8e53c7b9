"""Every overlay builds, is what the API server takes, and keeps what tests/k8s/invariants.py says; and a deployment
that is broken on purpose is found out by the check that is there for it."""

import base64
import copy
import re
import shutil

import pytest
import yaml

from tests.k8s import invariants
from tests.k8s.invariants import CHECKS, rollout_ends
from tests.k8s.manifests import COMPONENTS, K8S, KUBECTL, MULTI_NODE, OVERLAYS, build, name, of, secrets_of_the_readme
from tests.k8s.prometheus_rule import FILE, SOURCES, prometheus_rule
from tests.k8s.schemas import SPECS, validate

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed (make install brings it)")

BUILDS = {
    **{overlay: (f"overlays/{overlay}",) for overlay in OVERLAYS},
    **{f"single-gpu with {part}": ("overlays/single-gpu", part) for part in COMPONENTS},
    **{f"{overlay} with keda": (f"overlays/{overlay}", "keda") for overlay in ("eight-gpu", "cpu")},
    "vllm-router with all": ("overlays/vllm-router", *COMPONENTS),
}


OWN = "overlays/mine"  # of the README, which is not in the repository
README = (K8S / "README.md").read_text()


@pytest.fixture(params=[*BUILDS, MULTI_NODE])
def objects(request):
    """The example for several nodes uses things of an overlay."""
    if request.param == MULTI_NODE:
        return build("overlays/eight-gpu") + build(MULTI_NODE)
    return build(*BUILDS[request.param])


@needs_kubectl
def test_the_api_server_takes_it(objects):
    for item in objects:
        validate(item)
    assert len({(name(item), item["metadata"].get("namespace")) for item in objects}) == len(objects)
    namespaces = {item["metadata"].get("namespace") for item in objects if item["kind"] != "Namespace"}
    assert namespaces <= {"inference", "monitoring"}


@needs_kubectl
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps(objects, check):
    assert list(check(objects)) == []


# ---- broken on purpose ----


def everything():
    """All there is, to be broken: an HPA and a ScaledObject at once is wrong, and so the latter comes by itself."""
    return build("overlays/single-gpu", "prometheus-operator", "prometheus-adapter") + build(MULTI_NODE)


def change(where, what, value):
    """A mutation: put a value at a path in an object (~ is a slash in a name); None takes away what is there."""

    def mutate(objects):
        (item,) = [item for item in objects if name(item) == where]
        *path, last = [int(step) if step.isdigit() else step.replace("~", "/") for step in what.split("/")]
        for step in path:
            item = item[step]
        if value is None:
            del item[last]
        else:
            item[last] = value

    return mutate


def drop(where):
    """A mutation: leave an object out."""
    return lambda objects: objects.remove(next(item for item in objects if name(item) == where))


SERVER, GATEWAY, HPA = (
    "Deployment/inference-server",
    "Deployment/inference-gateway",
    "HorizontalPodAutoscaler/inference-hpa",
)
POD, BOX = "spec/template/spec", "spec/template/spec/containers/0"
MEMORY = {"emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}, "name": "shm"}
LEADER = "spec/leaderWorkerTemplate/leaderTemplate/spec/containers/0"

BROKEN = {
    "grace_period": [
        change(SERVER, f"{POD}/terminationGracePeriodSeconds", 130),
        change(SERVER, f"{POD}/terminationGracePeriodSeconds", None),
        change(SERVER, f"{BOX}/args/8", "180"),
        change(SERVER, f"{BOX}/lifecycle/preStop/sleep/seconds", 60),
        change(GATEWAY, f"{BOX}/lifecycle", None),
    ],
    "probes": [
        change(SERVER, f"{BOX}/startupProbe/httpGet/path", "/health"),
        change(SERVER, f"{BOX}/startupProbe/failureThreshold", 30),
        change(SERVER, f"{BOX}/livenessProbe/httpGet/path", "/ready"),
        change(SERVER, f"{BOX}/readinessProbe/httpGet/port", "https"),
        change(GATEWAY, f"{BOX}/readinessProbe", None),
        change("LeaderWorkerSet/inference-large", f"{LEADER}/startupProbe", None),
    ],
    "progress_deadline": [
        change(SERVER, "spec/progressDeadlineSeconds", None),
        change(SERVER, f"{BOX}/startupProbe/failureThreshold", 360),
    ],
    "selectors": [
        change(SERVER, "spec/selector/matchLabels", {"app": "server"}),
        change("Service/inference-server", "spec/selector", {"app": "server"}),
        change("Service/inference-server", "spec/selector", {}),
        change("Service/inference-gateway", "spec/ports/0/targetPort", 8000),
        change("PodDisruptionBudget/inference-server", "spec/selector/matchLabels", {"app": "server"}),
        change("NetworkPolicy/inference-server", "spec/podSelector/matchLabels", {"app": "server"}),
        change(SERVER, f"{POD}/topologySpreadConstraints/0/labelSelector/matchLabels", {"app": "server"}),
        change("ServiceMonitor/inference-server", "spec/endpoints/0/port", "web"),
        change("ServiceMonitor/inference-gateway", "spec/selector/matchLabels", {"app": "server"}),
    ],
    "references": [
        drop("PersistentVolumeClaim/model-cache"),
        change(SERVER, f"{BOX}/env/4/valueFrom/secretKeyRef/key", "servers"),
        change(GATEWAY, f"{BOX}/env/1/valueFrom/secretKeyRef/name", "keys"),
        change(SERVER, f"{BOX}/env/0/name", "MODEL_NAME"),
        change(SERVER, f"{BOX}/volumeMounts/0/name", "weights"),
        change(GATEWAY, f"{POD}/serviceAccountName", "gateway"),
        change(HPA, "spec/scaleTargetRef/name", "server"),
    ],
    "ports": [
        change(SERVER, f"{BOX}/args/4", "8001"),
        change(SERVER, f"{BOX}/args/2", "127.0.0.1"),
        change(GATEWAY, f"{BOX}/args/1", "inference-gateway:9100"),
        change(GATEWAY, f"{BOX}/args/1", "inference-server:80"),
        change("Service/inference-server", "spec/clusterIP", None),
        drop("Service/inference-server"),
    ],
    "network": [
        change("NetworkPolicy/inference-server", "spec/ingress/0/from/0/podSelector/matchLabels", {"app": "gateway"}),
        change("NetworkPolicy/inference-server", "spec/ingress/0/from/1/namespaceSelector/matchLabels", {"a": "b"}),
        change("NetworkPolicy/inference-server", "spec/ingress/0/from/0/podSelector/matchLabels", {}),
        change("NetworkPolicy/inference-server", "spec/ingress", [{}]),
        change("NetworkPolicy/inference-server", "spec/egress/1", None),
        change("NetworkPolicy/inference-gateway", "spec/egress/0/ports/0/port", 54),
        change("NetworkPolicy/inference-gateway", "spec/egress/1/ports/0/port", 8001),
        change("NetworkPolicy/inference-gateway", "spec/ingress/0/ports/0/port", 80),
        change("NetworkPolicy/inference-large", "spec/podSelector/matchLabels", {"app": "large"}),
        drop("NetworkPolicy/inference-gateway-to-large"),
        change("NetworkPolicy/inference-gateway-to-large", "spec/egress/0/ports/0/port", 8001),
        change("NetworkPolicy/inference-large", "spec/ingress/0", None),
        change("NetworkPolicy/inference-large", "spec/egress/0", None),
        change("NetworkPolicy/inference-large", "spec/egress/1/ports/0/port", 54),
    ],
    "restricted": [
        change(SERVER, f"{POD}/securityContext/runAsNonRoot", None),
        change(SERVER, f"{POD}/securityContext/runAsUser", 0),
        change(SERVER, f"{POD}/securityContext/seccompProfile", None),
        change(SERVER, f"{BOX}/securityContext/allowPrivilegeEscalation", True),
        change(SERVER, f"{BOX}/securityContext/privileged", True),
        change(SERVER, f"{BOX}/securityContext/capabilities", {"drop": ["ALL"], "add": ["SYS_NICE"]}),
        change(GATEWAY, f"{BOX}/securityContext/readOnlyRootFilesystem", False),
        change(GATEWAY, f"{POD}/automountServiceAccountToken", None),
        change(SERVER, f"{POD}/hostIPC", True),
        change(SERVER, f"{POD}/volumes/0", {"name": "models", "hostPath": {"path": "/models"}}),
    ],
    "resources": [
        change(SERVER, f"{BOX}/resources", None),
        change(SERVER, f"{BOX}/resources/limits/nvidia.com~gpu", None),
        change(SERVER, f"{BOX}/resources/requests/memory", "8Gi"),
        change(SERVER, f"{POD}/tolerations", None),
        change(SERVER, f"{BOX}/image", "inference"),
        change(GATEWAY, f"{BOX}/image", "registry.example.com:5000/inference:latest"),
    ],
    "writable": [
        change(SERVER, f"{BOX}/env/2/value", "/home/inference"),
        change(SERVER, f"{BOX}/env/1/value", "/app/models"),
        change(GATEWAY, f"{BOX}/volumeMounts", []),
        change(SERVER, f"{POD}/volumes/1", MEMORY),
        change(SERVER, f"{POD}/volumes/1", {"name": "shm", "emptyDir": {}}),
    ],
    "rollout": [
        change(SERVER, "spec/strategy/rollingUpdate", {"maxSurge": 1, "maxUnavailable": 0}),
        change(HPA, "spec/maxReplicas", 10),
        change(SERVER, f"{BOX}/resources/requests/nvidia.com~gpu", "4"),
    ],
    "evictions": [
        change("PodDisruptionBudget/inference-server", "spec/maxUnavailable", 0),
        change("PodDisruptionBudget/inference-gateway", "spec/maxUnavailable", None),
    ],
    "autoscaling": [
        change(SERVER, "spec/replicas", 2),
        change(HPA, "spec/minReplicas", 1),
        change(HPA, "spec/metrics/0/pods/metric/name", "inference_queue_length"),
        change(HPA, "spec/metrics/0/pods/target/type", "Value"),
        drop(HPA),
    ],
}


def test_every_check_is_tried():
    assert BROKEN.keys() == {check.__name__ for check in CHECKS}


@needs_kubectl
@pytest.mark.parametrize(
    ("check", "mutate"), [(check, mutate) for check, mutations in BROKEN.items() for mutate in mutations]
)
def test_a_broken_deployment_is_found_out(check, mutate):
    objects = copy.deepcopy(list(everything()))
    assert list(getattr(invariants, check)(objects)) == []
    mutate(objects)
    assert list(getattr(invariants, check)(objects)) != []


@needs_kubectl
@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("spec/triggers/0/metricType", "Value"),
        ("spec/triggers/0/metadata/ignoreNullValues", None),
        ("spec/triggers/0/metadata/query", "sum(inference_queue_length)"),
        ("spec/fallback", None),
        ("spec/fallback/replicas", 1),
        ("spec/minReplicaCount", 1),
        ("spec/scaleTargetRef/name", "server"),
    ],
)
def test_a_broken_scaled_object_is_found_out(what, value):
    objects = copy.deepcopy(list(build("overlays/single-gpu", "keda")))
    change("ScaledObject/inference-server", what, value)(objects)
    assert list(invariants.autoscaling(objects))


@needs_kubectl
def test_a_role_that_grants_too_much_is_found_out():
    for what, value in (("spec", None), ("rules/0/verbs", ["list", "watch", "delete"]), ("rules/0/resources", ["*"])):
        objects = copy.deepcopy(list(build("overlays/vllm-router")))
        if value:
            change("Role/vllm-router", what, value)(objects)
        else:
            drop("Role/vllm-router")(objects)
        assert list(invariants.restricted(objects)) + list(invariants.references(objects))


@needs_kubectl
def test_a_typing_error_in_a_field_is_refused():
    for item in everything() + build("overlays/single-gpu", "keda"):
        if item["kind"] in ("Namespace", "ConfigMap"):
            continue
        broken = copy.deepcopy(item)
        broken["spec"]["repilcas"] = 2
        with pytest.raises(Exception, match="repilcas"):
            validate(broken)
    kinds = {(item["apiVersion"], item["kind"]) for item in everything() + build("overlays/single-gpu", "keda")}
    assert SPECS.keys() <= kinds, "each of the four was looked at"


def test_rollouts():
    """By hand. Eight pods on eight GPUs: one more first waits for ever, one less first ends."""
    assert not rollout_ends(8, surge=1, unavailable=0, slots=8)
    assert rollout_ends(8, surge=1, unavailable=0, slots=9)
    assert rollout_ends(8, surge=0, unavailable=1, slots=8)
    assert not rollout_ends(10, surge=0, unavailable=1, slots=8), "two that wait already are more than may be missing"
    assert not rollout_ends(2, surge=0, unavailable=1, slots=1)
    assert rollout_ends(1, surge=0, unavailable=1, slots=1)


# ---- the autoscalers agree ----


@needs_kubectl
def test_the_hpa_is_the_chapters():
    (hpa,) = of(build("base"), "HorizontalPodAutoscaler")
    spec = hpa["spec"]
    assert hpa["metadata"]["name"] == "inference-hpa" and hpa["apiVersion"] == "autoscaling/v2"
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "inference-server"}
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 10)
    target = {"type": "AverageValue", "averageValue": "50"}
    assert spec["metrics"] == [
        {"type": "Pods", "pods": {"metric": {"name": "inference_active_requests"}, "target": target}}
    ]


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_keda_does_what_the_hpa_did(overlay):
    objects, before = build(f"overlays/{overlay}", "keda"), build(f"overlays/{overlay}")
    (hpa,), (scaled,) = of(before, "HorizontalPodAutoscaler"), of(objects, "ScaledObject")
    assert not of(objects, "HorizontalPodAutoscaler")
    was, spec = hpa["spec"], scaled["spec"]
    own = spec["advanced"]["horizontalPodAutoscalerConfig"]
    assert (own["name"], own["behavior"]) == (hpa["metadata"]["name"], was["behavior"])
    (trigger,), (metric,) = spec["triggers"], was["metrics"]
    assert trigger["metadata"]["threshold"] == metric["pods"]["target"]["averageValue"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (was["minReplicas"], was["maxReplicas"])
    assert spec["fallback"]["replicas"] == was["minReplicas"]


# ---- the operator's Prometheus knows what ours does ----


def test_the_operators_rules_are_those_of_monitoring():
    assert FILE.read_text() == prometheus_rule(), "run: python3 -m tests.k8s.prometheus_rule"
    groups = [yaml.safe_load((K8S / "monitoring" / name).read_text())["groups"] for name in SOURCES]
    assert yaml.safe_load(prometheus_rule())["spec"]["groups"] == [group for of_file in groups for group in of_file]


@needs_kubectl
def test_rules_name_jobs_as_the_monitors_do():
    """The operator takes a job's name from a label of its Service."""
    objects = build("overlays/single-gpu", "prometheus-operator")
    jobs = {
        service["metadata"]["labels"][monitor["spec"]["jobLabel"]]
        for monitor in of(objects, "ServiceMonitor")
        for service in of(objects, "Service")
        if monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    }
    (rule,) = of(objects, "PrometheusRule")
    assert set(re.findall(r'job="([^"]+)"', str(rule))) == jobs == {"inference-server", "inference-gateway"}


# ---- secrets and text ----


def test_no_key_is_in_the_repository():
    """The form of the Secret cannot be applied, and no kustomization names it."""
    secret = yaml.safe_load((K8S / "examples" / "api-keys.yaml").read_text())
    assert {secret["metadata"]["name"]: set(secret["data"])} == secrets_of_the_readme()
    for value in secret["data"].values():
        with pytest.raises(ValueError):
            base64.b64decode(value, validate=True)
    for path in K8S.rglob("kustomization.yaml"):
        assert "api-keys" not in path.read_text() and "secretGenerator" not in path.read_text()


@needs_kubectl
def test_what_the_readme_says_to_apply_builds():
    folders = set(re.findall(r"kubectl apply -k k8s/(\S+)", README))
    assert folders == {*(f"overlays/{overlay}" for overlay in OVERLAYS), MULTI_NODE, "monitoring", OWN}
    assert all(build(folder) for folder in folders - {OWN})


@needs_kubectl
@pytest.mark.parametrize("component", [*COMPONENTS, "all"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_overlay_of_ones_own_builds(overlay, component, tmp_path):
    """As the README has it, but for its choice of an overlay and of components; it gives what the other tests build."""
    (text,) = re.findall(rf"^```yaml\n(# k8s/{OWN}/kustomization\.yaml\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    content = yaml.safe_load(text)
    named = [path.removeprefix("../../components/") for path in content["components"]]
    assert content["resources"] == ["../single-gpu"] and set(named) == set(COMPONENTS)
    chosen = named if component == "all" else [component]
    content |= {"resources": [f"../{overlay}"], "components": [f"../../components/{name}" for name in chosen]}
    shutil.copytree(K8S, tmp_path / "k8s")
    own = tmp_path / "k8s" / OWN
    own.mkdir()
    (own / "kustomization.yaml").write_text(yaml.safe_dump(content))
    assert build(str(own)) == build(f"overlays/{overlay}", *chosen)


@needs_kubectl
def test_why_components_are_not_for_the_overlay_itself(tmp_path):
    """What the README warns of. If kustomize changes its order, the warning can go."""
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / "overlays" / "single-gpu" / "kustomization.yaml"
    file.write_text(file.read_text() + "components:\n  - ../../components/keda\n")
    with pytest.raises(AssertionError, match="no matches for Id HorizontalPodAutoscaler"):
        build(str(file.parent))
