"""What must hold between the parts of a deployment, and no schema says. Each check yields what is wrong, in words."""

import re
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from common.metrics import InferenceMetrics
from tests.k8s.manifests import Workload, matches, name, of, quantity, secrets_of_the_readme, workloads

Objects = tuple[dict, ...]
Check = Callable[[Objects], Iterator[str]]
CHECKS: list[Check] = []

END_S = 10  # for an engine or an event loop to end once the last answer is out
UVICORN_S = 2  # ch16/parts/inference_serving/process.py
LOADING_S = 600  # a model is loaded, or downloaded first, in more than a moment
FROM_LWS = {"LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"}
NODE_GPUS = 8
SOME_PORT = 40_123  # NCCL's ranks listen where the system lets them


def check(function: Check) -> Check:
    """Add it to CHECKS."""
    CHECKS.append(function)
    return function


def is_server(workload: Workload) -> bool:
    """Does it load a model?"""
    return "--serve" in workload.command or "serve" in workload.command


def startup_budget_s(workload: Workload) -> float:
    """How long a pod may take until it is ready for the first time."""
    probe = workload.probes.get("startup", {})
    return probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3) if probe else 0


# ---- a pod's life ----


@check
def grace_period(objects: Objects) -> Iterator[str]:
    """SIGKILL comes after preStop, the drain and the end of the process."""
    for w in workloads(objects):
        before = w.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if not before and w.ports:
            yield f"{w.name}: SIGTERM comes before others know that it leaves (no preStop)"
        needed = before + float(w.flag("--drain-timeout") or 0) + UVICORN_S + END_S
        if (given := w.spec.get("terminationGracePeriodSeconds", 30)) < needed:
            yield f"{w.name}: killed after {given} s, needs {needed:g} s"


@check
def probes(objects: Objects) -> Iterator[str]:
    """Each question to the endpoint that answers it, at a port that is there, and with patience while a model loads."""
    for w in workloads(objects):
        if not w.ports:
            continue
        for kind in ("startup", "readiness", "liveness"):
            if (probe := w.probes.get(kind)) is None:
                yield f"{w.name}: no {kind} probe"
            elif probe["httpGet"]["port"] not in w.ports:
                yield f"{w.name}: {kind} probe at port {probe['httpGet']['port']}, which is not there"
        paths = {kind: probe["httpGet"]["path"] for kind, probe in w.probes.items()}
        if paths.get("liveness") in ("/ready", "/readiness"):
            yield f"{w.name}: a pod that drains or loads would be restarted"
        if w.command[1:2] == ["ch16/inference_serving.py"] and paths.get("startup") != "/ready":
            yield f"{w.name}: {paths.get('startup')} is 200 from the first second, long before the model is there"
        if is_server(w) and startup_budget_s(w) < LOADING_S:
            yield f"{w.name}: {startup_budget_s(w):g} s are too short to load a model"


@check
def progress_deadline(objects: Objects) -> Iterator[str]:
    """A rollout is not called failed while a pod ends and the next one loads."""
    for w in workloads(objects):
        needed = w.spec.get("terminationGracePeriodSeconds", 30) + startup_budget_s(w)
        if w.owner["kind"] == "Deployment" and (given := w.owner["spec"].get("progressDeadlineSeconds", 600)) < needed:
            yield f"{w.name}: progressDeadlineSeconds {given}, but one pod may take {needed:g} s"


# ---- names and labels ----


