"""E-steps by the names that a configuration gives them; one algorithm, one file.

Each takes `(log_weights [G, K], log_lik [G, K], *, temperature, generator)` and returns an `EStep`.
"""

from prefmix.mixture.estep.annealed import annealed
from prefmix.mixture.estep.exact import exact
from prefmix.mixture.estep.gumbel import gumbel
from prefmix.mixture.estep.hard import hard
from prefmix.mixture.estep.result import EStep, EStepFunction

ESTEPS: dict[str, EStepFunction] = {"exact": exact, "hard": hard, "annealed": annealed, "gumbel": gumbel}

__all__ = ["ESTEPS", "EStep", "EStepFunction"]
