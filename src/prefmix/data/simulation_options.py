"""What `prefmix simulate` can plant, and its rules: pure Python, for `--help` and for mistakes that show at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Layout = Literal["opposed", "orthogonal", "shared"]
Combination = Literal["mixture", "log_linear"]


@dataclass(frozen=True)
class SimulationOptions:
    """What to plant.

    Attributes:
        num_groups: K_true.
        layout: `opposed`: v and -v, in pairs; `orthogonal`; `shared`: any two tastes at one cosine.
        cosine: of any two tastes, for `shared`, from 0 to below 1.
        scale: standard deviation of a true margin between two random texts of one prompt, nats.
        num_users: users of train and test, in groups of equal size (within one).
        comparisons_per_user: training comparisons of each.
        test_per_user: test comparisons of each, over other texts; of a new user as many again for context.
        num_new_users: users who stand in no other split.
        alpha: concentration of the Dirichlet distribution of continuous users; None: one taste each.
        combination: how a continuous user judges: by one taste, drawn anew for each comparison (`mixture`), or by the
            weighted sum of rewards (`log_linear`).
        noise: probability that a decided answer is turned around.
        ties: Davidson's nu; a comparison with margin 0 is a tie with probability nu / (2 + nu). 0: no ties.
    """

    num_groups: int = 2
    layout: Layout = "opposed"
    cosine: float = 0.5
    scale: float = 2.0
    num_users: int = 40
    comparisons_per_user: int = 16
    test_per_user: int = 16
    num_new_users: int = 0
    alpha: float | None = None
    combination: Combination = "mixture"
    noise: float = 0.0
    ties: float = 0.0

    def check(self, num_attributes: int) -> None:
        """Raises ValueError naming the field, its value and a remedy.

        Args:
            num_attributes: P, how many directions the texts offer.
        """
        for name, allowed in (("layout", get_args(Layout)), ("combination", get_args(Combination))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("num_groups", "num_users", "comparisons_per_user", "test_per_user"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_new_users < 0 or self.ties < 0 or self.scale <= 0:
            raise ValueError(
                f"num_new_users={self.num_new_users} and ties={self.ties} must not be negative, scale={self.scale} "
                "must be above 0"
            )
        if not 0 <= self.noise < 0.5:
            raise ValueError(f"noise={self.noise} must be at least 0 and below 0.5: at 0.5 the answers say nothing")
        if not 0 <= self.cosine < 1:
            raise ValueError(f"cosine={self.cosine} must be at least 0 and below 1: at 1 the groups are one")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha} must be above 0; leave it out for users with one taste each")
        needed = {"opposed": (self.num_groups + 1) // 2, "orthogonal": self.num_groups, "shared": self.num_groups + 1}
        if self.num_groups > 1 and needed[self.layout] > num_attributes:
            raise ValueError(
                f"num_groups={self.num_groups} with layout={self.layout!r} needs {needed[self.layout]} attributes of "
                f"texts, and there are {num_attributes}: plant fewer groups or choose layout='opposed'"
            )
