"""What a step tells about the mixture, summed on the device and fetched once per line of the log.

Legend: B comparisons, K experts. Figures are means over row weights a_i; those of expert k weigh rows by a_i q_ik.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmix.mixture.elbo import RowELBO, elbo_rows
from prefmix.mixture.estep import EStep
from prefmix.mixture.posterior import posterior
from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.objective import Likelihoods
from prefmix.training.penalties import expert_variance

BY_EXPERT = ("margins", "accuracies", "chosen", "rejected")


class Sums(NamedTuple):
    """Weighted sums over rows; adding two gives the sums over both sets of rows.

    Attributes:
        weight: [] sum_i a_i.
        elbo: [] sum_i ELBO_i at the responsibilities used.
        evidence: [] the same at the exact posterior, where the bound is tight.
        resp_entropy: [] sum_i a_i H(q_i), nats.
        gate_entropy: [] sum_i a_i H(w_i), nats.
        expert_variance: [] sum_i a_i of the variance of margins over experts, nats^2; what `pooling` multiplies.
        mixed: [6] sum_i a_i sum_k q_ik of both rewards, margin, [margin > 0] and both log-probabilities.
        usage: [K] sum_i a_i q_ik.
        by_expert: [4, K] sum_i a_i q_ik of margin, [margin > 0], chosen and rejected reward.
    """

    weight: Float[Tensor, ""]
    elbo: Float[Tensor, ""]
    evidence: Float[Tensor, ""]
    resp_entropy: Float[Tensor, ""]
    gate_entropy: Float[Tensor, ""]
    expert_variance: Float[Tensor, ""]
    mixed: Float[Tensor, "6"]
    usage: Float[Tensor, "K"]
    by_expert: Float[Tensor, "4 K"]


@torch.no_grad()
def batch_sums(
    output: MixtureOutput,
    lik: Likelihoods,
    q: EStep,
    rows: RowELBO,
    evidence: Float[Tensor, "B K"],
    weight: Float[Tensor, "B"],
    group_weight: Float[Tensor, "B"],
    chosen: Int[Tensor, "B"],
    rejected: Int[Tensor, "B"],
) -> Sums:
    """The sums of one batch.

    Args:
        output: log-probabilities of the texts and gate of the rows.
        lik: rewards and likelihoods of the rows.
        q: responsibilities used.
        rows: bound at `q`.
        evidence: [B, K] running evidence of each row's group.
        weight: [B] a_i.
        group_weight: [B] n_g.
        chosen: [B] index among the batch's texts.
        rejected: [B] index among the batch's texts.
    """
    log_q = posterior(output.log_weights, evidence).log_resp
    tight = elbo_rows(lik.log_lik, output.log_weights, log_q.exp(), log_q, weight, group_weight)
    q_BK = q.log_q.exp()
    weighted_BK = weight.unsqueeze(1) * q_BK
    mixed_margin_B = (q_BK * lik.margins).sum(1)
    mixed = (
        (q_BK * lik.chosen_rewards).sum(1),
        (q_BK * lik.rejected_rewards).sum(1),
        mixed_margin_B,
        (mixed_margin_B > 0).to(mixed_margin_B.dtype),
        (q_BK * output.log_probs[chosen]).sum(1),
        (q_BK * output.log_probs[rejected]).sum(1),
    )
    by_expert = (lik.margins, (lik.margins > 0).to(q_BK.dtype), lik.chosen_rewards, lik.rejected_rewards)
    return Sums(
        weight.sum(),
        rows.elbo.sum(),
        tight.elbo.sum(),
        (weight * _entropy(q.log_q)).sum(),
        (weight * _entropy(output.log_weights)).sum(),
        (weight * expert_variance(lik.margins)).sum(),
        torch.stack([(weight * value).sum() for value in mixed]),
        weighted_BK.sum(0),
        torch.stack([(weighted_BK * value).sum(0) for value in by_expert]),
    )


def _entropy(log_probs: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    return torch.special.entr(log_probs.exp()).sum(dim=-1)


def summarize(sums: Sums, over_processes: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """Means by name: TRL's names for the mixture as a whole, ours under `mixture/`. One transfer from the device.

    Args:
        sums: of this process.
        over_processes: adds up a tensor over all processes; null: there is one.
    """
    sizes = [value.numel() for value in sums]
    flat = torch.cat([value.detach().double().reshape(-1) for value in sums])
    flat = (flat if over_processes is None else over_processes(flat)).cpu()
    weight, elbo, evidence, resp_entropy, gate_entropy, variance, mixed, usage, by_expert = flat.split(sizes)
    total = weight.item()
    names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )
    logs = dict(zip(names, (mixed / total).tolist(), strict=True))
    logs["mixture/elbo"] = elbo.item() / total
    logs["mixture/evidence"] = evidence.item() / total
    logs["mixture/responsibility_entropy"] = resp_entropy.item() / total
    logs["mixture/gate_entropy"] = gate_entropy.item() / total
    logs["mixture/expert_variance"] = variance.item() / total
    for k, used in enumerate(usage.tolist()):
        logs[f"mixture/usage_{k}"] = used / total
    # An expert that no row uses has no mean; it is left out rather than logged as NaN.
    for name, values in zip(BY_EXPERT, by_expert.reshape(len(BY_EXPERT), -1).tolist(), strict=True):
        for k, (value, used) in enumerate(zip(values, usage.tolist(), strict=True)):
            if used > 0:
                logs[f"mixture/rewards/{name}_{k}"] = value / used
    return logs


class Meter:
    """Sums since the last line of the log. Nothing is fetched from the device until `pop`."""

    def __init__(self) -> None:
        self._sums: Sums | None = None

    def add(self, sums: Sums) -> None:
        """Adds one batch."""
        self._sums = sums if self._sums is None else Sums(*map(torch.add, self._sums, sums))

    def pop(self, over_processes: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means since the last call, and a new start; empty where no batch came.

        Args:
            over_processes: adds up a tensor over all processes; every process must call at once then.
        """
        sums, self._sums = self._sums, None
        return {} if sums is None else summarize(sums, over_processes)

    def state_dict(self, over_processes: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, Tensor]:
        """The sums so far over all processes, so that a resumed run logs what the uninterrupted one does."""
        if self._sums is None:
            return {}
        return {name: over_processes(value) for name, value in self._sums._asdict().items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device, num_processes: int = 1) -> None:
        """Takes what `state_dict` gave; each process an equal share, so that their sum is the same again."""
        shares = {name: value.to(device) / num_processes for name, value in state.items()}
        self._sums = Sums(**shares) if shares else None
