import pytest
import yaml

from ch16.autoscale.emit import manifest, quantity
from ch16.autoscale.hpa import Policy, Rules, Spec


@pytest.mark.parametrize(("value", "text"), [(50, "50"), (2.0, "2"), (1.92, "1920m"), (0.04, "40m"), (0.5, "500m")])
def test_quantities(value, text):
    assert quantity(value) == text


def test_the_chapters_manifest():
    down = Rules((Policy("Pods", 1, 60), Policy("Percent", 10, 30)), 120, "Min")
    text = manifest(Spec(2, 10, down=down), 2.5, ["from a test", "of two lines"])
    assert text.startswith("# from a test\n# of two lines\napiVersion: autoscaling/v2\n")
    content = yaml.safe_load(text)
    assert content["kind"] == "HorizontalPodAutoscaler" and content["metadata"]["name"] == "inference-hpa"
    spec = content["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "inference-server"}
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 10)
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == "inference_active_requests"
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "2500m"}
    assert spec["behavior"]["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert spec["behavior"]["scaleDown"] == {
        "stabilizationWindowSeconds": 120,
        "selectPolicy": "Min",
        "policies": [
            {"type": "Pods", "value": 1, "periodSeconds": 60},
            {"type": "Percent", "value": 10, "periodSeconds": 30},
        ],
    }
