"""The manifests as kubectl would apply them, and small questions about them."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.servers import ROOT

K8S = ROOT / "k8s"
OVERLAYS = ("single-gpu", "eight-gpu", "cpu", "vllm-router")
COMPONENTS = ("keda", "prometheus-operator", "prometheus-adapter")
MULTI_NODE = "examples/multi-node"

# That of the virtual environment before another one.
KUBECTL = shutil.which("kubectl", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
PROMTOOL = shutil.which("promtool")


@functools.cache
def build(folder: str, *components: str) -> tuple[dict, ...]:
    """The objects of a kustomization below k8s/, with components added to it. Do not change them."""
    path = K8S / folder
    with tempfile.TemporaryDirectory() as temporary:
        if components:  # as a user's own overlay would name them
            here = os.path.relpath(K8S, Path(temporary).resolve())
            content = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [f"{here}/{folder}"],
                "components": [f"{here}/components/{component}" for component in components],
            }
            path = Path(temporary)
            (path / "kustomization.yaml").write_text(yaml.safe_dump(content))
        done = subprocess.run([KUBECTL, "kustomize", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"warnings: {done.stderr}"  # of fields that are deprecated
    return tuple(yaml.safe_load_all(done.stdout))


def of(objects: tuple[dict, ...], *kinds: str) -> list[dict]:
    """Those of some kinds."""
    return [item for item in objects if item["kind"] in kinds]


def name(item: Mapping) -> str:
    """kind/name."""
    return f"{item['kind']}/{item['metadata']['name']}"


@dataclass(frozen=True)
class Workload:
    """A pod template, and what makes pods of it."""

    name: str
    owner: dict
    template: dict

    @property
    def spec(self) -> dict:
        """Of its pods."""
        return self.template["spec"]

    @property
    def labels(self) -> dict:
        """Of its pods."""
        return self.template["metadata"]["labels"]

    @property
    def container(self) -> dict:
        """The only one: nothing here has a sidecar."""
        (container,) = self.spec["containers"]
        return container

    @property
    def command(self) -> list[str]:
        """Command and arguments, with $(VARIABLES) that have a value in the manifest filled in."""
        values = {e["name"]: e["value"] for e in self.container.get("env", ()) if "value" in e}
        words = [*self.container["command"], *self.container.get("args", ())]
        return [re.sub(r"\$\((\w+)\)", lambda match: values.get(match[1], match[0]), word) for word in words]

    def flag(self, flag: str) -> str | None:
        """What follows a flag in the command."""
        return self.command[self.command.index(flag) + 1] if flag in self.command else None

    @property
    def ports(self) -> dict[str, int]:
        """Name to number."""
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", ())}

    @property
    def probes(self) -> dict[str, dict]:
        """`startup`, `readiness`, `liveness`."""
        found = {kind: self.container.get(f"{kind}Probe") for kind in ("startup", "readiness", "liveness")}
        return {kind: probe for kind, probe in found.items() if probe}

    @property
    def gpus(self) -> int:
        """It asks for."""
        return int(self.container["resources"]["requests"].get("nvidia.com/gpu", 0))


def workloads(objects: tuple[dict, ...]) -> Iterator[Workload]:
    """Everything that makes pods."""
    for item in objects:
        if item["kind"] == "Deployment":
            yield Workload(name(item), item, item["spec"]["template"])
        elif item["kind"] == "LeaderWorkerSet":
            for part in ("leaderTemplate", "workerTemplate"):
                yield Workload(f"{name(item)} {part}", item, item["spec"]["leaderWorkerTemplate"][part])


def matches(selector: Mapping, labels: Mapping) -> bool:
    """Whether a label selector takes these labels; an empty one takes all."""
    assert selector.keys() <= {"matchLabels"}, "nothing here uses expressions"
    return selector.get("matchLabels", {}).items() <= labels.items()


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text)).groups()
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def secrets_of_the_readme() -> dict[str, set[str]]:
    """The Secrets that k8s/README.md has people make, with their keys."""
    text = (K8S / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"kubectl create secret generic (\S+)(.*)", text)
    return {secret: set(re.findall(r"--from-literal=([\w-]+)=", rest)) for secret, rest in commands}
