"""The amortised E-step in training: a network gives discrete responsibilities, taught by the bound it is part of.

    q_g = softmax(log w_g + f(log w_g, evidence_g)),   step of f: lower the mean of KL(q_g || posterior_g) over a batch

which is the bound's pathwise gradient in f, since the bound is the evidence less this gap. The network belongs to the
run, not to the policy: users of a policy get Bayes' rule. Legend: B rows, G groups, K experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.estep import EStep
from prefmix.mixture.estep.amortized import PosteriorNetwork, amortized
from prefmix.mixture.posterior import kl_to_gate, posterior

LEARNING_RATE = 5e-3
# Steps on all groups before the network first decides anything: untrained it says what the gate says, of everybody.
FIRST_LESSONS = 300
PREFIX = "amortized."


class AmortizedPosterior:
    """A network, its own Adam, and the gap to the exact posterior; checkpointed and restored bit for bit.

    Processes that share a run call `learn` and `measure` with the same rows and so keep the same network.
    """

    def __init__(self, num_experts: int, seed: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = PosteriorNetwork(num_experts).to(device)
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        for parameter in self.network.parameters():  # the moments exist from the start, for a checkpoint's sake
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[parameter] = {"step": torch.zeros(()), **zeros}
        self.gap = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def is_untaught(self) -> bool:
        """Whether no step has been taken."""
        return not any(bool(state["step"]) for state in self._optimizer.state.values())

    def learn(self, log_weights: Float[Tensor, "G K"], log_lik: Float[Tensor, "G K"], steps: int = 1) -> None:
        """Steps of Adam on KL(q || posterior) of some groups.

        Args:
            log_weights: [G, K] log w.
            log_lik: [G, K] evidence, nats.
            steps: how many.
        """
        log_weights, log_lik = log_weights.detach(), log_lik.detach()
        exact = posterior(log_weights, log_lik).log_resp
        for _ in range(steps):
            with torch.enable_grad():
                log_q = torch.log_softmax(self.network(log_weights, log_lik), dim=-1)
                self._optimizer.zero_grad()
                kl_to_gate(log_q, exact).mean().backward()
            self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def measure(self, log_weights: Float[Tensor, "G K"], log_lik: Float[Tensor, "G K"]) -> None:
        """Adds the gap of some groups to the sums of the log."""
        gap = amortized(log_weights, log_lik, self.network(log_weights, log_lik)).gap
        self.gap += torch.stack([gap.double().sum(), gap.new_tensor(len(gap)).double()])

    @torch.no_grad()
    def estep(
        self,
        log_weights: Float[Tensor, "B K"],
        log_lik: Float[Tensor, "B K"],
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> EStep:
        """The network's q, whole. `temperature` and `generator` are not used."""
        return amortized(log_weights, log_lik, self.network(log_weights, log_lik)).estep

    def pop_gap(self) -> dict[str, float]:
        """Mean of KL(q || posterior) since the last line of the log, nats; nothing where nothing was measured."""
        total, number = self.gap.tolist()
        self.gap.zero_()
        return {"mixture/amortized_gap": total / number} if number else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: parameters, Adam's moments and steps, and the sums of the gap."""
        found = {f"{PREFIX}{name}": value.clone() for name, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            state = self._optimizer.state[parameter]
            found |= {f"{PREFIX}{name}.{key}": value.clone() for key, value in state.items()}
        return found | {f"{PREFIX}gap": self.gap.clone()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave."""
        for name, parameter in self.network.named_parameters():
            parameter.copy_(state[f"{PREFIX}{name}"])
            for key, value in self._optimizer.state[parameter].items():
                value.copy_(state[f"{PREFIX}{name}.{key}"])
        self.gap.copy_(state[f"{PREFIX}gap"])
