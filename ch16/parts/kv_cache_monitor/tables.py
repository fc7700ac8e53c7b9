"""The tables of the KV cache monitor: their columns, and what a token takes in the cache of published models."""

from ch16.parts.kv_cache_monitor.arithmetic import kv_shape
from common.models import SHAPES, Model
from common.results import Column

BYTES_COLUMNS = (
    Column("model", "model"),
    Column("dtype", "KV cache"),
    Column("kb_per_token", "kB per token", ".1f"),
    Column("gb_at_4k", "GB for 4,096 tokens", ".3f"),
    Column("gb_at_32k", "GB for 32,768", ".3f"),
)
WORKLOAD_COLUMNS = (
    Column("workload", "workload"),
    Column("requests", "requests", "d"),
    Column("seconds", "seconds", ".2f", detail=True),
    Column("peak_held", "peak blocks", "d", detail=True),
    Column("usage_percent", "peak usage %", ".0f"),
    Column("cached", "cached blocks", "d"),
    Column("hit_percent", "hit rate %", ".1f"),
    Column("evictions", "evictions", "d"),
    Column("preemptions", "preemptions", "d"),
    Column("peak_running", "peak running", "d", detail=True),
    Column("checked", "steps compared", "d"),
    Column("steps", "steps", "d"),
)
FITS_COLUMNS = (
    Column("how", "memory per request"),
    Column("blocks", "blocks", ".1f"),
    Column("fit", "requests at once", "d"),
    Column("source", ""),
)
COMPARISON_COLUMNS = (
    Column("what", "comparison"),
    Column("variant", "with", ",.1f"),
    Column("base", "without", ",.1f"),
    Column("ratio", "ratio", ".3f"),
    Column("error_percent", "standard error %", ".2f"),
    Column("rounds", "rounds", "d"),
)


def bytes_rows(model: Model) -> list[dict]:
    """Rows of BYTES_COLUMNS: this model, and published shapes."""
    shapes = {model.name: model.config} | {n: c for n, c in SHAPES.items() if not n.startswith(("tiny", "small"))}
    rows = []
    for name, config in shapes.items():
        for dtype in ("bfloat16", "fp8"):
            shape = kv_shape(config, dtype)
            gb = {f"gb_at_{n}k": shape.sequence_bytes(1024 * n) / 1e9 for n in (4, 32)}
            rows.append({"model": name, "dtype": dtype, "kb_per_token": shape.bytes_per_token / 1e3, **gb})
    return rows
