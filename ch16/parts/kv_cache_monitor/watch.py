"""A live view of the KV cache of any running vLLM server, from its /metrics."""

import shutil
import sys
import time
from collections.abc import Mapping

import requests
from prometheus_client.parser import text_string_to_metric_families

from common.cli import CannotRun, first_line

NAMES = {
    "usage": "vllm:kv_cache_usage_perc",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "queries": "vllm:prefix_cache_queries_total",
    "hits": "vllm:prefix_cache_hits_total",
    "preemptions": "vllm:num_preemptions_total",
}


def read_metrics(url: str) -> dict[str, float]:
    """The server's figures by the keys of NAMES, summed over engines (usage: their mean). CannotRun: no vLLM server."""
    try:
        answer = requests.get(f"{url.rstrip('/')}/metrics", timeout=5)
        answer.raise_for_status()
        families = list(text_string_to_metric_families(answer.text))
    except (requests.RequestException, ValueError) as error:
        raise CannotRun(f"no metrics from {url}: {first_line(error)}") from None
    found: dict[str, list[float]] = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.value)
    if NAMES["usage"] not in found:
        raise CannotRun(f"{url} answers, but is no vLLM server: it has no {NAMES['usage']}")
    totals = {key: sum(found.get(name, [0.0])) for key, name in NAMES.items()}
    return totals | {"usage": totals["usage"] / len(found[NAMES["usage"]])}


def line(now: Mapping[str, float], before: Mapping[str, float], width: int = 100) -> str:
    """One reading as a line: a bar of usage, and the hit rate since the previous reading."""
    queries, hits = now["queries"] - before["queries"], now["hits"] - before["hits"]
    rate = f"{100 * hits / queries:5.1f}%" if queries > 0 else "    - "
    text = (
        f" {100 * now['usage']:5.1f}%  hit rate {rate}  running {now['running']:.0f}  waiting {now['waiting']:.0f}"
        f"  preempted {now['preemptions']:.0f}"
    )
    room = max(10, width - len(text) - 2)
    filled = round(room * min(1.0, now["usage"]))
    return "[" + "#" * filled + "." * (room - filled) + "]" + text


def watch(url: str, seconds: float | None, interval_s: float = 1.0) -> list[dict[str, float]]:
    """Print a reading per interval, on one line of a terminal, for `seconds` or until Ctrl-C; returns all readings."""
    url = url if "://" in url else f"http://{url}"
    started, terminal = time.monotonic(), sys.stdout.isatty()
    readings = [read_metrics(url)]
    print(f"KV cache of {url}")
    try:
        while seconds is None or time.monotonic() - started < seconds:
            time.sleep(interval_s)
            readings.append(read_metrics(url))
            text = line(readings[-1], readings[-2], shutil.get_terminal_size().columns)
            print(f"\r{text}" if terminal else text, end="" if terminal else "\n", flush=True)
    except KeyboardInterrupt:
        pass
    if terminal:
        print()
    return readings
