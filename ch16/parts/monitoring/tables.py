"""Tables of monitoring.py: the page of /metrics, latency from its buckets, and the comparison with the clients."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.metrics import MetricWrapperBase

from ch16.parts.monitoring.client import Reply, Scrape, most_at_once
from common.metrics import histogram_quantile
from common.results import Column, Report
from common.timing import percentile

LATENCY = "inference_latency_seconds"
QUANTILES = (50, 90, 99)
SERIES_COLUMNS = (Column("series", "series"), Column("value", "value", ",.5g"), Column("tells", "what it tells"))
BUCKET_COLUMNS = (
    Column("bucket", "latency, s"),
    Column("requests", "requests", ",.0f"),
    Column("cumulative", "up to this bound (the series)", ",.0f"),
)
QUANTILE_COLUMNS = (
    Column("quantile", "quantile"),
    Column("from_buckets_s", "from the buckets, s", ".3f"),
    Column("clients_s", "clients' clocks, s", ".3f"),
    Column("bucket", "interpolated in, s"),
)
AGREEMENT_COLUMNS = (
    Column("what", "figure"),
    Column("server", "/metrics", ",.5g"),
    Column("clients", "clients", ",.5g"),
    Column("rule", "must be"),
    Column("agrees", "agrees"),
)
TELLS = {
    "ok": "answered",
    "error": "failed: alert on their share",
    "cancelled": "the client left",
    "invalid": "a bad request (production server)",
    "rejected": "queue full, or draining (production)",
    f"{LATENCY}_count": "requests timed",
    f"{LATENCY}_sum": "seconds of all; sum / count: the mean",
    "inference_active_requests": "at this moment: what the HPA scales on",
    "inference_throughput_tokens_per_sec": "output tokens per second",
    "inference_draining": "1: stopping, after what is in flight",
}


def fill(
    results: Report,
    explained: Mapping[MetricWrapperBase, str],
    scrapes: Sequence[Scrape],
    answers: Sequence[Reply],
) -> None:
    """Print and keep all tables, and each metric with its explanation."""
    rows = series_rows(scrapes[-1])
    results.table("series", "/metrics after the load, without buckets", rows, SERIES_COLUMNS)
    print()
    for metric, text in explained.items():
        (family,) = metric.describe()
        print(f"  {family.name}{'_total' * (family.type == 'counter')}\n    {text}")
    buckets = gained_buckets(scrapes[0], scrapes[-1])
    results.table("buckets", "Latency by bucket, without empty ones", bucket_rows(buckets), BUCKET_COLUMNS)
    rows = quantile_rows(buckets, answers)
    results.table("quantiles", "histogram_quantile and the clients' own latencies", rows, QUANTILE_COLUMNS)
    rows = agreement_rows(scrapes, answers)
    results.table("agreement", "Do server and clients agree?", rows, AGREEMENT_COLUMNS)


def series_rows(scrape: Scrape) -> list[dict]:
    """Rows of SERIES_COLUMNS: the page without the buckets and times of creation."""
    rows = []
    for sample in scrape.samples:
        if not sample.name.endswith(("_bucket", "_created")):
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            series = f"{sample.name}{{{labels}}}" if labels else sample.name
            tells = TELLS[sample.labels.get("outcome", sample.name)]
            rows.append({"series": series, "value": sample.value, "tells": tells})
    return rows


def gained_buckets(first: Scrape, last: Scrape) -> list[tuple[float, float]]:
    """(upper bound, observations up to it) of the latencies between two scrapes."""
    before = first.buckets(LATENCY)
    return [(bound, count - before[bound]) for bound, count in sorted(last.buckets(LATENCY).items())]


def filled_buckets(buckets: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float, float]]:
    """(lower bound, upper bound, observations) of the buckets from the first to the last with an observation."""
    each = [(low, high, n - m) for (low, m), (high, n) in itertools.pairwise([(0.0, 0.0), *buckets])]
    filled = [place for place, (_, _, count) in enumerate(each) if count]
    yield from each[filled[0] : filled[-1] + 1]


def bucket_name(low: float, high: float) -> str:
    """A bucket's bounds in seconds."""
    return f"above {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


def bucket_rows(buckets: Sequence[tuple[float, float]]) -> list[dict]:
    """Rows of BUCKET_COLUMNS: the buckets with requests."""
    cumulative = dict(buckets)
    return [
        {"bucket": bucket_name(low, high), "requests": count, "cumulative": cumulative[high]}
        for low, high, count in filled_buckets(buckets)
        if count
    ]


def quantile_rows(buckets: Sequence[tuple[float, float]], answers: Sequence[Reply]) -> list[dict]:
    """Rows of QUANTILE_COLUMNS."""
    rows = []
    for q in QUANTILES:
        value = histogram_quantile(q / 100, buckets)
        low, high = next((low, high) for low, high, _ in filled_buckets(buckets) if value <= high)
        clients = percentile([answer.latency_s for answer in answers], q)
        rows.append(
            {"quantile": f"P{q}", "from_buckets_s": value, "clients_s": clients, "bucket": bucket_name(low, high)}
        )
    return rows


def agreement_rows(scrapes: Sequence[Scrape], answers: Sequence[Reply]) -> list[dict]:
    """Rows of AGREEMENT_COLUMNS: what the metrics gained from the first to the last scrape, and the clients' counts.

    The throughput has bounds by the clients' clock: a scrape was answered between its `sent` and `received`.
    """
    first, last = scrapes[0], scrapes[-1]

    def gained(name: str, **labels: str) -> float:
        return last.value(name, **labels) - first.value(name, **labels)

    answered = sum(not answer.error for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    shortest, longest = last.sent - first.received, last.received - first.sent
    active, rate = "inference_active_requests", last.value("inference_throughput_tokens_per_sec")
    most, seconds = max(scrape.value(active) for scrape in scrapes), sum(answer.latency_s for answer in answers)
    rows = []

    def compare(what: str, server: float, clients: float, rule: str = "equal", agrees: bool | None = None) -> None:
        if agrees is None:
            agrees = server == clients if rule == "equal" else server <= clients
        rows.append(dict(what=what, server=server, clients=clients, rule=rule, agrees="yes" if agrees else "no"))

    compare("requests answered", gained("inference_requests_total", outcome="ok"), answered)
    compare("requests failed", gained("inference_requests_total", outcome="error"), len(answers) - answered)
    compare("requests timed", gained(f"{LATENCY}_count"), len(answers))
    compare("active after the last answer", last.value(active), 0)
    compare("most active in a scrape", most, most_at_once(answers), "not more: scrapes miss peaks")
    compare("latencies, sum in s", gained(f"{LATENCY}_sum"), seconds, "not more: clients see HTTP as well")
    within = tokens / longest <= rate <= tokens / shortest
    compare("output tokens/s", rate, 2 * tokens / (shortest + longest), "equal, to a scrape's duration", within)
    return rows
