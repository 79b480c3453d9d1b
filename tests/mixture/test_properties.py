"""Properties that hold for any input: renaming experts or groups, row sums, extreme margins, weight as repetition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.elbo import elbo_rows
from prefmix.mixture.estep import ESTEPS, EStep
from prefmix.mixture.estep.amortized import PosteriorNetwork, amortized
from prefmix.mixture.posterior import group_log_lik, posterior
from prefmix.mixture.user_evidence import UserEvidence

NAMES = [*ESTEPS, "amortized"]
TEMPERATURE = 1.7


class Case:
    """Margins, groups, weights and a gate of any sizes, from one seed."""

    def __init__(self, seed: int, rows: int, groups: int, experts: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        options = {"generator": generator, "dtype": torch.float64}
        self.num_groups, self.seed = groups, seed
        self.log_lik = preference_log_lik(scale * torch.randn(rows, experts, **options))
        self.group = torch.randint(0, groups, (rows,), generator=generator)
        self.weight = torch.randint(0, 4, (rows,), generator=generator).double()
        self.log_weights = torch.log_softmax(torch.randn(groups, experts, **options), dim=1)
        self.experts = torch.randperm(experts, generator=generator)
        self.groups = torch.randperm(groups, generator=generator)

    def grouped(self) -> torch.Tensor:
        return group_log_lik(self.log_lik, self.group, self.num_groups, self.weight)


cases = st.builds(
    Case,
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 12),
    groups=st.integers(1, 5),
    experts=st.integers(1, 6),
    scale=st.sampled_from([0.1, 1.0, 10.0, 1e4]),
)


def _estep(name: str, log_weights: torch.Tensor, grouped: torch.Tensor, seed: int = 0) -> EStep:
    generator = torch.Generator().manual_seed(seed)
    if name != "amortized":
        return ESTEPS[name](log_weights, grouped, temperature=TEMPERATURE, generator=generator)
    network = PosteriorNetwork(log_weights.shape[1], hidden=4).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
        return amortized(log_weights, grouped, network(log_weights, grouped)).estep


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(case=cases)
def test_rows_sum_to_one_at_any_margin_in_both_precisions(name: str, case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        log_weights, grouped = case.log_weights.to(dtype), case.grouped().to(dtype)
        if name == "amortized" and dtype == torch.float32:
            continue
        resp, log_q = _estep(name, log_weights, grouped, case.seed)
        ones = torch.ones(case.num_groups, dtype=dtype)
        assert torch.isfinite(resp).all() and (resp >= 0).all() and not torch.isnan(log_q).any()
        torch.testing.assert_close(resp.sum(1), ones)
        torch.testing.assert_close(log_q.exp().sum(1), ones)


@pytest.mark.parametrize("name", ["exact", "annealed", "hard", "gumbel"])
@settings(max_examples=40)
@given(case=cases)
def test_renaming_experts_renames_the_answer(name: str, case: Case) -> None:
    log_q = _estep(name, case.log_weights, case.grouped()).log_q
    renamed = _estep(name, case.log_weights[:, case.experts], case.grouped()[:, case.experts]).log_q
    torch.testing.assert_close(renamed, log_q[:, case.experts])


@pytest.mark.parametrize("name", ["exact", "annealed", "hard", "amortized"])
@settings(max_examples=40)
@given(case=cases)
def test_the_order_of_groups_does_not_matter(name: str, case: Case) -> None:
    first = _estep(name, case.log_weights, case.grouped())
    place = torch.empty_like(case.groups)
    place[case.groups] = torch.arange(case.num_groups)
    grouped = group_log_lik(case.log_lik, place[case.group], case.num_groups, case.weight)
    second = _estep(name, case.log_weights[case.groups], grouped)
    torch.testing.assert_close(second.resp, first.resp[case.groups])
    torch.testing.assert_close(second.log_q, first.log_q[case.groups])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(case=cases)
def test_a_row_of_weight_n_is_n_rows(name: str, case: Case) -> None:
    """Weights 0 to 3 inside a group's likelihood, through the E-step and the bound."""
    copies = torch.repeat_interleave(torch.arange(len(case.group)), case.weight.long())
    repeated = group_log_lik(case.log_lik[copies], case.group[copies], case.num_groups)
    torch.testing.assert_close(repeated, case.grouped())
    weighted = _estep(name, case.log_weights, case.grouped(), case.seed)
    listed = _estep(name, case.log_weights, repeated, case.seed)
    if name not in ("hard", "gumbel"):  # an argmax may turn on the last bit
        torch.testing.assert_close(listed.resp, weighted.resp)
    size = torch.zeros(case.num_groups, dtype=torch.float64).index_add(0, case.group, case.weight)

    def bound(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        at = case.group[row]
        log_weights, resp, log_q = case.log_weights[at], weighted.resp[at], weighted.log_q[at]
        return elbo_rows(case.log_lik[row], log_weights, resp, log_q, weight, size[at]).elbo.sum()

    every_row = torch.arange(len(case.group))
    torch.testing.assert_close(
        bound(copies, torch.ones(len(copies), dtype=torch.float64)), bound(every_row, case.weight)
    )


@settings(max_examples=40)
@given(case=cases)
def test_the_running_table_knows_weights_as_repetitions_too(case: Case) -> None:
    experts = case.log_lik.shape[1]
    copies = torch.repeat_interleave(torch.arange(len(case.group)), case.weight.long())
    weighted = UserEvidence(len(case.group), experts, case.group, case.weight, case.num_groups, per_pair=False)
    ones = torch.ones(len(copies), dtype=torch.float64)
    listed = UserEvidence(len(copies), experts, case.group[copies], ones, case.num_groups, per_pair=False)
    weighted.update(torch.arange(len(case.group)), case.log_lik)
    listed.update(torch.arange(len(copies)), case.log_lik[copies])
    torch.testing.assert_close(listed.group_evidence(), weighted.group_evidence())


@settings(max_examples=40)
@given(case=cases)
def test_the_exact_bound_is_the_evidence_and_any_other_is_below(case: Case) -> None:
    """sum_i ELBO_i over the rows of a group = log evidence at the posterior; less under every other E-step."""
    evidence = posterior(case.log_weights, case.grouped()).log_evidence
    for name in ("exact", "annealed", "hard"):
        resp, log_q = _estep(name, case.log_weights, case.grouped())
        kl = torch.where(resp > 0, resp * (log_q - case.log_weights), 0.0).sum(1)
        bound = torch.where(resp > 0, resp * case.grouped(), 0.0).sum(1) - kl
        slack = 1e-9 * (1.0 + evidence.abs())
        assert (bound <= evidence + slack).all()
        if name == "exact":
            assert (bound >= evidence - slack).all()
