"""Token dropout leaves estimates unbiased, whatever form a batch has."""

import torch

from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.token_dropout import drop_tokens, undo_scale

RATE = 0.6


def packed_batch(tokens: int = 4000) -> dict[str, torch.Tensor]:
    return {
        "hidden": torch.arange(tokens, dtype=torch.float32).unsqueeze(1),
        "targets": torch.arange(tokens),
        "segments": torch.arange(tokens) // 1000,
        "text_ids": torch.arange(4),
    }


def test_zero_rate_changes_nothing():
    batch = packed_batch()
    assert drop_tokens(batch, 0.0) is batch


def test_states_targets_and_segments_stay_together():
    torch.manual_seed(0)
    batch = drop_tokens(packed_batch(), RATE)
    hidden, targets, segments = batch["hidden"], batch["targets"], batch["segments"]
    assert torch.equal(hidden[:, 0].long(), targets)
    assert torch.equal(targets // 1000, segments)
    assert abs(len(targets) / 4000 - (1 - RATE)) < 0.05
    assert torch.equal(batch["text_ids"], torch.arange(4))


def test_the_prompt_is_never_dropped():
    torch.manual_seed(0)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]]).repeat(500, 1)
    batch = drop_tokens({"completion_mask": mask, "input_ids": mask}, RATE)
    assert torch.equal(batch["input_ids"], mask)
    assert (batch["completion_mask"] <= mask).all()
    assert abs(batch["completion_mask"].sum() / mask.sum() - (1 - RATE)) < 0.05


def test_scaled_sums_are_unbiased():
    """The mean over many draws of the scaled kept sum is the whole sum, within five standard errors."""
    torch.manual_seed(0)
    token_log_probs = torch.randn(50, dtype=torch.float64)
    draws = torch.stack(
        [
            undo_scale(
                MixtureOutput(
                    (token_log_probs * (torch.rand(50) >= RATE)).sum().view(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)
                ),
                RATE,
            ).log_probs.squeeze()
            for _ in range(4000)
        ]
    )
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - token_log_probs.sum()) < 5 * error
