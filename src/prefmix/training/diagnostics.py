"""What a run warns people of: groups that cannot be found, collapse, texts learnt by heart, overconfidence."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from prefmix.data.comparisons import ComparisonTable
from prefmix.experts.trunk_cache import TrunkStates
from prefmix.mixture.bradley_terry import margins_of_log_lik
from prefmix.mixture.collapse import find_collapse
from prefmix.mixture.features import pool_features
from prefmix.mixture.identifiability import Identifiability, identifiability
from prefmix.training.noise_options import stronger_prior

if TYPE_CHECKING:
    from prefmix.training.trainer import MixtureTrainer

logger = logging.getLogger(__name__)

PROMPT_DIRECTIONS = 16
# Nats by which personalisation may lose before it is worth a line: less is the noise of a small held-out set.
LOSS_MARGIN = 0.01
COIN = math.log(2)  # nats of a coin


def report_identifiability(trainer: MixtureTrainer) -> Identifiability | None:
    """Says before training whether groups can be found in the rows; silent where they can.

    Returns:
        The finding, or None where the run has no cached states to judge by, or a single expert and so no groups.
    """
    states = trainer.train_comparisons.states
    if states is None or trainer.args.num_experts == 1:
        return None
    finding = judge_table(trainer.train_comparisons.table, states, trainer.args.probe_dim)
    if finding.level != "identified":
        logger.warning("prefmix: %s", finding.reason)
    return finding


def judge_table(table: ComparisonTable, states: TrunkStates, dim: int) -> Identifiability:
    """Identifiability of groups in a table, from the probe's features.

    Args:
        table: comparisons.
        states: pooled trunk states of its texts.
        dim: principal directions of the texts.
    """
    prompt_of_text = torch.from_numpy(table.texts.prompt_index)
    features = pool_features(states.completion_mean, dim, centre_by=prompt_of_text, spectrum_power=0.0).features
    prompts = states.prompt_mean
    return identifiability(
        features,
        torch.from_numpy(table.chosen),
        torch.from_numpy(table.rejected),
        torch.from_numpy(table.user),
        torch.from_numpy(table.prompt),
        pool_features(prompts, PROMPT_DIRECTIONS, spectrum_power=0.0).features if len(prompts) > 1 else None,
    )


def warn_of_collapse(trainer: MixtureTrainer) -> None:
    """Warns of experts that die or repeat each other, with a remedy, once responsibilities are no longer held."""
    if trainer.state.global_step < trainer.hold_steps or not trainer.args.should_log:
        return
    usage = trainer.em.mean_resp().mean.cpu()
    # Under `pair` no likelihoods are kept, so copies are looked for among users' rows only.
    margins = margins_of_log_lik(trainer.em.evidence.table.cpu())
    for warning in find_collapse(usage, margins[trainer.em.evidence.visited.cpu()]):
        logger.warning("prefmix: %s", warning.message)


def warn_of_overfitting(trainer: MixtureTrainer) -> None:
    """Warns where the last held-out loss is worse than a coin's, or than it was earlier in the run.

    Not where the best loss's checkpoint is what remains.
    """
    if trainer.args.load_best_model_at_end and str(trainer.args.metric_for_best_model).endswith("loss"):
        return
    curves: dict[str, list[float]] = {}
    for line in trainer.state.log_history:
        for name in line:
            if name.endswith("population_loss"):
                own = name.replace("population_loss", "loss")
                curves.setdefault(own, []).append(line[own])
    for losses in curves.values():
        last, best = losses[-1], min(losses)
        if not trainer.args.should_log or last <= min(best, COIN) + LOSS_MARGIN:
            continue
        before = f"{best:.3f} earlier in the run" if best < COIN else f"{COIN:.3f} of a coin"
        logger.warning(
            "prefmix: held-out log-loss ends at %.3f, worse than the %s: the experts have learnt these texts by heart, "
            "and may write badly; %s; `prefmix diagnose HELD_OUT_ROWS --policy RUN` says more",
            *(last, before, remedy_of_overfitting(trainer.args.learning_rate)),
        )
        return


def remedy_of_overfitting(learning_rate: float | None = None) -> str:
    """What to train otherwise; `learning_rate` as it was, where it is known."""
    now = "" if learning_rate is None else f" (now {learning_rate:g})"
    return (
        f"train fewer epochs (load_best_model_at_end keeps the best), halve learning_rate{now}, or set "
        "token_dropout=0.5 or sft_weight=0.5"
    )


def warn_of_overconfidence(trainer: MixtureTrainer) -> None:
    """Warns where users' posteriors predicted the last held-out rows worse than the gate alone did."""
    last = {name: value for line in trainer.state.log_history for name, value in line.items()}
    suffix = "population_loss"
    held_out = [(last[name.replace(suffix, "loss")], last[name]) for name in last if name.endswith(suffix)]
    worse = [(personal, gate) for personal, gate in held_out if personal > gate + LOSS_MARGIN]
    if not worse or not trainer.args.should_log:
        return
    logger.warning(
        "prefmix: held-out log-loss is %.3f with each user's posterior and %.3f with the gate alone: posteriors are "
        "surer than people are consistent; %s",
        *(*worse[0], _remedy_of_overconfidence(trainer)),
    )


def _remedy_of_overconfidence(trainer: MixtureTrainer) -> str:
    """Noise as given is given higher; where it is learnt from rows that experts have come to fit, its prior is."""
    args, learnt = trainer.args, trainer.em.noise
    if learnt is not None:
        stronger = stronger_prior(args.label_noise_prior)
        return (
            f"label_noise is learnt (now {learnt.population:.2g} on training rows, which the experts fit): train fewer "
            f"epochs, or give label_noise_prior more weight, such as [{stronger[0]:g}, {stronger[1]:g}]"
        )
    noise = args.label_noise
    remedy = f"raise label_noise (now {noise:g})" if noise else "set label_noise"
    share = min(2 * noise, 0.4) if noise else 0.1
    return f"{remedy} to the share of judgements that may be flipped, such as {share:g}"
