"""Tokens per pass and speed-up, predicted. Formulas of Leviathan et al., arXiv 2211.17192, section 3."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """What became of the drafts of a run."""

    steps: int  # passes of the target
    drafts: int  # passes that verified a draft
    accepted: int  # tokens
    complete: int  # drafts of which all tokens were accepted

    @property
    def alpha(self) -> float | None:
        """Acceptance rate: the chance that a token is accepted if all before it were. None without drafts.

        A draft is a row of trials that ends at the first rejection, so not every drafted token was tried.
        """
        trials = self.accepted + self.drafts - self.complete
        return self.accepted / trials if trials else None

    @property
    def share(self) -> float:
        """Passes with a draft over all passes."""
        return self.drafts / self.steps

    @property
    def accepted_length(self) -> float | None:
        """Tokens per pass with a draft: the accepted ones, and the target's own. None without drafts."""
        return 1 + self.accepted / self.drafts if self.drafts else None


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens of a pass that verifies `gamma` drafted ones: (1 - alpha^(gamma + 1)) / (1 - alpha), equation 1.

    ValueError where alpha is not a probability, or gamma is negative.
    """
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(f"alpha {alpha}, gamma {gamma}")
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup(
    alpha: float, gamma: int, verify_cost: float, draft_cost: float = 0.0, share: float = 1.0, idle_cost: float = 1.0
) -> float:
    """Tokens/s over those of plain decoding.

    Theorem 3.8 of the paper, without its assumptions that verifying costs no more than decoding, and that every pass
    has a draft: a `share` of them has. In decode steps of the target, a pass over gamma + 1 tokens takes `verify_cost`,
    a drafted token `draft_cost`, a pass without a draft `idle_cost` (more than 1 in some engines with speculation).
    """
    tokens = share * expected_tokens(alpha, gamma) + 1 - share
    return tokens / (share * (verify_cost + gamma * draft_cost) + (1 - share) * idle_cost)
