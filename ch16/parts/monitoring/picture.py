"""The picture of monitoring.py: latencies by bucket, and active requests as the scrapes saw them."""

from collections.abc import Sequence

import numpy as np

from ch16.parts.monitoring.client import Reply, Scrape
from ch16.parts.monitoring.tables import filled_buckets, gained_buckets, quantile_rows
from common.plots import COLOURS, draw, legend_below, save_plot
from common.results import Report


def plot(path: str, answers: Sequence[Reply], scrapes: Sequence[Scrape], results: Report) -> None:
    """Left: the histogram, with quantiles from it and from the clients. Right: the gauge and the clients' count."""
    figure, (left, right) = draw(2)
    buckets = gained_buckets(scrapes[0], scrapes[-1])
    filled = list(filled_buckets(buckets))
    bounds = [filled[0][0], *(high for _, high, _ in filled)]
    counts, places = [count for *_, count in filled], range(len(bounds))
    left.bar(places[:-1], counts, 0.96, align="edge", color=COLOURS["quiet"])
    median, _, last = quantile_rows(buckets, answers)
    for key, meaning, label in (
        ("from_buckets_s", "variant", "from the buckets"),
        ("clients_s", "baseline", "by the clients' clocks"),
    ):
        at = np.interp([median[key], last[key]], bounds, places)  # linear within a bucket
        left.vlines(at, 0, 1.04 * max(counts), color=COLOURS[meaning], label=label)
    for row, side in ((median, "right"), (last, "left")):
        at = np.interp((row["from_buckets_s"] + row["clients_s"]) / 2, bounds, places)
        left.text(at, 1.07 * max(counts), row["quantile"], ha=side)
    left.set(title="inference_latency_seconds", xlabel="latency, s (bounds of the buckets)")
    left.set(ylabel="requests per bucket", ylim=(0, 1.2 * max(counts)))
    failed = max(reply.latency_s for reply in answers if reply.error)
    left.text(int(np.interp(failed, bounds, places)) + 0.5, 1.1, "failed", ha="center")
    left.set_xticks(places[::2], [f"{bound:g}" for bound in bounds[::2]])
    legend_below(left, 2)

    start = scrapes[0].sent
    changes = sorted([(a.sent - start, 1) for a in answers] + [(a.arrived - start, -1) for a in answers])
    levels = np.cumsum([0, *(change for _, change in changes)])
    right.step([0, *(at for at, _ in changes)], levels, where="post", color=COLOURS["baseline"], label="at the clients")
    seen = [scrape.value("inference_active_requests") for scrape in scrapes]
    at = [scrape.received - start for scrape in scrapes]
    right.plot(at, seen, ".", color=COLOURS["variant"], markersize=11, label="scraped from /metrics")
    right.set(title="inference_active_requests", xlabel="time, s", ylabel="requests in flight", ylim=(0, None))
    legend_below(right, 2)
    buckets_s, clients_s = last["from_buckets_s"], last["clients_s"]
    message = f"P99 latency: {buckets_s:.2f} s from the buckets, {clients_s:.2f} s by the clients' clocks"
    save_plot(figure, path, message, str(results.settings["model"]), results.machine)
