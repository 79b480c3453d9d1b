"""Steps that learn or move beside the experts: the amortised E-step with its gap, and beta-DPO's beta."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import Interrupt
from torch.nn.functional import logsigmoid

from prefmix.mixture.posterior import kl_to_gate, posterior
from prefmix.training.options import validate_options
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]
Rows = list[dict[str, Any]]


def _ready(trainer: MixtureTrainer) -> MixtureTrainer:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.mixture.experts.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    trainer.start_em()
    trainer.refresh_evidence()
    trainer.hold_steps, trainer.state.max_steps = 0, 10
    return trainer


@pytest.mark.parametrize("latent", ["user", "pair"])
def test_a_taught_network_comes_near_the_posterior_and_says_how_near(make_trainer: Make, latent: str) -> None:
    trainer = _ready(make_trainer(latent=latent, estep="amortized", init="random", beta=1.0, num_experts=3))
    batch = trainer.data_collator(range(24))
    seen: list[Any] = []
    original = trainer.objective.bound
    trainer.objective.bound = lambda *a: seen.append(original(*a)) or seen[-1]  # type: ignore[method-assign]
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=1)
    exact = posterior(seen[0].log_weights, seen[0].evidence).log_resp
    gap = kl_to_gate(seen[0].q.log_q, exact)
    prior_gap = kl_to_gate(seen[0].log_weights, exact).mean()
    assert (gap >= -1e-6).all() and gap.mean() < 0.3 * prior_gap and prior_gap > 0.05
    assert trainer.em.figures()["mixture/amortized_gap"] == pytest.approx(float(gap.mean()), rel=1e-4)
    assert "mixture/amortized_gap" not in trainer.em.figures()


def test_beta_dpo_is_the_papers_batch_beta(make_trainer: Make, rows: Rows) -> None:
    """K = 1: two passes by hand, beta_i = beta [1 + alpha (M_i - M0_i)], M0 a running mean."""
    trainer = _ready(make_trainer(data=rows, num_experts=1, latent="pair", init="random", beta=0.5, adaptive_beta=0.6))
    threshold = 0.0
    for first in (0, 8):
        batch = trainer.data_collator(range(first, first + 8))
        output = trainer.mixture(**batch)
        ratio = (output.log_probs - output.ref_log_probs)[:, 0]
        gap = ratio[batch["chosen"]] - ratio[batch["rejected"]]
        mean = float(0.5 * gap.mean())
        beta = 0.5 * max(1 + 0.6 * (mean - threshold), 0.1)
        threshold = 0.9 * threshold + 0.1 * mean
        expected = -logsigmoid(beta * gap).mean()
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["weight"].sum())
        torch.testing.assert_close(loss, expected)
        trained = [p for p in trainer.mixture.experts.parameters() if p.requires_grad]
        for mine, theirs in zip(
            torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
        assert abs(beta - 0.5) > 1e-3
    assert trainer.em.threshold.item() == pytest.approx(threshold)


def test_a_killed_run_resumes_bit_for_bit(make_trainer: Make, tmp_path: Path) -> None:
    options = {"estep": "amortized", "adaptive_beta": 0.6, "learning_rate": 2e-2, "init_hold_epochs": 0.5}
    options |= {"save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    assert any("mixture/amortized_gap" in line for line in whole.state.log_history)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(output_dir=tmp_path / "killed", callbacks=[Interrupt(8)], **options).train()
    again = make_trainer(output_dir=tmp_path / "killed", **options)
    again.train(resume_from_checkpoint=True)
    first, second = whole.em.state_dict(), again.em.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for one, two in zip(whole.mixture.parameters(), again.mixture.parameters(), strict=True):
        assert torch.equal(one, two)
    times = ("runtime", "per_second", "flos")
    lines = [
        [{k: v for k, v in line.items() if not any(t in k for t in times)} for line in t.state.log_history]
        for t in (whole, again)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"adaptive_beta": 0.0}, "adaptive_beta"),
        ({"adaptive_beta": 0.6, "loss_type": "ipo"}, "loss_type='ipo'"),
        ({"adaptive_beta": 0.6, "latent": "membership"}, "latent='membership'"),
        ({"estep": "amortized", "latent": "membership"}, "estep='amortized'"),
        ({"estep": "amortized", "estep_temperature": 2.0}, "estep_temperature"),
    ],
)
def test_what_cannot_work_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        validate_options(fields)
