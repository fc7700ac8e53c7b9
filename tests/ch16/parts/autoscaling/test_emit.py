from pathlib import Path

import pytest
import yaml

from ch16.parts.autoscaling.emit import manifest, quantity, read_spec
from ch16.parts.autoscaling.hpa import SCALE_DOWN, SCALE_UP, Policy, Rules, Spec
from common.cli import CannotRun

DEPLOYED = Path(__file__).parents[4] / "k8s" / "base" / "hpa.yaml"


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


def test_what_is_written_is_read_again(tmp_path):
    file = tmp_path / "hpa.yaml"
    for spec in (Spec(2, 10), Spec(3, 7, SCALE_UP, Rules((Policy("Pods", 1, 60), Policy("Percent", 9, 30)), 0, "Min"))):
        file.write_text("kind: Service\n---\n" + manifest(spec, 2.5, ["from a test"]))
        assert read_spec(file) == spec


def test_what_is_deployed_by_hand():
    up, down = Rules((Policy("Percent", 100, 60),), 0), Rules((Policy("Pods", 1, 120),), 600)
    assert read_spec(DEPLOYED) == Spec(2, 10, up, down)


def text_of(**spec):
    return yaml.safe_dump({"kind": "HorizontalPodAutoscaler", "spec": spec})


def test_what_a_manifest_does_not_say_is_the_default(tmp_path):
    file = tmp_path / "hpa.yaml"
    file.write_text(text_of(maxReplicas=4))
    assert read_spec(file) == Spec(1, 4)
    file.write_text(text_of(maxReplicas=4, behavior={"scaleDown": {"selectPolicy": "Disabled", "tolerance": "0.2"}}))
    assert read_spec(file) == Spec(1, 4, SCALE_UP, Rules(SCALE_DOWN.policies, 300, "Disabled", 0.2))
    file.write_text(text_of(maxReplicas=4, behavior={"scaleUp": {"stabilizationWindowSeconds": 60}}))
    assert read_spec(file) == Spec(1, 4, Rules(SCALE_UP.policies, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: Service", "has no HorizontalPodAutoscaler"),
        ("a: [", "cannot read"),
        (text_of(minReplicas=2), "has no maxReplicas"),
        (text_of(minReplicas=5, maxReplicas=4), "none that Kubernetes takes: 5 to 4 replicas"),
        (text_of(maxReplicas=4, behavior={"scaleUp": {"policies": [{"type": "Pods"}]}}), "has no value"),
        (text_of(maxReplicas="many"), "none that Kubernetes takes"),
        (text_of(maxReplicas=4, behavior=["scaleUp"]), "none that Kubernetes takes"),
    ],
)
def test_a_manifest_that_cannot_be_simulated_is_one_line(tmp_path, text, message):
    (tmp_path / "hpa.yaml").write_text(text)
    with pytest.raises(CannotRun, match=message) as error:
        read_spec(tmp_path / "hpa.yaml")
    assert "\n" not in str(error.value)
