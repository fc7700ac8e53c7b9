"""The documentation is whole: links resolve, every claim has its section and script, every name of the book exists."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from ch16.parts.report.gather import CHAPTER
from common.metrics import InferenceMetrics
from common.results import CLAIMS

ROOT = Path(__file__).resolve().parent.parent
CODE = [file for folder in ("ch16", "common") for file in sorted((ROOT / folder).rglob("*.py"))]
FOLDERS = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
PAGES = sorted([*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in folder.rglob("*.md"))])
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
CHAPTER_TEXT = (ROOT / "ch16" / "README.md").read_text()

# The functions, classes and methods of the book's code.
NAMES = (
    "FP8TransformerBlock",
    "SyntheticMoELayer",
    "profile_inference",
    "CacheMonitor",
    "CacheMonitor.record_allocation",
    "CacheMonitor.record_free",
    "CacheMonitor.record_hit",
    "CacheMonitor.record_miss",
    "CacheMonitor.record_eviction",
    "CacheMonitor.get_hit_rate",
    "CacheMonitor.print_stats",
    "PrioritizedRequest",
    "InferenceScheduler",
    "InferenceScheduler.add_request",
    "InferenceScheduler.get_next_batch",
    "LoadBalancer",
    "LoadBalancer.get_server",
    "InferenceMetrics.process_request",
)
# The Kubernetes objects of its manifests.
OBJECTS = (("HorizontalPodAutoscaler", "inference-hpa"), ("Deployment", "inference-server"))


def test_every_block_of_code_ends():
    for file in PAGES:
        assert len(re.findall(r"^```", file.read_text(), re.MULTILINE)) % 2 == 0, file.name


def prose(file):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(file):
    """Of each heading as GitHub makes them: repeated ones are numbered."""
    seen = Counter()
    for heading in re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE):
        name = re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        yield f"{name}-{seen[name]}" if seen[name] else name
        seen[name] += 1


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_and_anchors_resolve(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists() and linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target


def sections():
    """The chapter's sections, each from its heading to the next."""
    return re.split(r"^## ", CHAPTER_TEXT, flags=re.MULTILINE)[1:]


def test_every_claim_has_a_verdict_in_a_section_with_the_command_that_measures_it():
    found = {
        claim
        for section in sections()
        for script, claims in CHAPTER.items()
        for claim in claims
        if f"python3 ch16/{script}.py" in section and re.search(rf"^\| {claim} \|", section, re.MULTILINE)
    }
    assert found == set(CLAIMS)


def test_every_script_is_in_the_table():
    table = re.findall(r"^\| \[\w+\.py\]\(ch16/(\w+)\.py\) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(CHAPTER)


def test_every_script_shows_its_picture():
    for line in re.findall(r"^\| \[\w+\.py\]\(ch16/\w+\.py\) \|.*$", (ROOT / "README.md").read_text(), re.MULTILINE):
        (script,) = re.findall(r"\(ch16/(\w+)\.py\)", line)
        (shown,), (linked,) = re.findall(r'src="([^"]+)"', line), re.findall(r"\]\((results/\S+)\)", line)
        assert shown == linked and Path(shown).stem == script, line
        assert (ROOT / shown).read_bytes().startswith(b"\x89PNG"), shown


def test_every_script_is_in_the_report():
    scripts = {file.stem for file in (ROOT / "ch16").glob("*.py")} - {"report"}
    assert scripts == set(CHAPTER)


def defined():
    """Classes, functions and methods of the code."""
    for file in CODE:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef | FUNCTIONS):
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, FUNCTIONS))


def test_every_name_of_the_book_exists():
    assert set(NAMES) <= set(defined())


def test_the_metrics_of_the_book_are_exported():
    registry = CollectorRegistry()
    InferenceMetrics(registry)
    exported = set(re.findall(r"^# TYPE (\S+) (\S+)$", generate_latest(registry).decode(), re.MULTILINE))
    assert {
        ("inference_requests_total", "counter"),
        ("inference_latency_seconds", "histogram"),
        ("inference_active_requests", "gauge"),
        ("inference_throughput_tokens_per_sec", "gauge"),
    } <= exported


def test_workflows_and_hooks_run_what_exists():
    """Each `make TARGET` of the workflows is a target, each file is YAML, and the citation names the book."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    files = [*ROOT.glob(".github/workflows/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    named = {target for file in files for target in re.findall(r"run: make ([a-z-]+)", file.read_text())}
    assert {"lint", "test", "test-quick"} <= named <= targets
    *_, hooks, citation = (yaml.safe_load(file.read_text()) for file in files)
    assert {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]} == {"ruff-check", "ruff-format", "tables"}
    assert citation["license"] == "Apache-2.0" and citation["references"][0]["type"] == "book"


def test_the_objects_of_the_book_are_in_the_manifests():
    documents = [one for file in ROOT.glob("k8s/**/*.yaml") for one in yaml.safe_load_all(file.read_text())]
    objects = [one for one in documents if isinstance(one, dict) and {"kind", "metadata"} <= one.keys()]
    found = {(one["kind"], one["metadata"]["name"]) for one in objects}
    assert set(OBJECTS) <= found
