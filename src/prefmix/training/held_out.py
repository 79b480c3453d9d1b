"""Held-out loss and accuracy during training. Legend: B comparisons, U users, K experts."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from transformers import EvalPrediction

from prefmix.evaluation.metrics import accuracy, log_loss
from prefmix.evaluation.scoring import Predictions, predict, score_texts
from prefmix.evaluation.weights import known_user_log_weights, population_log_weights
from prefmix.training.final_gate import ends_with_a_fit, final_gate
from prefmix.training.population_gate import unknown_user_log_weights
from prefmix.training.result import population_noise, training_log_lik
from prefmix.training.setup import Comparisons

if TYPE_CHECKING:
    from prefmix.training.trainer import MixtureTrainer


def held_out_metrics(trainer: MixtureTrainer, comparisons: Comparisons, prefix: str) -> dict[str, float]:
    """Figures of one held-out set, weighted by row.

    `loss` and `accuracy` use what a policy would use: the posterior from the training rows for a known user, the gate
    for everybody else, with its last M-step (`final_gate`: one more pass over the training rows). `population_loss`
    and `population_accuracy` use the gate alone. A coin has loss log 2 = 0.693.

    Args:
        trainer: its experts, gate and running evidence as they stand.
        comparisons: the held-out rows; they are never written into the evidence.
        prefix: of the names, for example `eval`.
    """
    start = time.perf_counter()
    table = comparisons.table
    users, noise = trainer.running_user_state(), population_noise(trainer)
    scores = score_texts(
        trainer.readings.of(comparisons),
        table,
        beta=trainer.args.betas,
        feedback=replace(trainer.args.feedback_model, label_noise=noise),
        noise=users.rates(table.user.tolist(), noise),
    )
    gate = trainer.mixture.gate
    if ends_with_a_fit(gate, trainer.args, trainer.latent):
        gate = final_gate(trainer, training_log_lik(trainer))
    terms = unknown_user_log_weights(gate, comparisons)
    population = population_log_weights(gate, terms)
    personal = known_user_log_weights(gate, trainer.latent, users, terms, table.user)
    with_user, without_user = predict(personal, scores), predict(population, scores)
    metrics = _figures(with_user, table.weight, "") | _figures(without_user, table.weight, "population_")
    metrics["rewards/accuracies"] = metrics["accuracy"]  # TRL's name of it
    if trainer.compute_metrics is not None:
        probability = np.exp(with_user.log_prob)
        metrics |= trainer.compute_metrics(EvalPrediction(probability, np.ones(len(table))))
    seconds = time.perf_counter() - start
    metrics |= {"runtime": seconds, "samples_per_second": len(table) / seconds}
    return {name if name.startswith(prefix) else f"{prefix}_{name}": value for name, value in metrics.items()}


def _figures(predictions: Predictions, weight: np.ndarray, prefix: str) -> dict[str, float]:
    return {
        f"{prefix}loss": log_loss(predictions.log_prob, weight),
        f"{prefix}accuracy": accuracy(predictions.logit, weight),
    }
