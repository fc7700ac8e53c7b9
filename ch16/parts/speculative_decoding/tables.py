"""Columns of the tables, and their rows, whose keys are those of the columns; the verdict on D1."""

from collections.abc import Mapping, Sequence
from itertools import takewhile

from ch16.parts.speculative_decoding.texts import TASKS
from ch16.parts.speculative_decoding.theory import Counts, expected_tokens, speedup
from ch16.parts.speculative_decoding.waves import WavePair
from common.results import Column, Verdict, judge

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
    alpha, costs = counts.alpha, {gamma: verify_costs[gamma] for gamma in measured}
    predicted, best = {}, {"best measured": max(measured, key=measured.get)}
    if alpha is not None:
        predicted = {gamma: speedup(alpha, gamma, cost, share=counts.share) for gamma, cost in costs.items()}
        best["best predicted"] = max(predicted, key=predicted.get)
    rows = []
    for gamma, ratio in measured.items():
        marks = ", ".join(mark for mark, at in best.items() if at == gamma)
        row = {"gamma": gamma, "verify_cost": costs[gamma], "speedup": ratio, "best": marks and f"<- {marks}"}
        rows.append(row | ({"predicted": predicted[gamma]} if predicted else {}))
    return rows


def batch_row(how: str, text: str, batch: int, pair: WavePair, compared: Mapping[str, object]) -> dict:
    """A row of BATCH_COLUMNS; `compared`: see `waves.compare`."""
    row = {"how": how, "text": text, "batch": batch, "plain": pair.plain.tokens_per_s}
    row |= {"speculative": pair.speculative.tokens_per_s, "speedup": pair.speedup}
    return row | {"share_percent": 100 * pair.counts.share, "length": pair.counts.accepted_length, **compared}


def engine_theory(how: str, gamma: int, pairs: Mapping[str, WavePair]) -> list[dict]:
    """Rows of THEORY_COLUMNS of one vLLM engine, from its pairs of waves by text, at batch 1."""
    # A pass without a draft costs the same on every text: it is the same engine.
    idle = next((pair.idle_cost for pair in pairs.values() if pair.idle_cost), 1.0)
    rows = {text: theory_row(p.counts, gamma, p.verify_cost, p.speedup, idle_cost=idle) for text, p in pairs.items()}
    return [{"how": f"vLLM, {how}", "text": text, **row} for text, row in rows.items()]


def theory_row(
    counts: Counts,
    gamma: int,
    verify_cost: float | None,
    measured: float,
    draft_cost: float | None = None,
    idle_cost: float = 1.0,
) -> dict:
    """A row of THEORY_COLUMNS without `how` and `text`: costs as in `speedup`, and the speed-up measured.

    No `draft_cost`: `verify_cost` includes it. Nothing is predicted where nothing was drafted.
    """
    row = {"gamma": gamma, "share_percent": 100 * counts.share, "alpha": counts.alpha}
    row |= {"length": counts.accepted_length, "verify_cost": verify_cost, "draft_cost": draft_cost}
    row |= {"speedup": measured, "idle_cost": idle_cost}
    if counts.alpha is None or verify_cost is None:
        return row
    predicted = speedup(counts.alpha, gamma, verify_cost, draft_cost or 0.0, counts.share, idle_cost)
    row["expected"] = expected_tokens(counts.alpha, gamma)
    return row | {"predicted": predicted, "ratio": measured / predicted}


# ---- the claim ----


def slower_where(rows: Sequence[dict]) -> str:
    """At which batches speculation was slower: from one on, at it and all larger ones, or only at some."""
    from_largest = sorted(rows, key=lambda row: -row["batch"])
    if slower := list(takewhile(lambda row: row["speedup"] < 1, from_largest)):
        return "at every batch" if len(slower) == len(rows) else f"from {slower[-1]['batch']} requests at once"
    slower = [str(row["batch"]) for row in rows if row["speedup"] < 1]
    return f"at {', '.join(slower)}, not beyond" if slower else f"nowhere up to {rows[-1]['batch']}"


def speculation_claim(rows: Sequence[dict], theory: Sequence[dict], target: float) -> Verdict:
    """D1 from vLLM with n-gram drafts on copying text, one request at a time; the free text stands beside."""
    by_text = {text: [row for row in rows if (row["how"], row["text"]) == ("n-gram", text)] for text in TASKS}
    copying, free = (next(row for row in of_text if row["batch"] == 1) for of_text in by_text.values())
    slower = ", ".join(f"{text} {slower_where(of_text)}" for text, of_text in by_text.items())
    ratio = next(row.get("ratio") for row in theory if (row["how"], row["text"]) == ("vLLM, n-gram", "copying"))
    apart = "" if copying["gap"] is None else f", the others part between tokens {copying['gap']:.2f} apart"
    text = (
        f"vLLM with n-gram drafts, one request: {copying['speedup']:.2f} times plain decoding on copying text, "
        f"{free['speedup']:.2f} on free text (target {target} on copying); measured over predicted "
        f"{'n/a' if ratio is None else format(ratio, '.2f')}; same answers {copying['same']}{apart}. Slower: {slower}"
    )
    return judge("D1", copying["speedup"] >= target, text)
