"""The rules and alerts of k8s/monitoring as the object that the Prometheus operator takes.

Kustomize cannot put the content of a file into an object, so they stand in files twice. A test fails when the two
differ; `python3 -m tests.k8s.prometheus_rule` makes the second anew.
"""

import textwrap

from tests.k8s.manifests import K8S

SOURCES = ("rules.yml", "alerts.yml")
FILE = K8S / "components" / "prometheus-operator" / "prometheus-rule.yaml"
HEAD = """\
# Made of rules.yml and alerts.yml in k8s/monitoring by `python3 -m tests.k8s.prometheus_rule`: change those, not this.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: inference
  namespace: inference
spec:
  groups:
"""


def prometheus_rule() -> str:
    """The manifest, with the groups of both files as they stand there."""
    texts = [(K8S / "monitoring" / name).read_text().partition("groups:\n")[2] for name in SOURCES]
    return HEAD + "\n".join(textwrap.indent(text, "  ") for text in texts)


if __name__ == "__main__":
    FILE.write_text(prometheus_rule())
    print(f"written: {FILE}")
