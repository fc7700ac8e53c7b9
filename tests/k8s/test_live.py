"""What the manifests say about the programs, asked of the programs: flags, probes, metrics, who asks whom for what."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from common.gpu import detect
from common.server import ServerProcess, free_port
from common.standin import standin_command
from tests.k8s.manifests import K8S, KUBECTL, MULTI_NODE, OVERLAYS, PROMTOOL, build, name, of, workloads
from tests.servers import ROOT

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed (make install brings it)")

ROUTER = Path(sys.executable).with_name("vllm-router")
ADAPTER = yaml.safe_load((K8S / "components" / "prometheus-adapter" / "config.yaml").read_text())
VLLM_PARSES = """
import json, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.entrypoints.launchers.cli_args import make_arg_parser
parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
print(json.dumps([vars(parser.parse_args(words)) for words in json.loads(sys.argv[1])], default=str))
"""


def pod(overlay, deployment):
    """One of an overlay."""
    return next(w for w in workloads(build(f"overlays/{overlay}")) if w.name == f"Deployment/{deployment}")


def program(words):
    """The program of a command as it is started here, and the rest of the command."""
    if words[0] == "vllm-router":
        return [str(ROUTER)], words[1:]
    assert words[0] == "python3" and (ROOT / words[1]).is_file()
    return [sys.executable, str(ROOT / words[1])], words[2:]


# ---- flags ----


@pytest.mark.parametrize(
    ("overlay", "deployment"),
    [("cpu", "inference-server"), ("cpu", "inference-gateway"), ("vllm-router", "inference-gateway")],
)
def test_flags_exist(overlay, deployment):
    start, rest = program(pod(overlay, deployment).command)
    page = subprocess.run([*start, "--help"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page))
    assert "--made-up" not in known
    assert {word for word in rest if word.startswith("--")} <= known


def test_commands_are_the_same_in_all_overlays():
    """So that what is tried of one holds for all."""
    for deployment, overlays in (("inference-server", OVERLAYS), ("inference-gateway", OVERLAYS[:3])):
        containers = [pod(overlay, deployment).container for overlay in overlays]
        assert len({(*container["command"], *container["args"]) for container in containers}) == 1


@pytest.mark.slow
def test_flags_of_several_nodes():
    """vLLM's own parser takes them, with what LeaderWorkerSet fills in."""
    filled = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_WORKER_INDEX)": "1", "$(LWS_LEADER_ADDRESS)": "inference-large-0"}
    commands = [workload.command for workload in workloads(build(MULTI_NODE))]
    assert all(command[:2] == ["vllm", "serve"] for command in commands)
    words = json.dumps([[filled.get(word, word) for word in command[2:]] for command in commands])
    done = subprocess.run([sys.executable, "-c", VLLM_PARSES, words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    leader, worker = json.loads(done.stdout.splitlines()[-1])
    assert worker["headless"] and not leader["headless"]
    same = ("model_tag", "tensor_parallel_size", "pipeline_parallel_size", "nnodes", "master_addr", "max_model_len")
    assert [leader[key] for key in same] == [worker[key] for key in same]
    assert leader["tensor_parallel_size"] * leader["pipeline_parallel_size"] == 8 * leader["nnodes"]


# ---- probes and metrics ----


def probes_answer(workload, url, control="/made-up"):
    """Every probe gets its 200 from a process that is well."""
    for kind, probe in workload.probes.items():
        assert requests.get(url + probe["httpGet"]["path"], timeout=10).status_code == 200, kind
    if control:
        assert requests.get(url + control, timeout=10).status_code == 404


@pytest.mark.slow
def test_probes_and_metrics_of_the_server(server):
    probes_answer(pod("single-gpu", "inference-server"), server.url)
    (monitor, _) = of(build("overlays/single-gpu", "prometheus-operator"), "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    page = requests.get(server.url + endpoint["path"], timeout=10).text
    kinds = {family.name: family.type for family in text_string_to_metric_families(page)}
    (hpa,) = of(build("base"), "HorizontalPodAutoscaler")
    (metric,) = hpa["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in [adapters_name(series) for series in kinds]
    assert kinds[metric["pods"]["metric"]["name"]] == "gauge"


@pytest.mark.slow
def test_probes_and_metrics_of_the_gateway(tmp_path):
    workload = pod("single-gpu", "inference-gateway")
    start, rest = program(workload.command)
    with ServerProcess(standin_command(), tmp_path) as server:
        flags = [word for word in rest if word not in ("--host", "0.0.0.0", "--port", "9000")]
        flags[flags.index("--discover") + 1] = server.address
        keys = {e["name"]: "secret" for e in workload.container["env"] if "valueFrom" in e}
        with ServerProcess([*start, *flags], tmp_path, keys) as gateway:
            probes_answer(workload, gateway.url, control=None)
            (_, monitor) = of(build("overlays/single-gpu", "prometheus-operator"), "ServiceMonitor")
            (endpoint,) = monitor["spec"]["endpoints"]
            assert "gateway_requests_total" in requests.get(gateway.url + endpoint["path"], timeout=10).text
            ask = {"prompt": "hi", "max_tokens": 2}
            assert requests.post(gateway.url + "/generate", json=ask, timeout=10).status_code == 401
            key = {"authorization": "Bearer secret"}
            assert requests.post(gateway.url + "/generate", json=ask, headers=key, timeout=10).status_code == 200
            server.stop()
            gateway.wait_ready("/health")
            assert requests.get(gateway.url + workload.probes["liveness"]["httpGet"]["path"], timeout=10).ok


# ---- vllm-router asks Kubernetes for pods ----


@pytest.fixture
def api_server(tmp_path):
    """As much of Kubernetes' API as the router asks for: a list of pods, and a watch on which nothing happens. Yields
    the paths that were asked for, and a kubeconfig."""
    asked, stop = [], threading.Event()
    labels = pod("vllm-router", "inference-server").labels
    ready = {"conditions": [{"type": "Ready", "status": "True"}]}
    pods = [
        {
            "metadata": {"name": who, "namespace": "inference", "uid": who, "labels": has},
            "spec": {"containers": []},
            "status": {"phase": "Running", "podIP": ip, **ready},
        }
        for who, has, ip in (("server", labels, "127.0.0.1"), ("other", {"app": "other"}, "127.0.0.9"))
    ]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            if "watch" in parse_qs(urlsplit(self.path).query):
                stop.wait(60)
            else:
                answer = {"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": pods}
                self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{listener.server_port}"}}],
        "users": [{"name": "router", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "router"}}],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    yield asked, str(tmp_path / "config.yaml")
    stop.set()
    listener.shutdown()
    listener.server_close()


def router_before(server, folder, kubeconfig):
    """vllm-router with the flags of its overlay, but for addresses, and servers at the port of `server`."""
    start, rest = program(pod("vllm-router", "inference-gateway").command)
    here = {"0.0.0.0": "127.0.0.1", "29000": str(free_port()), "8000": str(server.port), "9000": None}
    flags = [here.get(word, word) for word in rest if word not in ("--port", "9000")]
    return ServerProcess([*start, *flags], folder, {"KUBECONFIG": kubeconfig})


@pytest.mark.slow
def test_the_router_finds_the_servers_as_its_role_allows(tmp_path, api_server):
    asked, kubeconfig = api_server
    workload = pod("vllm-router", "inference-gateway")
    with ServerProcess(standin_command(), tmp_path) as server:
        router = router_before(server, tmp_path, kubeconfig).start()
        try:
            router.wait_ready(workload.probes["readiness"]["httpGet"]["path"])
            probes_answer(workload, router.url, control=None)
            body = {"model": "simulated", "prompt": "hi", "max_tokens": 2}
            assert requests.post(router.url + "/v1/completions", json=body, timeout=10).json()["usage"]
            assert requests.get(f"{router.url}/list_workers", timeout=10).json()["urls"] == [server.url]
        finally:
            router.stop()
    (role,) = of(build("overlays/vllm-router"), "Role")
    (rule,) = role["rules"]
    verbs = {"watch" if "watch" in parse_qs(urlsplit(path).query) else "list" for path in asked}
    assert verbs <= set(rule["verbs"]) and rule["resources"] == ["pods"]
    assert {urlsplit(path).path for path in asked} == {f"/api/v1/namespaces/{role['metadata']['namespace']}/pods"}


@pytest.mark.slow
def test_the_router_before_the_real_server(tmp_path, api_server, server):
    with_key = {"model": server_model(server), "prompt": "hi", "max_tokens": 2}
    router = router_before(server, tmp_path, api_server[1]).start()
    try:
        router.wait_ready("/readiness")
        answer = requests.post(router.url + "/v1/completions", json=with_key, timeout=30)
        assert answer.status_code == 200, answer.text
    finally:
        router.stop()


def server_model(server):
    """What it calls its model."""
    return requests.get(server.url + "/v1/models", timeout=10).json()["data"][0]["id"]


# ---- the metric's way from a series to the autoscaler ----


def adapters_name(series):
    """What prometheus-adapter would call a series; None if its rules do not take it."""
    for rule in ADAPTER["rules"]:
        if series == re.match(r"\w+", rule["seriesQuery"])[0] and re.search(rule["name"]["matches"], series):
            return rule["name"]["as"]
    return None


def test_the_adapters_rule_takes_the_servers_series():
    assert adapters_name("inference_active_requests") == "inference_active_requests"
    assert adapters_name("inference_requests_total") is None
    (generated,) = of(build("overlays/single-gpu", "prometheus-adapter"), "ConfigMap")
    assert yaml.safe_load(generated["data"]["config.yaml"]) == ADAPTER
    assert (name(generated), generated["metadata"]["namespace"]) == ("ConfigMap/inference-adapter-rules", "monitoring")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_what_prometheus_answers(tmp_path):
    """The adapter's question is answered for each pod, KEDA's with the sum over the servers and nobody else."""
    (rule,) = ADAPTER["rules"]
    adapter = rule["metricsQuery"]
    for mark, text in (
        ("<<.Series>>", re.match(r"\w+", rule["seriesQuery"])[0]),
        ("<<.LabelMatchers>>", 'namespace="inference",pod=~"server-a|server-b"'),
        ("<<.GroupBy>>", "pod"),
    ):
        assert mark in adapter
        adapter = adapter.replace(mark, text)
    (scaled,) = of(build("overlays/single-gpu", "keda"), "ScaledObject")
    keda = scaled["spec"]["triggers"][0]["metadata"]["query"]
    series = {
        'namespace="inference",job="inference-server",pod="server-a"': "70 70",
        'namespace="inference",job="inference-server",pod="server-b"': "30 30",
        'namespace="inference",job="inference-gateway",pod="gateway-a"': "500 500",
        'namespace="other",job="inference-server",pod="server-a"': "500 500",
    }
    samples = {
        adapter: [{"labels": '{pod="server-a"}', "value": 70}, {"labels": '{pod="server-b"}', "value": 30}],
        keda: [{"labels": "{}", "value": 100}],
        rule["seriesQuery"]: [
            {"labels": f"inference_active_requests{{{labels}}}", "value": float(values.split()[0])}
            for labels, values in series.items()
        ],
    }
    content = {
        "rule_files": [],
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": f"inference_active_requests{{{labels}}}", "values": values}
                    for labels, values in series.items()
                ],
                "promql_expr_test": [
                    {"expr": expr, "eval_time": "15s", "exp_samples": expected} for expr, expected in samples.items()
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [PROMTOOL, "test", "rules", str(tmp_path / "test.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the image ----


def test_the_image_is_made_of_what_is_there():
    """No Docker here: what can be read off. The stage's user is the manifests', and may be none that they forbid."""
    text = (K8S / "Dockerfile").read_text()
    ignored = (K8S / "Dockerfile.dockerignore").read_text().splitlines()
    for source in re.findall(r"^COPY (\S+) \S+$", text, re.MULTILINE):
        assert (ROOT / source).exists() and f"!{source}" in ignored
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    (made,) = re.findall(r"useradd --uid (\d+)", text)
    for overlay in OVERLAYS:
        for workload in workloads(build(f"overlays/{overlay}")):
            assert str(workload.spec["securityContext"]["runAsUser"]) == user == made
    command = json.loads(re.search(r"^CMD (\[.*\])$", text, re.MULTILINE)[1])
    assert program(command)
    built = {tag for tag in re.findall(r"docker build .* -t (\S+) \.", text)}
    used = {w.container["image"] for overlay in OVERLAYS for w in workloads(build(f"overlays/{overlay}"))}
    assert used == built == set(re.findall(r"docker build .* -t (\S+) \.", (K8S / "README.md").read_text()))
    for stack in re.findall(r"STACK=(\w+)", text):
        assert f"AS base-{stack}" in text


@pytest.mark.skipif(detect().device == "cuda", reason="the stack of the CPU image")
def test_the_router_is_in_the_image_of_the_gateway():
    assert os.access(ROUTER, os.X_OK)
