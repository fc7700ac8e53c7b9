"""The tables of the KV cache monitor, and verdicts on the claims S5, K1 and K2."""

from collections.abc import Sequence

from ch16.parts.kv_cache_monitor.arithmetic import kv_shape
from common.models import SHAPES, Model
from common.results import Column, Verdict, judge, not_applicable

NO_HIT_TARGET = 0.99  # throughput with prefix caching over without, when there are no hits
TTFT_TARGET = 0.3  # time to first token with a shared prefix, over without prefix caching
FEWEST_ROUNDS, CLEARLY = 5, 0.1  # fewer rounds cannot resolve a percent, but they can resolve a tenth
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


def claims(workloads: Sequence[dict], no_hits: dict, shared: Sequence[dict], fits: Sequence[dict]) -> list[Verdict]:
    """S5 from rows of COMPARISON_COLUMNS, K1 from the checked workloads, K2 from the rows of what fits."""
    evictions, preemptions = (sum(row[key] for row in workloads) for key in ("evictions", "preemptions"))
    checked, steps = (sum(row[key] for row in workloads) for key in ("checked", "steps"))
    visible = (
        f"usage equal to the engine's in {checked} of {steps} steps (in the others requests wait), hits in all "
        f"{len(workloads)} workloads; {evictions} evictions, {preemptions} preemptions seen"
    )
    in_every_workload = all(row["checked"] for row in workloads)
    reserved, paged = fits
    requests_fit = f"{reserved['fit']} requests fit with memory reserved, {paged['fit']} paged"
    return [
        _prefix_caching(no_hits, shared),
        judge("K1", in_every_workload and evictions > 0 and preemptions > 0, visible),
        judge("K2", paged["fit"] > reserved["fit"], requests_fit),
    ]


def _prefix_caching(no_hits: dict, shared: Sequence[dict]) -> Verdict:
    times = " and ".join(f"{row['ratio']:.2f}x ({row['requests']} at once)" for row in shared)
    text = (
        f"shared prefix: TTFT is {times} of the run without prefix caching; throughput without hits "
        f"{no_hits['ratio']:.3f}x"
    )
    margin, error = abs(no_hits["ratio"] - NO_HIT_TARGET), no_hits["error_percent"] / 100
    sooner = shared[-1]["ratio"] <= TTFT_TARGET  # the last row: a prefix is shared by many
    undecided = ""
    if no_hits["rounds"] < FEWEST_ROUNDS and margin < CLEARLY:
        undecided = f"{no_hits['rounds']} rounds do not decide a percent; without --quick there are more"
    elif margin < 2 * error:
        undecided = (
            f"the ratio is known to {200 * error:.1f}% (two standard errors) and is {100 * margin:.1f}% from the "
            "target; more rounds would decide it"
        )
    if sooner and undecided:
        return not_applicable("S5", undecided, text)
    return judge("S5", sooner and no_hits["ratio"] >= NO_HIT_TARGET, text)
