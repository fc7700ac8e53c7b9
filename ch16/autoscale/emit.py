"""The manifest of the autoscaler that was simulated."""

from collections.abc import Sequence

import yaml

from ch16.autoscale.hpa import Rules, Spec


def quantity(value: float) -> str:
    """A number as Kubernetes writes it: whole, or in thousandths ("2500m")."""
    thousandths = round(1000 * value)
    return f"{thousandths}m" if thousandths % 1000 else str(thousandths // 1000)


def manifest(spec: Spec, target: float, comments: Sequence[str]) -> str:
    """The chapter's HorizontalPodAutoscaler, with the target found, as YAML under `comments`."""
    content = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "inference-hpa"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "inference-server"},
            "minReplicas": spec.min_replicas,
            "maxReplicas": spec.max_replicas,
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": "inference_active_requests"},
                        "target": {"type": "AverageValue", "averageValue": quantity(target)},
                    },
                }
            ],
            "behavior": {"scaleUp": _rules(spec.up), "scaleDown": _rules(spec.down)},
        },
    }
    return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(content, sort_keys=False)


def _rules(rules: Rules) -> dict:
    # Not the tolerance: its default may be another on a cluster, and old API servers do not know the field.
    return {
        "stabilizationWindowSeconds": rules.window_s,
        "selectPolicy": rules.select,
        "policies": [
            {"type": policy.kind, "value": policy.value, "periodSeconds": policy.period_s} for policy in rules.policies
        ],
    }
