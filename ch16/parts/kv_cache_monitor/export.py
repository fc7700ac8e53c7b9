"""A cache monitor's statistics as Prometheus metrics."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


class StatsCollector:
    """Statistics that are read at each scrape: what only grows is a counter, usage is a gauge."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """The metrics at this moment."""
        stats = self._read()
        for name, key, text in (
            ("kv_cache_allocated_bytes", "total_allocated", "Bytes ever allocated"),
            ("kv_cache_freed_bytes", "total_freed", "Bytes ever freed"),
            ("kv_cache_hits", "cache_hits", "Found in the cache"),
            ("kv_cache_misses", "cache_misses", "Not found in the cache"),
            ("kv_cache_evictions", "evictions", "Blocks that lost their content"),
        ):
            yield CounterMetricFamily(name, text, value=stats[key])
        yield GaugeMetricFamily("kv_cache_usage_bytes", "Bytes in use", value=stats["current_usage"])