@check
def selectors(objects: Objects) -> Iterator[str]:
    """Whatever selects pods or Services finds some."""
    pods = list(workloads(objects))
    for item in of(objects, "Deployment"):
        if not matches(item["spec"]["selector"], item["spec"]["template"]["metadata"]["labels"]):
            yield f"{name(item)} does not select its own pods"
    for item in of(objects, "Service"):
        chosen = [w for w in pods if matches({"matchLabels": item["spec"]["selector"]}, w.labels)]
        if len(chosen) != 1:
            yield f"{name(item)} selects the pods of {len(chosen)} workloads"
        for port in item["spec"]["ports"]:
            for w in chosen:
                if port["targetPort"] not in (*w.ports, *w.ports.values()):
                    yield f"{name(item)}: no port {port['targetPort']} in {w.name}"
    for item in of(objects, "PodDisruptionBudget", "NetworkPolicy"):
        selector = item["spec"].get("selector", item["spec"].get("podSelector"))
        if not any(matches(selector, w.labels) for w in pods):
            yield f"{name(item)} selects no pod"
    for w in pods:
        for constraint in w.spec.get("topologySpreadConstraints", ()):
            if not matches(constraint["labelSelector"], w.labels):
                yield f"{w.name}: spreads pods that are not its own"
    for item in of(objects, "ServiceMonitor"):
        ports = [
            port["name"]
            for service in of(objects, "Service")
            if matches(item["spec"]["selector"], service["metadata"]["labels"])
            for port in service["spec"]["ports"]
        ]
        for endpoint in item["spec"]["endpoints"]:
            if ports.count(endpoint["port"]) != 1:
                yield f"{name(item)}: {ports.count(endpoint['port'])} ports called {endpoint['port']}"


