"""Rules, alerts, dashboard and runbook are right by promtool, and about series that live server and gateway have."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import requests
import yaml

from ch16.parts.load_balancer.dashboard import NAMES, parse
from common.metrics import histogram_quantile
from common.results import READMES
from common.server import ServerProcess
from common.standin import standin_command
from tests.servers import ROOT

K8S = ROOT / "k8s"
MONITORING = K8S / "monitoring"
PROMETHEUS, PROMTOOL, KUBECTL = map(shutil.which, ("prometheus", "promtool", "kubectl"))
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
# Series of exporters that are not ours and run only where there are GPUs.
FOREIGN = {"DCGM_FI_DEV_GPU_UTIL"}

RULES = [
    rule
    for name in ("rules.yml", "alerts.yml")
    for group in yaml.safe_load((MONITORING / name).read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())


# ---- what the files ask for ----

TOKEN = re.compile(
    r'"(?:[^"\\]|\\.)*"'  # a string that is no matcher: skipped
    r'|(?<![\w:.])([a-zA-Z_:][\w:]*+)(?!\s*\()(\s*\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?'
)
KEYWORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


def selectors(expression):
    """The series a PromQL expression reads, as name{matchers}."""
    expression = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", expression)
    found = ((name, matchers.strip()) for name, matchers in TOKEN.findall(expression))
    return {name + matchers for name, matchers in found if name and name.lower() not in KEYWORDS}


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("up", {"up"}),
        ("sum by (job, le) (rate(a:b_c[5m])) / 2e3", {"a:b_c"}),
        ('count without (x) (a) * on(x) group_left(y) b{c="d", e=~"}("}[10m] offset 5m', {"a", 'b{c="d", e=~"}("}'}),
        ('histogram_quantile(0.99, sum(rate(a_bucket{b="c"}[5m])) by (le)) > bool 1', {'a_bucket{b="c"}'}),
        ("a{} and absent(b) == 1 or vector(Inf) unless scalar(c)", {"a{}", "b", "c"}),
        ('label_replace(a, "x", "$1", "y", "(z)")', {"a"}),
    ],
)
def test_selectors(expression, found):
    assert selectors(expression) == found


def expressions(content):
    """All PromQL in a manifest: rules, panels, KEDA triggers, adapter rules; a metric named by an HPA, too."""
    if isinstance(content, list):
        for item in content:
            yield from expressions(item)
    elif isinstance(content, dict):
        for key, value in content.items():
            if isinstance(value, str) and (
                key in ("expr", "seriesQuery", "metricsQuery") or (key == "query" and "serverAddress" in content)
            ):
                yield re.sub(r"<<.*?>>", "", value.replace("<<.Series>>", "up").replace("<<.GroupBy>>", "job"))
            elif key == "metric" and isinstance(value, dict) and "name" in value:
                yield value["name"]
            elif isinstance(value, str) and "\n" in value and re.search(r"^\w+:$", value, re.MULTILINE):
                yield from expressions(yaml.safe_load(value))  # a file inside a ConfigMap
            else:
                yield from expressions(value)


def manifests():
    for path in sorted(K8S.rglob("*.y*ml")) + sorted(K8S.rglob("*.json")):
        for document in yaml.safe_load_all(path.read_text()):  # JSON is YAML, too
            yield path.relative_to(ROOT), document


USED = {(str(path), expression) for path, document in manifests() for expression in expressions(document)}


def words():
    """Names of series in the inline code of the documents, without their labels."""
    for path in (*READMES, *sorted(K8S.rglob("*.md"))):
        for code in re.findall(r"`([^`\n]+)`", path.read_text()):
            for name in re.findall(r"(?<![\w/.-])(?:vllm:|inference_|gateway_|DCGM_)\w+(?![\w.*/])", code):
                yield str(path.relative_to(ROOT)), name


def test_the_manifests_are_read():
    assert {"k8s/monitoring/rules.yml", "k8s/monitoring/alerts.yml", "k8s/monitoring/dashboard.json"} <= {
        path for path, _ in USED
    }
    assert len(USED) >= len(RULES) + len(DASHBOARD["panels"])
    adapter = "rules:\n- seriesQuery: a{b!=''}\n  metricsQuery: sum(<<.Series>>{<<.Matchers>>}) by (<<.GroupBy>>)\n"
    assert [selectors(e) for e in expressions({"data": {"config.yaml": adapter}})] == [{"a{b!=''}"}, {"up{}"}]
    hpa = {"metrics": [{"pods": {"metric": {"name": "inference_active_requests"}}}]}
    keda = {"triggers": [{"metadata": {"serverAddress": "http://p", "query": "sum(a)"}}]}
    assert [*expressions(hpa), *expressions(keda)] == ["inference_active_requests", "sum(a)"]


# ---- rules and alerts, by promtool ----


def promtool(*words):
    return subprocess.run([PROMTOOL, *words], capture_output=True, text=True, cwd=MONITORING, check=False)


@needs_promtool
def test_promtool_accepts_the_rules_and_configurations(tmp_path):
    assert promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml", "alerts.yml").returncode == 0
    assert promtool("check", "config", "laptop.yml").returncode == 0
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    for job in config["scrape_configs"]:
        del job["kubernetes_sd_configs"]  # Debian's Prometheus is built without
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    done = promtool("check", "config", str(tmp_path / "prometheus.yml"))
    assert done.returncode == 0, done.stderr


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then():
    done = promtool("test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_both_ways():
    cases = [
        (case["alertname"], bool(case["exp_alerts"]))
        for test in yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    assert set(cases) == {(alert, fires) for alert in ALERTS for fires in (True, False)}


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_chapter_in_the_runbook(alert):
    rule = ALERTS[alert]
    runbook = (MONITORING / "RUNBOOK.md").read_text()
    assert rule["annotations"]["runbook"] == f"RUNBOOK.md#{alert.lower()}"
    chapter = re.search(rf"^## {alert}\n+\*\*(\w+)\.\*\*(.*?)(?=^## |\Z)", runbook, re.MULTILINE | re.DOTALL)
    assert chapter and chapter[1] == rule["labels"]["severity"] and "\n- " in chapter[2]


def test_the_runbook_names_nothing_that_is_not_there():
    runbook = (MONITORING / "RUNBOOK.md").read_text()
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", runbook, re.MULTILINE)}
    assert headings == {alert.lower() for alert in ALERTS}
    for target in re.findall(r"\]\(([^)]+)\)", runbook):
        path, _, anchor = target.partition("#")
        assert (MONITORING / path).exists() and (not anchor or anchor in headings)


# ---- Grafana and Kubernetes ----


def test_panels_have_their_own_places():
    taken = [
        (place["x"] + dx, place["y"] + dy)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for dx in range(place["w"])
        for dy in range(place["h"])
    ]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
def test_kustomize_mounts_what_was_tested():
    built = subprocess.run([KUBECTL, "kustomize", str(MONITORING)], capture_output=True, text=True, check=True).stdout
    objects = {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all(built)}
    pod = objects["Deployment", "prometheus"]["spec"]["template"]["spec"]
    config = objects["ConfigMap", pod["volumes"][0]["configMap"]["name"]]
    assert config["data"] == {
        name: (MONITORING / name).read_text() for name in ("prometheus.yml", "rules.yml", "alerts.yml")
    }
    grafana = objects["ConfigMap", "inference-dashboard"]
    assert grafana["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(grafana["data"]["dashboard.json"]) == DASHBOARD
    assert objects["ClusterRoleBinding", "inference-prometheus"]["subjects"][0]["name"] == pod["serviceAccountName"]


def test_prometheus_finds_the_pods_there_are():
    """Each job of ours keeps an app label and a port name, and names pods and namespaces as the autoscaler asks."""
    jobs = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    laptop = yaml.safe_load((MONITORING / "laptop.yml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in jobs] == [job["job_name"] for job in laptop] + ["dcgm"]
    templates = {
        document["metadata"]["name"]: document["spec"]["template"]
        for path, document in manifests()
        if path.is_relative_to("k8s/base") and document.get("kind") == "Deployment"
    }
    namespace = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())["namespace"]
    for job in jobs[:-1]:
        template = templates[job["job_name"]]
        ports = [port["name"] for container in template["spec"]["containers"] for port in container["ports"]]
        keep = job["relabel_configs"][0]
        assert job["kubernetes_sd_configs"][0]["namespaces"]["names"] == [namespace] and keep["action"] == "keep"
        assert keep["regex"] in [f"{template['metadata']['labels']['app.kubernetes.io/name']};{port}" for port in ports]
        assert {rule.get("target_label") for rule in job["relabel_configs"][1:]} == {"namespace", "pod"}


# ---- the contract: what is asked for exists on the live server and gateway ----


class Prometheus(ServerProcess):
    """The real one, on a free port."""

    def __init__(self, folder, config):
        super().__init__((), folder)
        self._command = [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
        self._command.append(f"--web.listen-address={self.address}")

    def wait_ready(self, path="/-/ready", **kwargs):
        return super().wait_ready(path, **kwargs)

    def ask(self, path, **parameters):
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def missing(self, expression):
        """Selectors of an expression that match no series, scraped or recorded."""
        return {
            selector
            for selector in selectors(expression)
            if selector.partition("{")[0] not in FOREIGN and not self.ask("series", **{"match[]": selector})
        }


@pytest.fixture(scope="module")
def gateway(server, tmp_path_factory):
    command = [sys.executable, str(ROOT / "ch16" / "load_balancer.py"), "--servers", server.address]
    with ServerProcess(command, tmp_path_factory.mktemp("gateway")) as gateway:
        body = {"prompt": "Once upon a time", "max_tokens": 4}
        assert requests.post(gateway.url + "/generate", json=body, timeout=60).status_code == 200
        yield gateway


@pytest.fixture(scope="module")
def prometheus(server, gateway, tmp_path_factory):
    """laptop.yml with other ports, and a second instead of five."""
    if PROMETHEUS is None:
        pytest.skip("prometheus is not installed")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "laptop.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    for job in config["scrape_configs"]:
        address = {"inference-server": server, "inference-gateway": gateway}[job["job_name"]].address
        labels = {"namespace": "inference", "pod": job["job_name"]}  # as relabelled in prometheus.yml
        job["static_configs"] = [{"targets": [address], "labels": labels}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with Prometheus(folder, folder / "prometheus.yml") as prometheus:
        recorded = {rule["record"] for rule in RULES if "record" in rule}
        deadline = time.monotonic() + 20
        while not recorded <= set(prometheus.ask("label/__name__/values")) and time.monotonic() < deadline:
            time.sleep(0.25)
        yield prometheus


@pytest.mark.slow
def test_prometheus_scrapes_server_and_gateway(prometheus):
    targets = prometheus.ask("targets")["activeTargets"]
    health = {target["labels"]["job"]: target["health"] for target in targets}
    assert health == {"inference-server": "up", "inference-gateway": "up"}
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(RULES)
    assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}
    assert not [rule["name"] for rule in rules if rule.get("state") == "firing"]


@pytest.mark.slow
def test_every_series_that_is_asked_for_exists(prometheus):
    for where, expression in sorted(USED):
        assert "__name__" not in expression, "selectors() does not see a name in a matcher"
        formatted = prometheus.ask("format_query", query=expression)  # Prometheus' own parser takes it
        assert len(selectors(formatted)) == len(selectors(expression))
        assert selectors(expression) or expression.startswith("vector(")  # an objective
        assert prometheus.missing(expression) == set(), where


@pytest.mark.slow
def test_a_renamed_series_is_noticed(prometheus):
    """Each name, renamed as vLLM has renamed some, is the one that is missing."""
    for rule in RULES:
        for selector in selectors(rule["expr"]):
            name = selector.partition("{")[0]
            renamed = re.sub(rf"(?<![\w:]){re.escape(name)}(?![\w:])", f"{name}_now", rule["expr"])
            assert {s.partition("{")[0] for s in prometheus.missing(renamed)} == {f"{name}_now"}
    assert prometheus.missing("max(vllm:gpu_cache_usage_perc) > 1") == {"vllm:gpu_cache_usage_perc"}
    assert prometheus.missing('rate(gateway_requests_total{outcome="failed"}[5m])')  # a label that is never set


@pytest.mark.slow
def test_every_series_in_the_documents_exists(prometheus):
    known = set(prometheus.ask("label/__name__/values")) | FOREIGN
    named = set(words())
    assert named
    for where, name in named:
        assert known & {name, f"{name}_total", f"{name}_bucket"}, f"{where} names {name}"


@pytest.mark.slow
def test_the_stand_in_exports_what_the_server_does(prometheus, tmp_path):
    known = set(prometheus.ask("label/__name__/values", **{"match[]": '{job="inference-server"}'}))
    with ServerProcess(standin_command(), tmp_path) as standin:
        lines = requests.get(standin.url + "/metrics", timeout=10).text.splitlines()
    names = {re.match(r"[\w:]+", line)[0] for line in lines if not line.startswith("#")}
    assert len(names) > 20 and names <= known


@pytest.mark.slow
def test_the_dashboard_computes_what_prometheus_does(server, prometheus):
    name = "vllm:time_to_first_token_seconds_bucket"
    reading = parse(requests.get(server.url + "/metrics", timeout=10).text)
    buckets = [(bound, count) for (series, bound), count in reading.counters.items() if series == name]
    time.sleep(1.1)  # scraped once more, in case another test has sent requests just before
    for q in (0.5, 0.99):
        (result,) = prometheus.ask("query", query=f"histogram_quantile({q}, {name})")["result"]
        assert histogram_quantile(q, buckets) == pytest.approx(float(result["value"][1]))
    assert set(reading.gauges) | {series for series, _ in reading.counters} == set(NAMES)


@pytest.mark.slow
def test_the_gateway_reads_the_real_server(gateway, server):
    data = requests.get(gateway.url + "/dashboard/data", timeout=10).json()
    (shown,) = data["servers"]
    assert shown["name"] == server.address and shown["answers"] and shown["running"] is not None
