"""Manifests of autoscalers: writing what was simulated, reading what is to be simulated."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ch16.parts.autoscaling.hpa import SCALE_DOWN, SCALE_UP, Policy, Rules, Spec
from ch16.parts.autoscaling.simulate import Pool
from common.cli import CannotRun, first_line
from common.results import Report

KIND = "HorizontalPodAutoscaler"


def quantity(value: float) -> str:
    """A number as Kubernetes writes it: whole, or in thousandths ("2500m")."""
    thousandths = round(1000 * value)
    return f"{thousandths}m" if thousandths % 1000 else str(thousandths // 1000)


def manifest_comments(results: Report, pool: Pool, slo_s: float) -> list[str]:
    """Where the target comes from, by the tables "costs" and "bursty" (of the one signal)."""
    source, row = (results.tables[name]["rows"][0] for name in ("costs", "bursty"))
    return [
        f"Target found by ch16/autoscaling.py, simulated with step times of {source['source']}, {pool.slots} slots,",
        f"cold start {pool.cold_start_s:.0f} s: {row['missed_percent']:.2f}% of first tokens later than "
        f"{1e3 * slo_s:,.0f} ms in bursts,",
        f"at {row['mean']:.1f} replicas on average. Search again for your engine and your traffic.",
    ]


def manifest(spec: Spec, target: float, comments: Sequence[str]) -> str:
    """The chapter's HorizontalPodAutoscaler, with the target found, as YAML under `comments`."""
    metric = {
        "metric": {"name": "inference_active_requests"},
        "target": {"type": "AverageValue", "averageValue": quantity(target)},
    }
    content = {
        "apiVersion": "autoscaling/v2",
        "kind": KIND,
        "metadata": {"name": "inference-hpa"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "inference-server"},
            "minReplicas": spec.min_replicas,
            "maxReplicas": spec.max_replicas,
            "metrics": [{"type": "Pods", "pods": metric}],
            "behavior": {"scaleUp": _rules(spec.up), "scaleDown": _rules(spec.down)},
        },
    }
    return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(content, sort_keys=False)


def _rules(rules: Rules) -> dict:
    # Not the tolerance: its default may be another on a cluster, and old API servers do not know the field.
    policies = [{"type": one.kind, "value": one.value, "periodSeconds": one.period_s} for one in rules.policies]
    return {"stabilizationWindowSeconds": rules.window_s, "selectPolicy": rules.select, "policies": policies}


def read_spec(path: str | Path) -> Spec:
    """Replicas and behaviour of the first HorizontalPodAutoscaler in a YAML file, without its metrics.

    Missing fields have Kubernetes' defaults. CannotRun: no such file or object, or one the API server would refuse.
    """
    try:
        documents = list(yaml.safe_load_all(Path(path).read_text()))
        said = next(item["spec"] for item in documents if isinstance(item, dict) and item.get("kind") == KIND)
        behavior, fewest = said.get("behavior") or {}, said.get("minReplicas", 1)
        up, down = behavior.get("scaleUp") or {}, behavior.get("scaleDown") or {}
        return Spec(fewest, said["maxReplicas"], _rules_of(up, SCALE_UP), _rules_of(down, SCALE_DOWN))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CannotRun(f"cannot read {path}: {first_line(error)}") from None
    except StopIteration:
        raise CannotRun(f"{path} has no {KIND}") from None
    except KeyError as error:
        raise CannotRun(f"{path}: its {KIND} has no {error.args[0]}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise CannotRun(f"{path}: its {KIND} is none that Kubernetes takes: {first_line(error)}") from None


def _rules_of(said: Mapping, default: Rules) -> Rules:
    policies = tuple(Policy(item["type"], item["value"], item["periodSeconds"]) for item in said.get("policies") or ())
    window_s = said.get("stabilizationWindowSeconds")
    return Rules(
        policies or default.policies,
        default.window_s if window_s is None else window_s,
        said.get("selectPolicy") or default.select,
        float(said.get("tolerance") or default.tolerance),
    )