@check
def references(objects: Objects) -> Iterator[str]:
    """What is named is there, or the README says how it comes to be there."""
    there = {name(item) for item in objects}
    secrets = secrets_of_the_readme()
    for w in workloads(objects):
        volumes = {volume["name"] for volume in w.spec.get("volumes", ())}
        mounted = {mount["name"] for mount in w.container.get("volumeMounts", ())}
        if volumes != mounted:
            yield f"{w.name}: volumes {sorted(volumes ^ mounted)} are defined or mounted, not both"
        for volume in w.spec.get("volumes", ()):
            if (
                claim := volume.get("persistentVolumeClaim")
            ) and f"PersistentVolumeClaim/{claim['claimName']}" not in there:
                yield f"{w.name}: no claim {claim['claimName']}"
        for variable in w.container.get("env", ()):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference and reference["key"] not in secrets.get(reference["name"], ()):
                yield f"{w.name}: nobody makes the key {reference['key']} of the Secret {reference['name']}"
        if (account := w.spec.get("serviceAccountName")) and f"ServiceAccount/{account}" not in there:
            yield f"{w.name}: no ServiceAccount {account}"
        for word in w.command:
            for variable in re.findall(r"\$\((\w+)\)", word):
                if w.owner["kind"] != "LeaderWorkerSet" or variable not in FROM_LWS:
                    yield f"{w.name}: $({variable}) has no value"
    for item in of(objects, "RoleBinding"):
        for reference in (item["roleRef"], *item["subjects"]):
            if f"{reference['kind']}/{reference['name']}" not in there:
                yield f"{name(item)}: no {reference['kind']} {reference['name']}"
    for item in of(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = {"kind": "Deployment", **item["spec"]["scaleTargetRef"]}
        if f"{target['kind']}/{target['name']}" not in there:
            yield f"{name(item)}: nothing called {target['name']}"


@check
def ports(objects: Objects) -> Iterator[str]:
    """A process listens where its container says; the gateway looks for servers where they are."""
    for w in workloads(objects):
        if w.ports and (listens := int(w.flag("--port"))) not in w.ports.values():
            yield f"{w.name} listens on {listens}, its ports are {w.ports}"
        if w.ports and w.flag("--host") != "0.0.0.0":
            yield f"{w.name} listens on 127.0.0.1 alone"
        if discover := w.flag("--discover"):
            service, port = discover.split(":")
            found = [item for item in of(objects, "Service") if item["metadata"]["name"] == service]
            # A headless Service translates no ports: the address of a pod comes with the pod's own.
            if not found or found[0]["spec"].get("clusterIP") != "None":
                yield f"{w.name}: {service} is no headless Service"
            elif not any(p["port"] == int(port) for p in found[0]["spec"]["ports"]):
                yield f"{w.name}: {service} has no port {port}"
            elif not any(
                int(port) in other.ports.values()
                for other in workloads(objects)
                if matches({"matchLabels": found[0]["spec"]["selector"]}, other.labels)
            ):
                yield f"{w.name}: no pod of {service} listens on {port}"


# ---- who may talk to whom ----


def allowed(
    objects: Objects, direction: str, pod: dict, peer: dict, namespace: str, port: int, protocol: str = "TCP"
) -> bool:
    """Whether the NetworkPolicies let `pod` take (Ingress) or open (Egress) a connection.

    Args:
        pod: its labels.
        peer: the labels of the other pod.
        namespace: of the other pod.
        port: of whoever listens.
    """
    policies = [
        item["spec"]
        for item in of(objects, "NetworkPolicy")
        if matches(item["spec"]["podSelector"], pod) and direction in item["spec"]["policyTypes"]
    ]
    side = "from" if direction == "Ingress" else "to"

    def takes(rule: dict) -> bool:
        if "ports" in rule and {"port": port, "protocol": protocol} not in rule["ports"]:
            return False
        return side not in rule or any(
            matches(p["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
            if "namespaceSelector" in p
            else namespace == "inference" and matches(p["podSelector"], peer)
            for p in rule[side]
        )

    return not policies or any(takes(rule) for policy in policies for rule in policy.get(direction.lower(), ()))


@check
def network(objects: Objects) -> Iterator[str]:
    """Clients reach the gateway, it the servers, Prometheus both, nobody else the servers; ranks reach each other."""
    pods = {w.labels["app.kubernetes.io/name"]: w for w in workloads(objects)}
    gateway, stranger = pods["inference-gateway"], {"app": "stranger"}
    wanted = {
        "clients cannot reach the gateway": allowed(objects, "Ingress", gateway.labels, stranger, "shop", 9000),
        "the gateway cannot look up names": allowed(objects, "Egress", gateway.labels, {}, "kube-system", 53, "UDP"),
        "the router cannot ask the API server": "--service-discovery" not in gateway.command
        or allowed(objects, "Egress", gateway.labels, {}, "default", 443),
    }
    for w in workloads(objects):
        if is_server(w) and w.ports:  # servers answer on one port, wherever they run
            way = allowed(objects, "Egress", gateway.labels, w.labels, "inference", w.ports["http"])
            way = way and allowed(objects, "Ingress", w.labels, gateway.labels, "inference", w.ports["http"])
            wanted[f"the gateway cannot reach {w.name}"] = way
        if w.owner["kind"] == "LeaderWorkerSet":
            wanted[f"{w.name} cannot look up its leader"] = allowed(
                objects, "Egress", w.labels, {}, "kube-system", 53, "UDP"
            )
            for other in workloads(objects):  # each with each, on ports that they choose
                if other.owner is w.owner:
                    way = allowed(objects, "Egress", w.labels, other.labels, "inference", SOME_PORT)
                    way = way and allowed(objects, "Ingress", other.labels, w.labels, "inference", SOME_PORT)
                    wanted[f"{w.name} cannot reach {other.name}"] = way
        if w.ports:
            reached = allowed(objects, "Ingress", w.labels, stranger, "monitoring", w.ports["http"])
            wanted[f"Prometheus cannot reach {w.name}"] = reached
        if is_server(w):
            wanted[f"{w.name} cannot download a model"] = allowed(objects, "Egress", w.labels, {}, "internet", 443)
            for namespace in ("shop", "inference"):
                past = allowed(objects, "Ingress", w.labels, stranger, namespace, 8000)
                wanted[f"pods of namespace {namespace} reach {w.name} past the gateway"] = not past
    yield from (problem for problem, fine in wanted.items() if not fine)


# ---- what a pod may do ----


@check
def restricted(objects: Objects) -> Iterator[str]:
    """Pod security standard `restricted`, a root file system that nobody writes to, and no token that nobody needs."""
    for w in workloads(objects):
        pod, container = w.spec.get("securityContext", {}), w.container.get("securityContext", {})
        wanted = {
            "runs as root": pod.get("runAsNonRoot") is True and pod.get("runAsUser", 0) > 0,
            "no seccomp profile": pod.get("seccompProfile", {}).get("type") == "RuntimeDefault",
            "may gain privileges": container.get("allowPrivilegeEscalation") is False,
            "privileged": not container.get("privileged"),
            "keeps capabilities": container.get("capabilities") == {"drop": ["ALL"]},
            "can write to its root": container.get("readOnlyRootFilesystem") is True,
            "shares a namespace of the node": not {"hostNetwork", "hostPID", "hostIPC"} & w.spec.keys(),
            "mounts a folder of the node": not any("hostPath" in volume for volume in w.spec.get("volumes", ())),
            "has a token without an account of its own": w.spec.get("automountServiceAccountToken") is False
            or "serviceAccountName" in w.spec,
        }
        yield from (f"{w.name}: {problem}" for problem, fine in wanted.items() if not fine)
    for item in of(objects, "Role"):
        for rule in item["rules"]:
            if not set(rule["verbs"]) <= {"get", "list", "watch"} or "*" in rule["resources"]:
                yield f"{name(item)} grants more than reading"


@check
def resources(objects: Objects) -> Iterator[str]:
    """What the scheduler has to know; an image that says which one it is."""
    for w in workloads(objects):
        given = w.container.get("resources", {})
        requests, limits = given.get("requests", {}), given.get("limits", {})
        if not {"cpu", "memory"} <= requests.keys() or "memory" not in limits:
            yield f"{w.name}: no requests, or no limit of memory"
        elif is_server(w):
            if requests["memory"] != limits["memory"]:
                yield f"{w.name}: may be evicted for memory that it was not promised"
            if limits.get("nvidia.com/gpu") != requests.get("nvidia.com/gpu"):
                yield f"{w.name}: GPUs requested and limited differ, which the API server refuses"
            keys = [toleration.get("key") for toleration in w.spec.get("tolerations", ())]
            if "nvidia.com/gpu" in requests and "nvidia.com/gpu" not in keys:
                yield f"{w.name}: not let on to GPU nodes"
        if not re.search(r":(?!latest$)[\w.-]+$|@sha256:", w.container["image"]):
            yield f"{w.name}: image {w.container['image']} may be another one tomorrow"


@check
def writable(objects: Objects) -> Iterator[str]:
    """vLLM and its libraries write below HOME, HF_HOME and /tmp, and to /dev/shm."""
    for w in workloads(objects):
        mounts = {mount["mountPath"]: mount["name"] for mount in w.container.get("volumeMounts", ())}
        volumes = {volume["name"]: volume for volume in w.spec.get("volumes", ())}
        environment = {e["name"]: e.get("value") for e in w.container.get("env", ())}
        places = ["/tmp", environment.get("HOME"), *([environment.get("HF_HOME"), "/dev/shm"] if is_server(w) else [])]
        yield from (f"{w.name}: cannot write to {place}" for place in places if place not in mounts)
        if "/dev/shm" in mounts:
            shm = volumes[mounts["/dev/shm"]].get("emptyDir", {})
            memory = quantity(w.container["resources"]["limits"]["memory"])
            if shm.get("medium") != "Memory" or not 2**30 <= quantity(shm.get("sizeLimit", "0")) < memory:
                yield f"{w.name}: /dev/shm is not memory, too small, or as large as all memory"


# ---- rollouts, evictions, scaling ----


def rollout_ends(replicas: int, surge: int, unavailable: int, slots: int) -> bool:
    """Whether a rolling update of a Deployment ends on a cluster with room for `slots` of its pods.

    As Kubernetes' controller does it (pkg/controller/deployment/rolling.go): new pods until there are replicas + surge;
    then old ones go, first those that do not run, as long as replicas - unavailable remain that do.
    """
    old, old_pending = min(replicas, slots), max(0, replicas - slots)
    new = new_pending = 0
    while old or old_pending or new < replicas:
        before = old, old_pending, new, new_pending
        for _ in range(slots - old - new):  # the scheduler: who has waited longest comes first
            if old_pending:
                old, old_pending = old + 1, old_pending - 1
            elif new_pending:
                new, new_pending = new + 1, new_pending - 1
        total = old + old_pending + new + new_pending
        if (more := min(replicas - new - new_pending, replicas + surge - total)) > 0:
            new_pending += more
        else:
            fewer = max(0, total - (replicas - unavailable) - new_pending)
            old_pending -= min(old_pending, fewer)
            old -= min(old, max(0, min(fewer, old + new - (replicas - unavailable))))
        if before == (old, old_pending, new, new_pending):
            return False
    return True


@check
def rollout(objects: Objects) -> Iterator[str]:
    """A rollout ends even when every GPU is taken: on a node of eight, or on as many nodes as there are replicas."""
    for w in workloads(objects):
        if not w.gpus or w.owner["kind"] != "Deployment":
            continue
        rolling = w.owner["spec"]["strategy"]["rollingUpdate"]
        low, high = replica_ranges(objects)[0]
        room = NODE_GPUS // w.gpus if w.gpus < NODE_GPUS else high
        for replicas in range(low, high + 1):
            slots = min(replicas, room)  # what is left over belongs to others
            if not rollout_ends(replicas, rolling["maxSurge"], rolling["maxUnavailable"], slots):
                yield f"{w.name}: a rollout of {replicas} replicas with room for {slots} never ends"


@check
def evictions(objects: Objects) -> Iterator[str]:
    """Nodes can be emptied."""
    for item in of(objects, "PodDisruptionBudget"):
        if not item["spec"].get("maxUnavailable"):
            yield f"{name(item)}: no pod may ever be evicted"


def replica_ranges(objects: Objects) -> list[tuple[int, int]]:
    """Lowest and highest number of replicas, of each autoscaler."""
    hpas = [(i["spec"]["minReplicas"], i["spec"]["maxReplicas"]) for i in of(objects, "HorizontalPodAutoscaler")]
    return hpas + [(i["spec"]["minReplicaCount"], i["spec"]["maxReplicaCount"]) for i in of(objects, "ScaledObject")]


def exported() -> set[str]:
    """Names of the chapter's series on the server's /metrics."""
    InferenceMetrics(registry := CollectorRegistry())
    page = generate_latest(registry).decode()
    return {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}


@check
def autoscaling(objects: Objects) -> Iterator[str]:
    """One autoscaler, alone in charge, with a metric that the servers export, for each pod and not for all together."""
    scalers = of(objects, "HorizontalPodAutoscaler", "ScaledObject")
    targets = [item["spec"]["scaleTargetRef"]["name"] for item in scalers]
    for w in workloads(objects):
        if w.owner["metadata"]["name"] in targets and "replicas" in w.owner["spec"]:
            yield f"{w.name}: `replicas` would undo the autoscaler at every apply"
        if w.owner["kind"] == "Deployment" and is_server(w) and targets.count(w.owner["metadata"]["name"]) != 1:
            yield f"{w.name} has {targets.count(w.owner['metadata']['name'])} autoscalers"
    for low, high in replica_ranges(objects):
        if not 2 <= low <= high:
            yield f"{low} to {high} replicas: one alone is a single point of failure"
    for item in of(objects, "HorizontalPodAutoscaler"):
        for metric in item["spec"]["metrics"]:
            if metric["type"] != "Pods" or metric["pods"]["target"]["type"] != "AverageValue":
                yield f"{name(item)}: not an average over pods"
            elif (wanted := metric["pods"]["metric"]["name"]) not in exported():
                yield f"{name(item)}: the server exports no {wanted}"
    for item in of(objects, "ScaledObject"):
        spec = item["spec"]
        for trigger in spec["triggers"]:
            if trigger["metricType"] != "AverageValue":
                yield f"{name(item)}: compares the sum over all pods with the threshold for one"
            if trigger["metadata"].get("ignoreNullValues") != "false":
                yield f"{name(item)}: takes a Prometheus without series for an idle service, and scales down"
            if not set(re.findall(r"\b(inference_\w+)", trigger["metadata"]["query"])) & exported():
                yield f"{name(item)}: asks for a series that the server does not export"
        if not spec["minReplicaCount"] <= spec.get("fallback", {}).get("replicas", -1) <= spec["maxReplicaCount"]:
            yield f"{name(item)}: no number of replicas for when Prometheus is down"
