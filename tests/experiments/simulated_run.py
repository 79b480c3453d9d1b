"""What a run of many rows leaves behind, made up in the shapes of the real thing: no model is trained."""

from __future__ import annotations

import math

import numpy as np

from prefmix.evaluation.baselines import Baselines
from prefmix.evaluation.figures import Divergence, ExpertRows
from prefmix.evaluation.intervals import paired_difference
from prefmix.evaluation.metrics import hits
from prefmix.evaluation.report import EvaluationReport, figures
from prefmix.evaluation.scoring import Predictions
from prefmix.experiments.diagnose_experts import ScoredRows, diagnose_scored
from prefmix.experiments.diagnosis import Diagnosis
from prefmix.experiments.run_data import Dispute, Example, Gain, GateView, People, RunData
from prefmix.experiments.verdicts import verdicts

NASTY = "</script><img src=x onerror=\"document.title='broken'\"> & 'quotes'"


def simulated_run(
    num_rows: int = 50_000, num_users: int = 5_000, num_experts: int = 3, steps: int = 6_000, seed: int = 0
) -> RunData:
    """A run whose users belong to one of K tastes, with a log line every other step."""
    rng = np.random.default_rng(seed)
    taste = rng.integers(num_experts, size=num_users)
    logits = rng.gumbel(size=(num_users, num_experts)) * 1.5
    logits[np.arange(num_users), taste] += 3.0
    weights = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    user = rng.integers(num_users, size=num_rows)
    margins = rng.normal(scale=1.5, size=(num_rows, num_experts))
    margins[np.arange(num_rows), taste[user]] += 1.2
    chosen = margins / 2 + rng.normal(scale=0.4, size=margins.shape)
    row_weights = weights[user]
    probability = 1 / (1 + np.exp(-margins))
    experts = ExpertRows(
        chosen, chosen - margins, 0.02 * chosen, 0.02 * (chosen - margins), row_weights, rng.normal(size=num_rows), user
    )
    # Intervals over forty clusters instead of thousands of people: resampling would take minutes.
    evaluation = _evaluation(probability, row_weights, taste[user], user % 40, num_users)
    scored = ScoredRows(chosen, chosen - margins, probability, row_weights, user, experts.length_difference)
    groups = [f"taste {k}" for k in taste]
    rows = [(f"{NASTY} {k}", 100 + k, weights[taste == k].mean(axis=0).tolist()) for k in range(num_experts)]
    mine, theirs = evaluation.predictions["personalised"].logit, evaluation.predictions["population"].logit
    texts = ["A long answer. " * 30, NASTY, "short", "mixed"][: num_experts + 1]
    example = Example(
        "Where is the sun?", "system: Be kind.\nuser: Where is the sun?",
        [f"expert {k}" for k in range(num_experts)] + ["the mixture"],
        texts + ["x"] * (num_experts + 1 - len(texts)),
        rng.random((num_experts, num_experts + 1)).tolist(), [1 / (num_experts + 1)] * (num_experts + 1),
    )  # fmt: skip
    even = [1 / num_experts] * num_experts
    return RunData(
        name=f"simulated run {NASTY}",
        facts={"base model": "none", "trained on": f"{num_rows:,} rows, {num_users:,} users", "seed": str(seed)},
        num_experts=num_experts,
        cost={"training, wall clock": "1 h 02 min", "peak memory": "2.00 GiB"},
        log=_log(num_experts, steps, rng),
        evaluation=evaluation,
        verdicts=verdicts(evaluation),
        gains={"the gate alone": Gain(*(paired_difference(f(mine), f(theirs), user % 40) for f in (hits, _losses)))},
        people=People(weights, [f"user {u}" for u in range(num_users)], groups),
        gate=[GateView("By prompt", rows, "Each prompt."), GateView("By age", rows, "The gate alone.")],
        experts=experts,
        disputes=[Dispute(NASTY, NASTY, "a " * 250, "b", "anna", even, even)] * 3,
        examples=[example] * 4,
        divergence=[Divergence(3.0 + k, 0.4, 16, 48.0) for k in range(num_experts)],
        diagnosis=Diagnosis("the run", diagnose_scored(scored)),
        source="held_out.jsonl",
    )


def _losses(logit: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, -logit)


def _evaluation(
    probability: np.ndarray, weights: np.ndarray, group: np.ndarray, user: np.ndarray, num_users: int
) -> EvaluationReport:
    num_experts, rng = probability.shape[1], np.random.default_rng(1)
    names = [f"taste {k}" for k in range(num_experts)]

    def predictions(w: np.ndarray) -> Predictions:
        p = (w * probability).sum(axis=1).clip(1e-9, 1 - 1e-9)
        return Predictions(np.log(p), np.log(p) - np.log1p(-p))

    population = predictions(np.full_like(weights, 1 / num_experts))
    ways = {
        "untrained": Predictions(np.full(len(user), -math.log(2)), np.zeros(len(user))),
        "likelier": Predictions(np.full(len(user), np.nan), rng.normal(size=len(user))),
        "longer": Predictions(np.full(len(user), np.nan), rng.normal(size=len(user)) - 0.3),
        "population": population,
        "personalised": predictions(weights),
    }
    found = {name: figures(p, user, group, names) for name, p in ways.items()}
    blend = {n: predictions(weights * (n / 16) + (1 - n / 16) / num_experts) for n in (0, 1, 2, 4, 8, 16)}
    return EvaluationReport(
        name="this run", num_comparisons=len(user), num_users=num_users, num_texts=2 * len(user),
        baselines=Baselines(*(found[name] for name in Baselines._fields)),
        population=found["population"], personalised=found["personalised"],
        num_known_rows=len(user), new_users={n: figures(p, user, group, names) for n, p in blend.items()},
        new_users_met=True, expert_accuracy=[0.6] * num_experts, agreement=None, usage=weights.mean(axis=0).tolist(),
        predictions=ways, user=user,
    )  # fmt: skip


def _log(num_experts: int, steps: int, rng: np.random.Generator) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []
    for step in range(2, steps + 1, 2):
        done = step / steps
        usage = np.exp(done * np.arange(num_experts))
        usage /= usage.sum()
        line = {
            "step": float(step), "loss": 0.7 - 0.2 * done,
            "mixture/elbo": -0.72 + 0.25 * done + 0.01 * rng.normal(), "mixture/evidence": -0.69 + 0.24 * done,
            "mixture/responsibility_entropy": (1 - done) * math.log(num_experts), "mixture/gate_entropy": 0.9,
        }  # fmt: skip
        for k in range(num_experts):
            line[f"mixture/usage_{k}"] = float(usage[k])
            line[f"mixture/rewards/margins_{k}"] = done * (k + 1) + 0.05 * rng.normal()
        lines.append(line)
        if step % (steps // 6) == 0:
            lines.append(
                {"step": float(step), "eval_loss": 0.69 - 0.2 * done, "eval_population_loss": 0.69 - 0.03 * done}
            )
    return lines
