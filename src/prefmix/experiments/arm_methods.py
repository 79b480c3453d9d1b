"""How each kind of arm is fitted: `METHODS` by the name that `Arm.method` gives.

Legend: U users, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefmix.data.comparisons import ComparisonTable
from prefmix.evaluation.evaluator import score_table
from prefmix.evaluation.scoring import Predictions, predict, reference_predictions, score_rows
from prefmix.experiments.arm_predictions import Fitted, NewUsers, Ways, fitted_policy
from prefmix.experiments.arms import Arm, Method
from prefmix.experiments.baselines import Splits, fit_arm, table_states
from prefmix.experiments.linear_arms import fitted_low_rank_reward, fitted_probe
from prefmix.experiments.linear_latent import fitted_latent
from prefmix.experiments.mixed_logit import SpreadCallback
from prefmix.experiments.per_user import (
    PerUserTrainer,
    PullToStart,
    labelled_by_user,
    own_expert_log_weights,
    users_with_expert,
)
from prefmix.experts.base_model import BaseModel
from prefmix.experts.build import build_experts
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.policy.modular import soup
from prefmix.training.trainer import MixtureTrainer


@dataclass(frozen=True)
class Workplace:
    """What all arms of one seed share.

    Attributes:
        base: the base model.
        splits: tables of this seed.
        options: fields of `MixtureConfig` for all arms.
        output_dir: folder of runs; each is removed when it is done.
        seed: of heads, order and starts.
    """

    base: BaseModel
    splits: Splits
    options: Mapping[str, Any]
    output_dir: Path
    seed: int
    _states: dict[int, TrunkStates] = field(default_factory=dict, repr=False)

    def states(self, table: ComparisonTable) -> TrunkStates:
        """Cached trunk states of a table's texts."""
        if id(table) not in self._states:
            self._states[id(table)] = table_states(table, self.base, self.options)
        return self._states[id(table)]

    def train(
        self,
        arm: Arm,
        splits: Splits | None = None,
        *,
        trainer_class: type[MixtureTrainer] = MixtureTrainer,
        prepare: Callable[[MixtureTrainer], None] | None = None,
    ) -> Any:
        """`fit_arm` here."""
        return fit_arm(
            arm,
            splits or self.splits,
            self.base,
            self.options,
            seed=self.seed,
            output_dir=self.output_dir,
            trainer_class=trainer_class,
            prepare=prepare,
        )


def fit(arm: Arm, place: Workplace) -> Fitted:
    """Fits one arm to the training rows; validation rows choose the epoch, test rows are not read."""
    return METHODS[arm.method](arm, place)


def _trainer(arm: Arm, place: Workplace) -> Fitted:
    found = place.train(arm)
    robust = found.policy.record.get("robust")
    notes = {} if robust is None else {"largest_group_weight": robust["largest_weight"]}
    return fitted_policy(found.policy, true_groups=arm.true_groups, epoch=found.epoch, notes=notes)


def _reference(arm: Arm, place: Workplace) -> Fitted:
    untrained = build_experts(
        place.base.model, {"kind": "shared_base", "branch_depth": 0, "num_experts": 1, "head": "hidden", "rank": 1}
    )

    def of_reference(table: ComparisonTable) -> Predictions:
        with torch.no_grad():
            return reference_predictions(score_rows(untrained, table, beta=[1.0], states=place.states(table)))

    def ways(table: ComparisonTable, states: TrunkStates) -> Ways:
        found = of_reference(table)
        return Ways(found, found, found)

    def of_new_users(new: NewUsers, states: TrunkStates) -> dict[int, Predictions]:
        found = of_reference(new.table)
        return dict.fromkeys(new.sizes, Predictions(found.log_prob[new.scored], found.logit[new.scored]))

    return Fitted(ways, of_new_users)


