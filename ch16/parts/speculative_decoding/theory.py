"""How many tokens a step gives, and what that is worth. Formulas of Leviathan et al., arXiv 2211.17192, section 3."""

from collections.abc import Mapping
from dataclasses import dataclass

from common.results import Column

THEORY_COLUMNS = (
    Column("how", "draft"),
    Column("text", "text"),
    Column("gamma", "gamma", "d"),
    Column("share_percent", "passes with a draft %", ".0f"),
    Column("alpha", "alpha", ".3f"),
    Column("expected", "tokens from a draft, formula", ".2f"),
    Column("length", "measured", ".2f"),
    Column("verify_cost", "verify, in decode steps", ".2f"),
    Column("draft_cost", "draft a token, in decode steps", ".3f"),
    Column("idle_cost", "a pass without a draft, in decode steps", ".2f"),
    Column("predicted", "speed-up predicted", ".2f"),
    Column("speedup", "measured", ".2f"),
    Column("ratio", "measured/predicted", ".2f"),
)


@dataclass(frozen=True)
class Counts:
    """What became of the drafts of a run."""

    steps: int  # passes of the target
    drafts: int  # passes that verified a draft
    accepted: int  # tokens
    complete: int  # drafts of which all tokens were accepted

    @property
    def alpha(self) -> float | None:
        """Acceptance rate: the chance that a token is accepted if those before it were. None without drafts.

        A draft is a row of trials that ends with the first rejection, so not every drafted token was tried.
        """
        trials = self.accepted + self.drafts - self.complete
        return self.accepted / trials if trials else None

    @property
    def share(self) -> float:
        """Passes with a draft, of all."""
        return self.drafts / self.steps

    @property
    def accepted_length(self) -> float | None:
        """Tokens that a pass with a draft gave: the accepted, and the target's own. None without drafts."""
        return 1 + self.accepted / self.drafts if self.drafts else None


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens of a step that verifies `gamma` drafted ones: (1 - alpha^(gamma + 1)) / (1 - alpha), equation 1.

    Raises:
        ValueError: alpha is not a probability, or gamma is negative.
    """
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(f"alpha {alpha}, gamma {gamma}")
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup(
    alpha: float, gamma: int, verify_cost: float, draft_cost: float = 0.0, share: float = 1.0, idle_cost: float = 1.0
) -> float:
    """Tokens a second over those of plain decoding.

    Theorem 3.8 of the paper, without its assumption that verifying costs no more than decoding, and for drafts that
    are not always to be had.

    Args:
        verify_cost: a pass over gamma + 1 tokens, in decode steps of the target.
        draft_cost: a drafted token, in the same unit.
        share: of the passes that have a draft.
        idle_cost: a pass that has none, in decode steps: an engine made for drafts may take longer for it.
    """
    tokens = share * expected_tokens(alpha, gamma) + 1 - share
    return tokens / (share * (verify_cost + gamma * draft_cost) + (1 - share) * idle_cost)


def best_gamma(alpha: float, verify_costs: Mapping[int, float], draft_cost: float = 0.0, share: float = 1.0) -> int:
    """The draft length, of those whose `verify_costs` are known, with the largest `speedup`."""
    return max(verify_costs, key=lambda gamma: speedup(alpha, gamma, verify_costs[gamma], draft_cost, share))


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
        draft_cost: None: `verify_cost` holds it.
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
