"""D1: is speculative decoding faster, and from which batch on is it not?"""

from collections.abc import Sequence
from itertools import takewhile

from ch16.parts.speculative_decoding.texts import TASKS
from common.results import Verdict, judge


def crossover(rows: Sequence[dict]) -> int | None:
    """The batch from which on speculation was slower than plain decoding, at this and all larger ones."""
    from_largest = sorted(rows, key=lambda row: -row["batch"])
    slower = list(takewhile(lambda row: row["speedup"] < 1, from_largest))
    return slower[-1]["batch"] if slower else None


def slower_where(rows: Sequence[dict]) -> str:
    """At which batches speculation was slower."""
    if (at := crossover(rows)) is not None:
        return "at every batch" if at == rows[0]["batch"] else f"from {at} requests at once"
    slower = [str(row["batch"]) for row in rows if row["speedup"] < 1]
    return f"at {', '.join(slower)}, not beyond" if slower else f"nowhere up to {rows[-1]['batch']}"


def speculation_claim(rows: Sequence[dict], theory: Sequence[dict], target: float) -> Verdict:
    """D1 from vLLM with n-gram drafts on copying text, one request at a time; the free text stands beside."""
    by_text = {text: [row for row in rows if (row["how"], row["text"]) == ("n-gram", text)] for text in TASKS}
    alone = {text: next(row for row in by_text[text] if row["batch"] == 1) for text in TASKS}
    slower = {text: slower_where(by_text[text]) for text in TASKS}
    ratio = next(row.get("ratio") for row in theory if (row["how"], row["text"]) == ("vLLM, n-gram", "copying"))
    copying, free = alone["copying"], alone["free"]
    gap = copying["gap"]
    apart = "" if gap is None else f", the others part between tokens {gap:.2f} apart"
    text = (
        f"vLLM with n-gram drafts, one request: {copying['speedup']:.2f} times plain decoding on copying text, "
        f"{free['speedup']:.2f} on free text (target {target} on copying); measured over predicted "
        f"{'n/a' if ratio is None else format(ratio, '.2f')}; same answers {copying['same']}{apart}. "
        f"Slower: copying {slower['copying']}, free {slower['free']}"
    )
    return judge("D1", copying["speedup"] >= target, text)