def _mixed_logit(arm: Arm, place: Workplace) -> Fitted:
    found = place.train(arm, prepare=lambda trainer: trainer.add_callback(SpreadCallback(trainer)))
    notes = {"beta_spread": found.policy.config.feedback_model.beta_spread}
    return fitted_policy(found.policy, epoch=found.epoch, notes=notes)


def _soup(arm: Arm, place: Workplace) -> Fitted:
    found = place.train(arm)
    return fitted_policy(soup(found.policy), epoch=found.epoch)


def _probe(arm: Arm, place: Workplace) -> Fitted:
    return _fit_linear(fitted_probe, arm, place)


def _low_rank_reward(arm: Arm, place: Workplace) -> Fitted:
    return _fit_linear(fitted_low_rank_reward, arm, place, user_variance=arm.setting("user_variance"))


def _latent(arm: Arm, place: Workplace) -> Fitted:
    return _fit_linear(fitted_latent, arm, place)


def _fit_linear(fit: Callable[..., Fitted], arm: Arm, place: Workplace, **own: Any) -> Fitted:
    """As many linear rewards as the mixture has experts, on the probe's directions of the training texts' states."""
    table, options = place.splits.train, {"probe_dim": 64, **place.options, **arm.options}
    return fit(
        table,
        place.states(table),
        num_rewards=options["num_experts"],
        dim=options["probe_dim"],
        ridge=arm.setting("ridge"),
        seed=place.seed,
        **own,
    )


def _per_user(arm: Arm, place: Workplace) -> Fitted:
    """Single DPO first, then an expert for each user from there."""
    single = place.train(replace(arm, name=f"{arm.name}, start"))
    user_expert = users_with_expert(place.splits.train, arm.setting("max_users"))
    count = int(user_expert.max()) + 1
    if count < 1:
        raise ValueError("per_user: no training row names a user; add the column `user`, or leave this arm out")
    labelled = [
        None if table is None else labelled_by_user(table, user_expert)
        for table in (place.splits.train, place.splits.validation)
    ]
    assert labelled[0] is not None
    splits = Splits(labelled[0], labelled[1] if labelled[1] is not None and len(labelled[1]) else None, labelled[0])

    def prepare(trainer: MixtureTrainer) -> None:
        assert isinstance(trainer, PerUserTrainer)
        trainer.user_expert = user_expert
        for expert in range(count):
            trainer.mixture.experts.load_expert_state(expert, single.policy.model.experts.expert_state(0))
        trainer.add_callback(PullToStart(trainer.mixture.experts, arm.setting("shrinkage")))

    own = {"num_experts": count, "init": "labels", "init_hold_epochs": 1e6, "latent": "user"}
    each = place.train(
        replace(arm, options={**arm.options, **own}), splits, trainer_class=PerUserTrainer, prepare=prepare
    )
    start = fitted_policy(single.policy)

    def ways(table: ComparisonTable, states: TrunkStates) -> Ways:
        alike = start.predict(table, states)
        known = (table.user >= 0) & (table.user < len(user_expert))
        expert = np.where(known, user_expert[np.where(known, table.user, 0)], -1)
        scores = score_table(each.policy, table, states=states).scores
        personal = predict(own_expert_log_weights(expert, count), scores)
        chosen = [np.where(expert >= 0, mine, all_) for mine, all_ in zip(personal, alike.population, strict=True)]
        return Ways(alike.reference, alike.population, Predictions(*chosen))

    notes = {"users_with_expert": count, "users": len(user_expert), "shrinkage": arm.setting("shrinkage")}
    return Fitted(ways, start.predict_new, each.epoch, notes)


METHODS: dict[Method, Callable[[Arm, Workplace], Fitted]] = {
    "trainer": _trainer,
    "reference": _reference,
    "mixed_logit": _mixed_logit,
    "per_user": _per_user,
    "soup": _soup,
    "probe": _probe,
    "low_rank_reward": _low_rank_reward,
    "latent": _latent,
}
