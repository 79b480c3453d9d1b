"""What EM remembers between batches: evidence of every row, responsibilities of every group.

Legend: R rows of the training set, B rows of a batch, G groups, K experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.held_out import Gain
from prefmix.mixture.membership import GaussianQ
from prefmix.mixture.user_evidence import UserEvidence
from prefmix.training.amortized_posterior import AmortizedPosterior
from prefmix.training.group_adversary import GroupAdversary
from prefmix.training.noise_state import NoiseState

if TYPE_CHECKING:
    from prefmix.training.first_responsibilities import Beginning


class MeanResponsibility(NamedTuple):
    """Sufficient statistics of a global gate.

    Attributes:
        mean: [K] sum_g c_g q_g / sum_g c_g, c_g how often the KL of group g counts in the bound.
        num_groups: sum_g c_g.
    """

    mean: Float[Tensor, "K"]
    num_groups: float


class EMState:
    """Running evidence and responsibilities; everything here is checkpointed and restored bit for bit.

    A global gate moves to the mean of `resp` after *every* step, as incremental EM does (Neal & Hinton 1998): a group's
    q is refreshed when the batch holds one of its rows and otherwise stays, starting from the first responsibilities.
    Recomputing every q at every step instead would run hundreds of EM iterations of the weights an epoch against
    likelihoods that are stale, and drive them to a corner; once an epoch would leave them behind. With one full
    batch a step all of these are EM's M-step.

    Attributes:
        evidence: log-likelihoods of the training rows as of their last visit.
        initial: [G, K] first responsibilities, held during the first epochs.
        resp: [G, K] latest responsibilities.
        pooling: how strongly the start asks for experts to be drawn together (`first_responsibilities`).
        gain: what the start says of groups over one, for the line that says so; on the first process alone.
        group_weight: [G] n_g of the bound: summed row weights under `user`, 1 under `pair`.
        total_weight: summed weight of the training rows.
        q: of z_g under `latent="membership"`, [G, d] each, as of the last visit; None under the others.
        noise: learnt label noise; None where it is fixed.
        amortized: the network of `estep="amortized"`; None under the others.
        threshold: [K] running mean margins of beta-DPO; None without `adaptive_beta`.
        adversary: weights of groups of rows under group DRO; None without `robust_over`.
    """

    def __init__(
        self, group: Int[Tensor, "R"], weight: Float[Tensor, "R"], initial: Float[Tensor, "G K"], per_pair: bool
    ) -> None:
        num_groups, num_experts = initial.shape
        self.evidence = UserEvidence(len(group), num_experts, group, weight, num_groups, per_pair)
        self.q: GaussianQ | None = None
        self.noise: NoiseState | None = None
        self.amortized: AmortizedPosterior | None = None
        self.threshold: Tensor | None = None
        self.adversary: GroupAdversary | None = None
        self.initial = initial.clone()
        self.resp = initial.clone()
        self.pooling = 0.0
        self.gain: Gain | None = None
        self.total_weight = float(weight.double().sum())
        self._row_group, self._row_weight = group, weight.double()
        summed = torch.zeros(num_groups, dtype=torch.float64, device=weight.device).index_add_(
            0, group, weight.double()
        )
        self.group_weight = (torch.ones_like(summed) if per_pair else summed).float()
        # Under `pair` a weight multiplies the whole bound of its row, the gate's term included.
        self._count = summed if per_pair else (summed > 0).double()
        self._per_count = torch.ones_like(summed) if per_pair else summed.clamp_min(torch.finfo(torch.float64).tiny)

    def begin(self, found: Beginning) -> Float[Tensor, "G K"]:
        """Keeps what a start asks for; gives its responsibilities."""
        self.pooling, self.gain = found.pooling, found.gain
        return found.resp

    def remember(self, group: Int[Tensor, "B"], log_q: Float[Tensor, "B K"]) -> None:
        """Keeps the responsibilities of the groups of a batch (rows of one group carry equal ones)."""
        self.resp[group] = log_q.exp().to(self.resp.dtype)

    def mean_resp(self) -> MeanResponsibility:
        """What the closed form of a global gate needs."""
        count = self._count if self.adversary is None else self._weighed_count(self.adversary.of_rows())
        total = count.sum()
        return MeanResponsibility(((count @ self.resp.double()) / total).to(self.resp.dtype), float(total))

    def weigh(self, inputs: dict[str, Tensor], bound: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """[B] a batch's bounds as group DRO weighs them; as they are without it."""
        return bound if self.adversary is None else self.adversary.weigh(inputs, bound)

    def _weighed_count(self, factor: Float[Tensor, "R"]) -> Float[Tensor, "G"]:
        """[G] c_g where rows weigh `factor` more: the sum over the group's rows of a_i times it, over n_g."""
        weight = factor * self._row_weight
        return torch.zeros_like(self._count).index_add_(0, self._row_group, weight) / self._per_count

    def figures(self) -> dict[str, float]:
        """What a line of the log says of what is learnt beside experts and gate."""
        found = {} if self.noise is None else self.noise.figures()
        found |= {} if self.adversary is None else self.adversary.figures()
        if self.threshold is not None:
            found |= {f"mixture/mean_margin_{k}": value for k, value in enumerate(self.threshold.tolist())}
        return found if self.amortized is None else found | self.amortized.pop_gap()

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: evidence (`table`, `visited`), `initial`, `resp`, `pooling`; where q is, its mean and log std.

        What is learnt of label noise, the E-step's network, groups' weights and beta's thresholds likewise.
        """
        state = {**self.evidence.state_dict(), "initial": self.initial.clone(), "resp": self.resp.clone()}
        state["pooling"] = torch.tensor(self.pooling, dtype=torch.float64)
        if self.q is not None:
            state |= {"q_mean": self.q.mean.clone(), "q_log_std": self.q.log_std.clone()}
        for part in (self.noise, self.amortized, self.adversary):
            state |= {} if part is None else part.state_dict()
        return state if self.threshold is None else state | {"threshold": self.threshold.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave.

        Raises:
            ValueError: the state belongs to other training rows or another number of experts.
        """
        if state["resp"].shape != self.resp.shape:
            raise ValueError(
                f"the checkpoint holds responsibilities of shape {tuple(state['resp'].shape)} (groups, experts), but "
                f"this run needs {tuple(self.resp.shape)}; resume with the same training rows, latent and num_experts"
            )
        self.evidence.load_state_dict(state)
        self.initial.copy_(state["initial"])
        self.resp.copy_(state["resp"])
        self.pooling = float(state["pooling"])
        if self.q is not None:
            self.q.mean.copy_(state["q_mean"])
            self.q.log_std.copy_(state["q_log_std"])
        for part in (self.noise, self.amortized, self.adversary):
            if part is not None:
                part.load_state_dict(state)
        if self.threshold is not None:
            self.threshold.copy_(state["threshold"])
