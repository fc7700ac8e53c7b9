"""What inference_serving.py prints: the table of the load, the claims S1 to S4."""

from collections.abc import Mapping

from common import targets
from common.gpu import Machine
from common.models import Model
from common.results import Column, Verdict, judge, not_applicable, wrapped

LOAD_COLUMNS = (
    Column("precision", "precision"),
    Column("concurrency", "requests at once", "d"),
    Column("tokens_per_s", "output tok/s", ",.0f"),
    Column("ttft_p50_ms", "TTFT P50 ms", ",.0f"),
    Column("ttft_p99_ms", "TTFT P99 ms", ",.0f"),
    Column("tpot_p50_ms", "TPOT P50 ms", ".1f"),
    Column("tpot_p99_ms", "TPOT P99 ms", ".1f"),
    Column("itl_p99_ms", "ITL P99 ms", ".1f", detail=True),
    Column("e2e_p50_ms", "E2E P50 ms", ",.0f", detail=True),
    Column("e2e_p99_ms", "E2E P99 ms", ",.0f", detail=True),
    Column("utilization", "GPU busy %", ".0f"),
    Column("best", ""),
)


def differences(settings: Mapping[str, object], chapter: Mapping[str, object]) -> str:
    """The exceptions of this machine, for the head of the output."""
    names = [name for name in {**chapter, **settings} if name != "model"]
    changed = [f"{name}={settings.get(name)!r}" for name in names if settings.get(name) != chapter.get(name)]
    text = f"engine:  the chapter's settings{', except ' if changed else ''}{', '.join(changed)}"
    return wrapped(text, " " * 9)


def claims(best: Mapping[str, float], model: Model, machine: Machine, gpus: int) -> list[Verdict]:
    """S1 to S4 from the best wave on `gpus` of the machine's GPUs."""
    throughput, per_gpu = best["tokens_per_s"], best["tokens_per_s_gpu"]
    measured = f"{throughput:,.0f} tok/s"
    if machine.device == "cuda":
        share = targets.TOKENS_PER_S / targets.GPUS
        measured += f" on {gpus}; per GPU {per_gpu:,.0f}, an eighth of the claim is {share:,.0f}"
    s1 = judge("S1", throughput >= targets.TOKENS_PER_S, measured)
    if reason := targets.why_not_judged(model, machine):
        return [not_applicable(v.claim, reason, v.measured) for v in (s1, *targets.judged(best))]
    if gpus < targets.GPUS:
        s1 = not_applicable("S1", f"the claim is about {targets.GPUS} GPUs, this was measured on {gpus}", measured)
    return [s1, *targets.judged(best)]
