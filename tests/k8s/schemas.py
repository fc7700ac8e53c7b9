"""Are the manifests what the API server takes?

Kubernetes' own kinds by the schemas in `kubernetes-validate`. For four kinds that others define, the fields used here
and no others, with the types, values and requirements of their published definitions: ServiceMonitor and PrometheusRule
(Prometheus operator), ScaledObject (KEDA 2.17, which brought fallback.behavior), LeaderWorkerSet (v1).
"""

from collections.abc import Mapping

import jsonschema
import kubernetes_validate

OLDEST, NEWEST = "1.30", "1.37"  # 1.30: the first with preStop.sleep


def closed(required: tuple[str, ...] = (), **properties: Mapping) -> dict:
    """An object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def strings(**more: object) -> dict:
    """A map of names to strings."""
    return {"type": "object", "additionalProperties": {"type": "string"}, **more}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
METADATA = {"type": "object", "required": ["name"]}
SELECTOR = closed(matchLabels=strings())
POLICY = closed(
    ("periodSeconds", "type", "value"), periodSeconds=COUNT, type={"enum": ["Pods", "Percent"]}, value=COUNT
)
DIRECTION = closed(
    stabilizationWindowSeconds=COUNT,
    policies={"type": "array", "items": POLICY},
    selectPolicy={"enum": ["Max", "Min", "Disabled"]},
)

SPECS = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): closed(
        ("endpoints", "selector"),
        jobLabel=TEXT,
        selector=SELECTOR,
        endpoints={
            "type": "array",
            "items": closed(port=TEXT, path=TEXT, interval={"type": "string", "pattern": r"^(\d+(ms|[smhd]))+$"}),
        },
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): closed(
        groups={
            "type": "array",
            "items": closed(
                ("name",),
                name=TEXT,
                rules={
                    "type": "array",
                    "items": closed(
                        ("expr",),
                        record=TEXT,
                        alert=TEXT,
                        expr=TEXT,
                        labels=strings(),
                        annotations=strings(),
                        **{"for": {"type": "string", "pattern": r"^(\d+(ms|[smhdwy]))+$"}},
                    ),
                },
            ),
        }
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): closed(
        ("scaleTargetRef", "triggers"),
        scaleTargetRef=closed(("name",), apiVersion=TEXT, kind=TEXT, name=TEXT),
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        pollingInterval=COUNT,
        cooldownPeriod=COUNT,
        fallback=closed(
            ("failureThreshold", "replicas"),
            failureThreshold=COUNT,
            replicas=COUNT,
            behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]},
        ),
        triggers={
            "type": "array",
            "minItems": 1,
            "items": closed(
                ("type", "metadata"),
                type={"const": "prometheus"},  # what its metadata may be is in KEDA's documentation of this scaler
                metricType={"enum": ["AverageValue", "Value"]},
                metadata=closed(
                    ("serverAddress", "query", "threshold"),
                    serverAddress=TEXT,
                    query=TEXT,
                    threshold=TEXT,
                    ignoreNullValues={"enum": ["true", "false"]},
                ),
            ),
        },
        advanced=closed(
            horizontalPodAutoscalerConfig=closed(name=TEXT, behavior=closed(scaleUp=DIRECTION, scaleDown=DIRECTION))
        ),
    ),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): closed(
        ("leaderWorkerTemplate",),
        replicas=COUNT,
        rolloutStrategy=closed(
            ("type",),
            type={"const": "RollingUpdate"},
            rollingUpdateConfiguration=closed(maxSurge=COUNT, maxUnavailable=COUNT),
        ),
        leaderWorkerTemplate=closed(
            ("workerTemplate",),
            size={"type": "integer", "minimum": 1},
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
            leaderTemplate={"type": "object"},  # pod templates: see below
            workerTemplate={"type": "object"},
        ),
    ),
}


def validate(item: dict) -> None:
    """Raise `jsonschema.ValidationError` where the API server would refuse an object, or drop a field of it."""
    spec = SPECS.get((item["apiVersion"], item["kind"]))
    if spec is None:
        for version in (OLDEST, NEWEST):
            kubernetes_validate.validate(item, version, strict=True)
        return
    whole = closed(("spec", "metadata"), apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=spec)
    jsonschema.Draft202012Validator(whole).validate(item)
    for part, template in item["spec"].get("leaderWorkerTemplate", {}).items():
        if part.endswith("Template"):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": part}, "template": template}
            kubernetes_validate.validate(pod, NEWEST, strict=True)
