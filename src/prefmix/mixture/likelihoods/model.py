"""How feedback becomes a log-likelihood, as plain data. No torch here: a policy's configuration holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

LossType = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "simpo", "mixed_logit"]
Ties = Literal["drop", "davidson", "rao_kupper"]
Likelihood = Literal["mbt", "bt_lse", "policy", "log_linear"]

# exp of these is a probability: they sum to 1 over the outcomes.
PROPER: tuple[str, ...] = ("sigmoid", "sigmoid_norm", "mixed_logit")
# Their rewards are per completion token.
PER_TOKEN: tuple[str, ...] = ("sigmoid_norm", "ipo", "simpo")


@dataclass(frozen=True)
class FeedbackModel:
    """The observation model of one run or policy.

    Attributes:
        loss_type: the (pseudo-)log-likelihood of a pair and the reward behind it: a `LossType`, or a registered name.
        label_noise: e of p = (1-e) sigmoid(m) + e sigmoid(-m).
        label_smoothing: epsilon; of `robust` the share of flipped labels, else labels are 1 - epsilon.
        simpo_gamma: the margin that `simpo` asks for, nats.
        beta_spread: standard deviation of log beta under `mixed_logit`.
        ties: what models ties; `drop` leaves them out.
        tie_strength: nu of Davidson, eta of Rao-Kupper.
        likelihood: of the mixture: of Bradley-Terry likelihoods (`mbt`), of rewards (`bt_lse`), or of policies; or of
            the summed margin of a product of experts (`log_linear`), which is what `combine: log_linear` trains.
    """

    loss_type: str = "sigmoid"
    label_noise: float = 0.0
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    beta_spread: float = 0.5
    ties: Ties = "drop"
    tie_strength: float = 1.0
    likelihood: Likelihood = "mbt"

    @property
    def keeps_ties(self) -> bool:
        """Whether ties are data."""
        return self.ties != "drop"

    @property
    def is_product(self) -> bool:
        """Whether the policy is a product of experts, not a mixture: margins are summed."""
        return self.likelihood == "log_linear"

    @property
    def is_plain(self) -> bool:
        """Whether only label noise departs from the default: Bradley-Terry on implicit rewards, mixed."""
        return self == FeedbackModel(label_noise=self.label_noise)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the default, label noise left out: JSON values."""
        default = asdict(FeedbackModel())
        return {name: value for name, value in asdict(self).items() if value != default[name] and name != "label_noise"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], label_noise: float) -> FeedbackModel:
        """Reads `to_dict`'s mapping.

        Raises:
            ValueError: a name that this release does not know.
        """
        unknown = values.keys() - {entry.name for entry in fields(cls)}
        if unknown:
            raise ValueError(f"feedback: unknown fields {sorted(unknown)}; use the prefmix release that wrote them")
        return cls(**{**values, "label_noise": label_noise})
