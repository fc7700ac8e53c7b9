"""Columns of the tables, and their rows. The keys of a row are those of its columns."""

from collections.abc import Mapping

from ch16.parts.speculative_decoding.theory import Counts, best_gamma, expected_tokens, speedup
from ch16.parts.speculative_decoding.waves import WavePair
from common.results import Column

LOOP_COLUMNS = (
    Column("text", "text"),
    Column("how", "draft"),
    Column("precision", "precision"),
    Column("gamma", "gamma", "d"),
    Column("tokens_per_s", "tok/s", ",.1f"),
    Column("speedup", "speed-up", ".2f"),
    Column("tokens_per_pass", "tokens per pass", ".2f"),
    Column("same", "same answers"),
    Column("gap", "log-prob gap", ".3f"),
)
GAMMA_COLUMNS = (
    Column("gamma", "gamma", "d"),
    Column("verify_cost", "verify cost", ".2f"),
    Column("predicted", "speed-up predicted", ".2f"),
    Column("speedup", "speed-up measured", ".2f"),
    Column("best", ""),
)
BATCH_COLUMNS = (
    Column("how", "draft"),
    Column("text", "text"),
    Column("batch", "requests at once", "d"),
    Column("plain", "plain tok/s", ",.0f"),
    Column("speculative", "drafted tok/s", ",.0f"),
    Column("speedup", "speed-up", ".2f"),
    Column("share_percent", "drafted passes %", ".0f"),
    Column("length", "tokens per draft", ".2f"),
    Column("same", "same answers"),
    Column("gap", "log-prob gap", ".3f"),
)
THEORY_COLUMNS = (
    Column("how", "draft"),
    Column("text", "text"),
    Column("gamma", "gamma", "d", detail=True),
    Column("share_percent", "drafted passes %", ".0f"),
    Column("alpha", "alpha", ".3f"),
    Column("expected", "tokens per draft, by formula", ".2f", detail=True),
    Column("length", "tokens per draft", ".2f", detail=True),
    Column("verify_cost", "verify cost", ".2f"),
    Column("draft_cost", "draft cost per token", ".3f", detail=True),
    Column("idle_cost", "draft-less pass", ".2f"),
    Column("predicted", "speed-up predicted", ".2f"),
    Column("speedup", "speed-up measured", ".2f"),
    Column("ratio", "measured / predicted", ".2f", detail=True),
)


def gamma_rows(measured: Mapping[int, float], counts: Counts, verify_costs: Mapping[int, float]) -> list[dict]:
    """Rows of GAMMA_COLUMNS: speed-ups predicted from the counts of one gamma, beside those `measured`."""
    costs = {gamma: verify_costs[gamma] for gamma in measured}
    marks = {max(measured, key=measured.get): ["best measured"]}
    if counts.alpha is not None:
        marks.setdefault(best_gamma(counts.alpha, costs, share=counts.share), []).append("best predicted")
    rows = []
    for gamma, ratio in measured.items():
        row = {"gamma": gamma, "verify_cost": costs[gamma], "speedup": ratio, "best": ""}
        if counts.alpha is not None:
            row["predicted"] = speedup(counts.alpha, gamma, costs[gamma], share=counts.share)
        if gamma in marks:
            row["best"] = f"<- {', '.join(marks[gamma])}"
        rows.append(row)
    return rows


def batch_row(how: str, text: str, batch: int, pair: WavePair, compared: Mapping[str, object]) -> dict:
    """A row of BATCH_COLUMNS; `compared`: see `waves.compare`."""
    return {
        "how": how,
        "text": text,
        "batch": batch,
        "plain": pair.plain.tokens_per_s,
        "speculative": pair.speculative.tokens_per_s,
        "speedup": pair.speedup,
        "share_percent": 100 * pair.counts.share,
        "length": pair.counts.accepted_length,
        **compared,
    }


def engine_theory(how: str, gamma: int, pairs: Mapping[str, WavePair]) -> list[dict]:
    """Rows of THEORY_COLUMNS of one vLLM engine, from its pairs of waves by text, at batch 1."""
    # A pass without a draft costs the same on every text: it is the same engine.
    idle = next((pair.idle_cost for pair in pairs.values() if pair.idle_cost), 1.0)
    return [
        theory_row(f"vLLM, {how}", text, gamma, pair.counts, pair.verify_cost, None, pair.speedup, idle)
        for text, pair in pairs.items()
    ]


def theory_row(
    how: str,
    text: str,
    gamma: int,
    counts: Counts,
    verify_cost: float | None,
    draft_cost: float | None,
    measured: float,
    idle_cost: float = 1.0,
) -> dict:
    """A row of THEORY_COLUMNS; nothing is predicted where nothing was drafted.

    Args:
        draft_cost: None: `verify_cost` includes it.
        measured: the speed-up.
        idle_cost: as in `speedup`; in our loop a pass without a draft is a decode step.
    """
    row = {"how": how, "text": text, "gamma": gamma, "share_percent": 100 * counts.share, "alpha": counts.alpha}
    row |= {"length": counts.accepted_length, "verify_cost": verify_cost, "draft_cost": draft_cost}
    row |= {"speedup": measured, "idle_cost": idle_cost}
    if counts.alpha is None or verify_cost is None:
        return row
    predicted = speedup(counts.alpha, gamma, verify_cost, draft_cost or 0.0, counts.share, idle_cost)
    return row | {
        "expected": expected_tokens(counts.alpha, gamma),
        "predicted": predicted,
        "ratio": measured / predicted,
    }
