"""What a run says at the start and between epochs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefmix.training.config import MixtureConfig
from prefmix.training.diagnostics import (
    report_identifiability,
    warn_of_collapse,
    warn_of_overconfidence,
    warn_of_overfitting,
)
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


def test_a_column_that_looks_like_who_judged_is_one_warning(
    make_trainer: Make, make_rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{("annotator_id" if name == "user" else name): row[name] for name in row} for row in make_rows(4, 2)]
    with caplog.at_level(logging.WARNING, logger="prefmix"):
        trainer = make_trainer(data=rows, eval_data=rows)
    assert len(trainer.train_comparisons.table.users) == 0, "nothing is renamed by itself"
    assert caplog.text.count("column 'annotator_id' (4 values) looks like who judged") == 1


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


@pytest.mark.parametrize(
    ("label_noise", "remedy"), [(0.0, "; set label_noise"), (0.05, "; raise label_noise (now 0.05)")]
)
def test_posteriors_that_are_surer_than_people_are_consistent_get_a_remedy_at_the_end(
    make_trainer: Make, make_rows: Any, caplog: pytest.LogCaptureFixture, label_noise: float, remedy: str
) -> None:
    same = make_rows(8, 4, seed=1)
    fickle = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in same]
    options = {"eval_strategy": "epoch", "learning_rate": 0.05, "beta": 1.0, "init_hold_epochs": 2, "init": "labels"}
    options |= {"label_noise": label_noise, "save_strategy": "no", "overwrite_output_dir": True}
    for data, said in ((same, 0), (fickle, 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="prefmix"):
            make_trainer(eval_data=data, **options).train()
        assert caplog.text.count("label_noise") == said
        assert (remedy in caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([0.68, 0.60, 0.605], None),
        ([0.68, 0.60, 0.66], "ends at 0.660, worse than the 0.600 earlier in the run"),
        ([0.75, 0.72], "ends at 0.720, worse than the 0.693 of a coin"),
        ([0.70], None),
        ([], None),
    ],
)
def test_a_loss_that_rises_again_gets_a_remedy_at_the_end(
    make_trainer: Make, caplog: pytest.LogCaptureFixture, losses: list[float], said: str | None
) -> None:
    trainer = make_trainer()
    trainer.state.log_history = [{"eval_loss": loss, "eval_population_loss": loss} for loss in losses]
    with caplog.at_level(logging.WARNING, logger="prefmix"):
        warn_of_overfitting(trainer)
    assert (said is None and caplog.text == "") or (said is not None and said in caplog.text)


def test_where_noise_is_learnt_the_remedy_is_its_prior(make_trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    """`label_noise` only says where a learnt rate starts: to set it would change nothing."""
    trainer = make_trainer(label_noise_update="per_annotator", label_noise_prior=[1.2, 2.8])
    trainer.state.log_history = [{"eval_loss": 0.9, "eval_population_loss": 0.6}]
    with caplog.at_level(logging.WARNING, logger="prefmix"):
        warn_of_overconfidence(trainer)
    assert "label_noise is learnt (now 0.1 " in caplog.text and "set label_noise" not in caplog.text
    assert "give label_noise_prior more weight, such as [3, 9]" in caplog.text
    MixtureConfig(str(trainer.args.output_dir), label_noise_update="per_annotator", label_noise_prior=[3, 9])


def test_several_held_out_sets_and_none_at_all_end_in_peace(make_trainer: Make, make_rows: Any) -> None:
    sets = {"near": make_rows(8, 2, seed=1), "far": make_rows(8, 2, seed=2)}
    for data, strategy in ((sets, "epoch"), (None, "no")):
        fields = {"eval_strategy": strategy, "overwrite_output_dir": True, "save_strategy": "no"}
        assert make_trainer(eval_data=data, **fields).train().global_step == 12
