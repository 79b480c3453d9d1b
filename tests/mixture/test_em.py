"""Fact 2: full-batch EM with the exact E-step never lowers evidence + log prior. One hundred random problems."""

from __future__ import annotations

import pytest
import torch

from prefmix.mixture.bradley_terry import margins, preference_log_lik
from prefmix.mixture.elbo import elbo_rows
from prefmix.mixture.estep import ESTEPS
from prefmix.mixture.gates import Gate, GateInputs
from prefmix.mixture.posterior import group_log_lik, posterior

STEPS = 12
# What method section 2 allows for each latent.
GATES = {
    "user": [["global"], ["global", "metadata"], ["metadata"]],
    "pair": [["global"], ["global", "prompt"], ["global", "user"], ["global", "prompt", "user", "metadata"]],
}


class Problem:
    """A random data set, a random gate, and K random nonlinear rewards tanh(f A_k) b_k, all in float64."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        draw = torch.Generator().manual_seed(seed)

        def integer(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=draw))

        self.latent = ("user", "pair")[seed % 2]
        self.num_experts, num_users, rows = integer(1, 4), integer(2, 8), integer(5, 40)
        self.label_noise = (0.0, 0.1)[integer(0, 1)]
        self.features = torch.randn(12, 4, dtype=torch.float64)
        self.chosen = torch.randint(0, 12, (rows,))
        self.rejected = (self.chosen + torch.randint(1, 12, (rows,))) % 12
        user = torch.randint(0, num_users, (rows,))
        self.weight = torch.rand(rows, dtype=torch.float64) * 2
        self.group = torch.arange(rows) if self.latent == "pair" else user
        self.num_groups = rows if self.latent == "pair" else num_users
        terms = GATES[self.latent][integer(0, len(GATES[self.latent]) - 1)]
        alpha = (1.0, 1.7)[integer(0, 1)]
        self.gate = Gate(
            self.num_experts, terms, num_users=num_users, prompt_dim=3, metadata_dim=2, alpha=alpha
        ).double()
        metadata = torch.randn(num_users, 2, dtype=torch.float64)
        # One row of inputs for each group: under `user` the gate is constant within a user.
        who = user if self.latent == "pair" else torch.arange(num_users)
        prompts = torch.randn(self.num_groups, 3, dtype=torch.float64)
        self.inputs = GateInputs(who, prompts, metadata[who])
        shape = (self.num_experts, 4, 3)
        self.hidden = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        self.out = torch.randn(self.num_experts, 3, dtype=torch.float64, requires_grad=True)
        self.parameters = [self.hidden, self.out, *self.gate.parameters()]

    def log_lik(self):
        rewards = (torch.einsum("nf,kfh->nkh", self.features, self.hidden).tanh() * self.out).sum(-1)
        return preference_log_lik(margins(rewards, self.chosen, self.rejected), self.label_noise)

    def grouped(self):
        weight = None if self.latent == "pair" else self.weight
        return group_log_lik(self.log_lik(), self.group, self.num_groups, weight)

    def draws(self):
        """How often each group counts: a row's weight under `pair`, once under `user`."""
        return self.weight if self.latent == "pair" else torch.ones(self.num_groups, dtype=torch.float64)

    def objective(self) -> float:
        """Evidence + log prior."""
        evidence = (self.draws() * posterior(self.gate(self.inputs), self.grouped()).log_evidence).sum()
        return (evidence + self.gate.log_prior()).item()

    def bound(self, resp, log_q):
        """ELBO + log prior at responsibilities that are held fixed."""
        per_group = torch.ones_like(self.weight)
        if self.latent == "user":
            per_group = torch.zeros(self.num_groups, dtype=torch.float64).index_add(0, self.group, self.weight)[
                self.group
            ]
        log_weights = self.gate(self.inputs)[self.group]
        rows = elbo_rows(self.log_lik(), log_weights, resp[self.group], log_q[self.group], self.weight, per_group)
        return rows.elbo.sum() + self.gate.log_prior()

    def em_step(self) -> None:
        with torch.no_grad():
            resp, log_q = ESTEPS["exact"](self.gate(self.inputs), self.grouped(), temperature=1.0, generator=None)
        before = self.bound(resp, log_q)
        assert before.item() == pytest.approx(self.objective(), abs=1e-6)
        self._ascend(lambda: self.bound(resp, log_q), before)
        if self.gate.is_closed_form:
            # Groups without rows have q = w and no say.
            counts = self.draws() * (torch.bincount(self.group, minlength=self.num_groups) > 0)
            mean = (counts.unsqueeze(1) * resp).sum(0) / counts.sum()
            self.gate.closed_form_update(mean, float(counts.sum()))

    def _ascend(self, bound, before) -> None:
        """One gradient step on the bound, halved until the bound does not fall: any such M-step will do."""
        gradients = torch.autograd.grad(before, self.parameters, allow_unused=True)
        start = [parameter.detach().clone() for parameter in self.parameters]
        for halving in range(40):
            with torch.no_grad():
                for parameter, origin, gradient in zip(self.parameters, start, gradients, strict=True):
                    step = torch.zeros_like(origin) if gradient is None else gradient
                    parameter.copy_(origin + 0.5**halving * step)
                if bound() >= before:
                    return
        raise AssertionError("no step along the gradient raises the bound")


@pytest.mark.parametrize("seed", range(100))
def test_evidence_plus_log_prior_never_falls(seed):
    problem = Problem(seed)
    values = [problem.objective()]
    for _ in range(STEPS):
        problem.em_step()
        values.append(problem.objective())
    assert all(after >= before - 1e-9 for before, after in zip(values, values[1:], strict=False)), values
    assert values[-1] > values[0]
