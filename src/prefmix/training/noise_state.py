"""Label noise that is learnt in training: incremental EM over error rates, for all or for each annotator.

    f_i = sum_k q_ik e_u sigmoid(-m_ik) / p_ik                     at the row's last visit: was label i flipped?
    e_u = (sum_{i of u} a_i f_i + a - 1) / (sum a_i + a + b - 2)   after every step, at most 1/2

Each row keeps its last f_i, as it keeps its last log-likelihoods (Neal & Hinton 1998), so a rate is always the maximum
a posteriori of what is known. The EM itself stands in `mixture.annotator_noise`. Legend: R training rows, B rows of a
batch, K experts, A annotators.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.mixture.annotator_noise import HIGHEST, LOWEST, BetaPrior, row_flips, update_noise
from prefmix.training.config import MixtureConfig
from prefmix.training.noise_options import first_noise

# From here on the log counts an annotator as one who answers at random.
NEARLY_RANDOM = 0.35


class NoiseState:
    """Error rates and the flip probabilities behind them; everything here is checkpointed and restored bit for bit.

    Attributes:
        rate: [A] e_u.
        flipped: [R] f_i of every training row as of its last visit, at first the rate itself.
    """

    def __init__(self, table: ComparisonTable, args: MixtureConfig, device: torch.device) -> None:
        each = args.label_noise_update == "per_annotator"
        user = torch.from_numpy(table.user).long()
        nobody = len(table.users)
        annotator = torch.where(user >= 0, user, nobody) if each else torch.zeros_like(user)
        self.per_annotator, self._num = each, nobody + 1 if each else 1
        self._annotator, self._weight = annotator.to(device), torch.from_numpy(table.weight).to(device)
        self._seen = torch.bincount(annotator, minlength=self._num).to(device) > 0
        self._prior = BetaPrior(*map(float, args.label_noise_prior)).checked()
        start = first_noise(vars(args))
        self.rate = torch.full((self._num,), start, device=device)
        self.flipped = torch.full((len(table),), start, device=device)

    def of_rows(self, row: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """[B] rates of whoever judged; a copy ~i that fills a batch has row i's."""
        return self.rate[self._annotator[torch.where(row < 0, ~row, row)]]

    def flips(
        self,
        row: Int[Tensor, "B"],
        margins: Float[Tensor, "B K"],
        resp: Float[Tensor, "B K"],
        label: Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B"]:
        """[B] f_i at the responsibilities `resp`."""
        return row_flips(margins, self.of_rows(row), resp, label)

    def remember(self, row: Int[Tensor, "B"], flipped: Float[Tensor, "B"]) -> None:
        """Keeps the flip probabilities of rows; copies (negative) are left out."""
        real = row >= 0
        self.flipped[row[real]] = flipped[real].to(self.flipped.dtype)

    def m_step(self) -> None:
        """Rates to their maximum a posteriori at the flips as they are known."""
        rate = update_noise(self.flipped, self._weight, self._annotator, self._num, self._prior)
        self.rate.copy_(rate.clamp(LOWEST, HIGHEST))

    @property
    def population(self) -> float:
        """Rate of somebody unknown: the mean over annotators, exact for one comparison (p is linear in e)."""
        return float(self.rate[self._seen].double().mean())

    def of_users(self, num_users: int) -> Float[Tensor, "U"] | None:
        """[U] rates of the training users, NaN for those without rows; None where one rate serves everybody."""
        if not self.per_annotator:
            return None
        return torch.where(self._seen, self.rate.double(), torch.nan)[:num_users].cpu()

    def figures(self) -> dict[str, float]:
        """What the log says: the mean rate, and which share of the annotators answers nearly at random."""
        found = {"mixture/label_noise": self.population}
        if self.per_annotator:
            random = (self.rate[self._seen] > NEARLY_RANDOM).double().mean()
            found["mixture/random_annotators"] = float(random)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """`noise_rate` and `noise_flipped`."""
        return {"noise_rate": self.rate.clone(), "noise_flipped": self.flipped.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave."""
        self.rate.copy_(state["noise_rate"])
        self.flipped.copy_(state["noise_flipped"])
