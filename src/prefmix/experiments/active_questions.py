"""How many questions does asking well save? New users of linear experts, the same answers for both ways of asking.

    python -m prefmix.experiments.active_questions

Legend: U users, C candidate questions, K experts, P features, T questions asked.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.data.simulated_texts import feature_pools
from prefmix.data.simulation import simulate
from prefmix.data.simulation_options import Layout, SimulationOptions
from prefmix.data.simulation_oracle import true_probability
from prefmix.mixture.linear_em import ProbeData, fit_linear_em
from prefmix.mixture.questions import answer_information


class Curves(NamedTuple):
    """Held-out log-loss of every user after 0..T questions, nats, expected under the users' true probabilities.

    Attributes:
        active: [U, T+1] the most informative question each time.
        random: [U, T+1] questions in random order.
    """

    active: np.ndarray
    random: np.ndarray

    def as_good_as(self, asked: int) -> int:
        """How many random questions are as good in the mean as `asked` active ones; T + 1 where none are enough."""
        enough = np.flatnonzero(self.random.mean(axis=0) <= self.active.mean(axis=0)[asked])
        return int(enough[0]) if len(enough) else self.random.shape[1]

    def to_dict(self, asked: int = 5) -> dict[str, Any]:
        """JSON form: means, and the paired difference after `asked` active and 10 random questions."""
        difference = self.active[:, asked] - self.random[:, min(10, self.random.shape[1] - 1)]
        return {
            "active": self.active.mean(axis=0).round(4).tolist(),
            "random": self.random.mean(axis=0).round(4).tolist(),
            f"random_questions_as_good_as_{asked}": self.as_good_as(asked),
            f"active_{asked}_minus_random_10": float(difference.mean()),
            "standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
        }


def active_against_random(
    num_experts: int = 4,
    layout: Layout = "orthogonal",
    *,
    num_users: int = 500,
    num_candidates: int = 200,
    num_questions: int = 30,
    num_features: int = 8,
    fitted: bool = True,
    seed: int = 0,
) -> Curves:
    """Asks new users from one fixed pool of candidates.

    Args:
        num_experts: K.
        layout: of the tastes.
        num_users: U new users.
        num_candidates: C.
        num_questions: T.
        num_features: P.
        fitted: experts are fitted to 300 other users with 16 comparisons each; False: the true tastes.
        seed: of everything.
    """
    options = SimulationOptions(num_experts, layout, num_users=300, comparisons_per_user=16, num_new_users=num_users)
    simulated = simulate(feature_pools(num_features, seed=seed), options, seed)
    log_weights = torch.full((num_experts,), 1.0 / num_experts).double().log()
    tastes = torch.from_numpy(simulated.tastes)
    if fitted:
        log_weights, tastes = _fit(simulated.judged["train"], num_experts, seed)
    rng = np.random.default_rng([seed, 3])
    first, second = simulated.pools["train"].draw_pairs(num_candidates, rng)
    attributes = simulated.pools["train"].attributes
    pool = torch.from_numpy(attributes[first] - attributes[second])
    truth = torch.from_numpy(simulated.weights[options.num_users :] @ simulated.tastes)
    # One answer of each user to each candidate, whoever asks when: the two ways of asking differ in order alone.
    says_first = torch.from_numpy(rng.random((num_users, num_candidates))) < torch.sigmoid(truth @ pool.T)
    margins = pool @ tastes.T
    held_out = simulated.judged["new_users"]
    scored = _Scored(
        torch.from_numpy(held_out.user - options.num_users),
        torch.from_numpy(held_out.difference) @ tastes.T,
        torch.from_numpy(true_probability(held_out, simulated.weights[held_out.user], options)),
    )
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(num_candidates), (num_users, 1)), axis=1))
    by_chance = _ask(margins, says_first, log_weights, scored, num_questions, order)
    return Curves(_ask(margins, says_first, log_weights, scored, num_questions, None), by_chance)


class _Scored(NamedTuple):
    """Held-out comparisons of the new users: who, margins under the experts, true probability of the first."""

    user: Int[Tensor, "B"]
    margins: Float[Tensor, "B K"]
    truth: Float[Tensor, "B"]


def _fit(judged: Any, num_experts: int, seed: int) -> tuple[Tensor, Tensor]:
    difference = torch.from_numpy(judged.difference * judged.answer[:, None])
    data = ProbeData(
        difference, torch.from_numpy(judged.user), torch.ones(len(difference)).double(), int(judged.user.max()) + 1
    )
    generator = torch.Generator().manual_seed(seed)
    fit = fit_linear_em(data, num_experts, torch.ones(4), anneal=4.0, generator=generator, max_steps=60)
    best = int(fit.penalised.argmax())
    return fit.log_weights[best], fit.coefficients[best]


def _ask(
    margins: Float[Tensor, "C K"],
    says_first: Tensor,
    log_weights: Float[Tensor, "K"],
    scored: _Scored,
    num_questions: int,
    order: Int[Tensor, "U C"] | None,
) -> np.ndarray:
    """[U, T+1] losses; `order` None asks what says most, given what the user has answered."""
    num_users, num_candidates = says_first.shape
    log_post = log_weights.expand(num_users, -1).clone()
    log_first, log_second = logsigmoid(margins), logsigmoid(-margins)
    asked = torch.zeros(num_users, num_candidates, dtype=torch.bool)
    losses, people = [_loss(log_post, scored, num_users)], torch.arange(num_users)
    for step in range(num_questions):
        if order is not None:
            question = order[:, step]
        else:
            information = torch.stack(
                [answer_information(own.expand(num_candidates, -1), log_first, log_second) for own in log_post]
            )
            question = information.masked_fill(asked, -1.0).argmax(dim=1)
        asked[people, question] = True
        answered = torch.where(says_first[people, question].unsqueeze(1), log_first[question], log_second[question])
        log_post = torch.log_softmax(log_post + answered, dim=1)
        losses.append(_loss(log_post, scored, num_users))
    return torch.stack(losses, dim=1).numpy()


def _loss(log_post: Float[Tensor, "U K"], scored: _Scored, num_users: int) -> Float[Tensor, "U"]:
    """Mean over a user's held-out comparisons of -E log p(answer), under the true probabilities."""
    own = log_post[scored.user]
    log_first = torch.logsumexp(own + logsigmoid(scored.margins), dim=1)
    log_second = torch.logsumexp(own + logsigmoid(-scored.margins), dim=1)
    loss = -(scored.truth * log_first + (1.0 - scored.truth) * log_second)
    count = torch.bincount(scored.user, minlength=num_users)
    return torch.zeros(num_users, dtype=loss.dtype).index_add(0, scored.user, loss) / count


def main() -> None:
    """Prints the figures of the lab notes as JSON."""
    found = {}
    for num_experts, layout in ((2, "opposed"), (4, "orthogonal"), (6, "orthogonal")):
        for fitted in (True, False):
            name = f"{num_experts} {layout}, {'fitted' if fitted else 'true'} experts"
            found[name] = active_against_random(num_experts, layout, fitted=fitted).to_dict()  # type: ignore[arg-type]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
