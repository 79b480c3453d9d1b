"""What docs/extending.md shows, run as it stands: each extension trains, is saved, and is loaded again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmix import MixtureConfig, MixturePolicy, MixtureTrainer, register_gate_term, register_loss
from prefmix.mixture.estep import ESTEPS
from prefmix.mixture.gate_terms import GATE_TERMS
from prefmix.mixture.likelihoods.own import OWN_LOSSES
from prefmix.training import registered_names

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
ESTEP, TERM, LOSS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for registry in (ESTEPS, GATE_TERMS, OWN_LOSSES, registered_names.REGISTERED):
        for name in ("cautious", "deep_prompt", "cauchy"):
            assert name not in registry
    monkeypatch.setattr(registered_names, "REGISTERED", {})
    kept = list(registered_names.PROMPT_TERMS)
    yield
    registered_names.PROMPT_TERMS[:] = kept
    for registry in (ESTEPS, GATE_TERMS, OWN_LOSSES):
        for name in ("cautious", "deep_prompt", "cauchy", "never"):
            registry.pop(name, None)


@pytest.fixture
def train(
    make_rows: Callable[..., list[dict[str, Any]]],
    make_tiny_model: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> Callable[..., MixtureTrainer]:
    def run(**options: Any) -> MixtureTrainer:
        make_tiny_model().save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        args = MixtureConfig(
            str(tmp_path / "out"), num_experts=2, num_train_epochs=3, per_device_train_batch_size=16, init="random",
            init_hold_epochs=0.5, learning_rate=1e-2, gate_learning_rate=0.1, logging_steps=1, use_cpu=True,
            disable_tqdm=True, cache_states="memory", overwrite_output_dir=True, **options,
        )  # fmt: skip
        trainer = MixtureTrainer(str(tmp_path / "base"), args, train_dataset=make_rows(num_users=8, rows_per_user=8))
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize("block", [ESTEP, TERM, LOSS], ids=["estep", "gate", "loss"])
def test_each_is_under_forty_lines(block: str) -> None:
    assert len(block.splitlines()) < 40


def test_an_estep(train: Callable[..., MixtureTrainer]) -> None:
    exec(ESTEP, {})
    q = ESTEPS["cautious"](torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, -50.0]]))
    torch.testing.assert_close(q.resp, torch.tensor([[0.95, 0.05]]))
    torch.testing.assert_close(q.log_q.exp(), q.resp)
    trainer = train(estep="cautious", latent="user")
    assert trainer.em.resp.min() >= 0.1 * trainer.mixture.gate.population_log_weights().exp().min() - 0.05
    assert trainer.em.resp.min() > 1e-3  # the exact posterior of eight rows is far surer


def test_a_gate_term(train: Callable[..., MixtureTrainer], tmp_path: Path) -> None:
    exec(TERM, {})
    trainer = train(gate=["global", "deep_prompt"], latent="pair")
    term = trainer.mixture.gate.further["deep_prompt"]
    assert term[2].weight.detach().abs().max() > 0  # it learned
    policy = MixturePolicy.from_pretrained(tmp_path / "out" / "policy")
    one, other = (policy.weights(prompt=prompt) for prompt in ("the sky", "a film of"))
    assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="'deep_prompt' gives a prior that changes within a user"):
        MixtureConfig(str(tmp_path / "other"), gate=["global", "deep_prompt"], latent="user", use_cpu=True)
    GATE_TERMS.pop("deep_prompt")
    with pytest.raises(ValueError, match="must be registered"):
        MixturePolicy.from_pretrained(tmp_path / "out" / "policy")


def test_a_gate_term_must_start_at_zero(train: Callable[..., MixtureTrainer]) -> None:
    register_gate_term("never", torch.nn.Linear, reads="prompt")
    with pytest.raises(ValueError, match="'never': build.* whose outputs start at zero"):
        train(gate=["global", "never"], latent="pair")


def test_a_loss(train: Callable[..., MixtureTrainer], tmp_path: Path) -> None:
    exec(LOSS, {})
    margins = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    log_lik = OWN_LOSSES["cauchy"].log_lik
    both = log_lik(margins, torch.ones(1)).exp() + log_lik(-margins, torch.ones(1)).exp()
    torch.testing.assert_close(both, torch.ones_like(both))
    trainer = train(loss_type="cauchy", latent="user")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-4:]) < sum(losses[:4])
    policy = MixturePolicy.from_pretrained(tmp_path / "out" / "policy")
    assert policy.config.feedback_model.loss_type == "cauchy"
    OWN_LOSSES.pop("cauchy")
    with pytest.raises(ValueError, match="register_loss"):
        policy.score([{"prompt": "the sky", "chosen": " is a film", "rejected": " a girl"}])


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="name='hinge'"):
        register_loss("hinge", lambda margins, beta: margins)
    with pytest.raises(ValueError, match="reads='user'"):
        register_gate_term("never", torch.nn.Linear, reads="user")  # type: ignore[arg-type]
