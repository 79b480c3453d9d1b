"""What a run says at the start and between epochs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefmix.training.diagnostics import report_identifiability, warn_of_collapse
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]


def test_opposed_groups_without_ids_are_called_unidentifiable_and_with_ids_are_not(
    make_trainer: Make, make_rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows(20, 12)
    with caplog.at_level(logging.WARNING, logger="prefmix"):
        finding = report_identifiability(make_trainer(data=rows))
    assert finding is not None and finding.identified and "identifiable" not in caplog.text
    anonymous = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    with caplog.at_level(logging.WARNING, logger="prefmix"):
        finding = report_identifiability(make_trainer(data=anonymous))
    assert finding is not None and not finding.identified and "not identifiable" in caplog.text


def test_one_expert_has_no_groups_to_find(make_trainer: Make) -> None:
    assert report_identifiability(make_trainer(num_experts=1)) is None


def test_a_dying_and_a_duplicated_expert_are_named_once_nothing_is_held(
    make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(num_experts=3, init="random")
    margins = torch.randn(48, 1, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, -1.0])
    trainer.em.evidence.update(torch.arange(48), torch.nn.functional.logsigmoid(margins))
    trainer.em.resp.copy_(torch.tensor([0.495, 0.495, 0.01]))
    trainer.hold_steps = 1
    with caplog.at_level(logging.WARNING, logger="prefmix"):
        warn_of_collapse(trainer)
        assert caplog.text == ""
        trainer.hold_steps = 0
        warn_of_collapse(trainer)
    assert "expert 2 explains 1.0%" in caplog.text and "experts 0 and 1 have the same margins" in caplog.text
