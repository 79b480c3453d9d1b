"""Users who blend experts: continuous groups against one type a user, one reward for all, and Bayes' rule.

    python recipes/continuous_users/run.py --seeds 0 1 2 3 4 5 6 7 8 9 --output results.json

Linear rewards, simulated users; README.md beside this file says what to expect. No fit reads true experts or weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import calibration
import torch
from torch import Tensor

from prefmix.mixture.linear_em import ProbeData, fit_linear_em
from prefmix.mixture.membership import GaussianQ, active_units, standard_draws
from prefmix.mixture.membership_em import LinearMembership, fit_membership, linear_rows, membership_predict
from prefmix.mixture.membership_fit import fit_users
from prefmix.mixture.user_encoder import encode, fit_encoder

FEATURES, EXPERTS, SCALE, RIDGE = 8, 3, 3.0, 1.0
TEST_ROWS = 32
COUNTS = (4, 8, 16, 32)
BAYES_DRAWS = 2000


class Users(NamedTuple):
    """Users, their comparisons, and fresh ones.

    Attributes:
        weights: [G, K] true weights.
        data: their comparisons.
        test_user: [T] user of each fresh comparison.
        test: [T, P] differences of the fresh comparisons.
        truth: [T] true probability that the first text wins.
    """

    weights: Tensor
    data: ProbeData
    test_user: Tensor
    test: Tensor
    truth: Tensor

    def accuracy(self, log_odds: Tensor) -> float:
        """Expected accuracy on fresh comparisons, with their true probabilities."""
        return torch.where(log_odds > 0, self.truth, 1 - self.truth).mean().item()

    def first_rows(self, count: int) -> ProbeData:
        """The first `count` comparisons of every user."""
        rows = torch.arange(len(self.data.group)) % (len(self.data.group) // self.data.num_groups) < count
        return self.data.select(rows)


def simulate(num_users: int, per_user: int, alpha: float, experts: Tensor, generator: torch.Generator) -> Users:
    """Weights ~ Dirichlet(alpha); each comparison is judged by an expert drawn by its user's weights."""
    concentration = torch.full((num_users, EXPERTS), alpha, dtype=torch.float64)
    gamma = torch._standard_gamma(concentration, generator=generator)
    weights = gamma / gamma.sum(1, keepdim=True)
    user, test_user = (torch.arange(num_users).repeat_interleave(count) for count in (per_user, TEST_ROWS))
    difference, test = (
        torch.randn(len(rows), FEATURES, generator=generator, dtype=torch.float64) for rows in (user, test_user)
    )
    judge = torch.multinomial(weights[user], 1, generator=generator)[:, 0]
    p = (difference * experts[judge]).sum(1).sigmoid()
    won = torch.rand(len(user), generator=generator, dtype=torch.float64) < p
    difference = torch.where(won.unsqueeze(1), difference, -difference)
    data = ProbeData(difference, user, torch.ones(len(user), dtype=torch.float64), num_users)
    truth = (weights[test_user] * (test @ experts.T).sigmoid()).sum(1)
    return Users(weights, data, test_user, test, truth)


def bayes_weights(data: ProbeData, experts: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """[G, K] posterior mean weights under the true experts and the true prior (importance sampling from the prior)."""
    concentration = torch.full((BAYES_DRAWS, EXPERTS), alpha, dtype=torch.float64)
    gamma = torch._standard_gamma(concentration, generator=generator)
    draws = gamma / gamma.sum(1, keepdim=True)
    p = (data.difference @ experts.T).sigmoid() @ draws.T
    log_lik = p.new_zeros(data.num_groups, BAYES_DRAWS).index_add(0, data.group, p.log())
    return torch.softmax(log_lik, dim=1) @ draws


def by_weights(users: Users, weights: Tensor, experts: Tensor) -> float:
    """Accuracy of known weights [G, K] over given experts."""
    p = (weights[users.test_user] * (users.test @ experts.T).sigmoid()).sum(1)
    return users.accuracy(p - 0.5)


def by_membership(users: Users, model: LinearMembership, q: GaussianQ) -> float:
    """Accuracy of continuous groups."""
    return users.accuracy(membership_predict(model, users.test, q.select(users.test_user)))


def run_seed(seed: int, alpha: float, args: argparse.Namespace) -> dict[str, Any]:
    """One data set: all arms on known users, fit and encoder on new ones."""
    generator = torch.Generator().manual_seed(1000 * seed + int(100 * alpha))
    square = torch.randn(FEATURES, EXPERTS, generator=generator, dtype=torch.float64)
    experts = SCALE * torch.linalg.qr(square).Q.T
    users = simulate(args.users, max(COUNTS), alpha, experts, generator)
    new = simulate(args.users, max(COUNTS), alpha, experts, generator)
    start = time.process_time()
    single = fit_linear_em(users.data, 1, torch.tensor([RIDGE]), anneal=1.0, generator=torch.Generator())
    discrete = fit_linear_em(
        users.data, EXPERTS, torch.full((8,), RIDGE), anneal=4.0, generator=torch.Generator().manual_seed(seed)
    )
    best = int(discrete.penalised.argmax())
    fit = fit_membership(
        users.data, EXPERTS, EXPERTS - 1, ridge=RIDGE, samples=args.samples, max_steps=args.steps,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    everybody = torch.ones(args.users, 1, dtype=torch.float64)
    known = {
        "single": by_weights(users, everybody, single.coefficients[0]),
        "user": by_weights(users, discrete.log_resp[best].exp(), discrete.coefficients[best]),
        "membership": by_membership(users, fit.model, fit.q),
        "bayes": by_weights(users, bayes_weights(users.data, experts, alpha, generator), experts),
        "true_weights": by_weights(users, users.weights, experts),
    }
    return {
        "seed": seed,
        "alpha": alpha,
        "known": known,
        "new": new_users(new, users, fit.model, experts, alpha, generator, args),
        "active_variance": active_units(fit.q.mean).variance.tolist(),
        "elbo_per_row": fit.elbo / len(users.data.group),
        "user_evidence_per_row": float(discrete.log_evidence[best]) / len(users.data.group),
        "cpu_seconds": time.process_time() - start,
    }


def new_users(
    new: Users,
    users: Users,
    model: LinearMembership,
    experts: Tensor,
    alpha: float,
    generator: torch.Generator,
    args: argparse.Namespace,
) -> dict[str, list[float]]:
    """Accuracy for users nobody trained on, by their number of comparisons: fitted, encoded, and Bayes' rule."""
    small = LinearMembership(*(part.float() for part in model[:3]), model.combine)
    train = linear_rows(small, users.data._replace(difference=users.data.difference.float()))
    encoder = fit_encoder(train, train.score, small.loading, "mixture", steps=args.encoder_steps)
    noise = standard_draws(args.samples, EXPERTS - 1)
    found: dict[str, list[float]] = {"count": list(COUNTS), "fitted": [], "encoder": [], "bayes": []}
    for count in COUNTS:
        data = new.first_rows(count)
        found["fitted"].append(
            by_membership(new, model, fit_users(linear_rows(model, data), model.loading, "mixture", noise).q)
        )
        rows = linear_rows(small, data._replace(difference=data.difference.float()))
        with torch.no_grad():
            q = encode(encoder, rows, rows.score)
        found["encoder"].append(by_membership(new, model, GaussianQ(q.mean.double(), q.log_std.double())))
        found["bayes"].append(by_weights(new, bayes_weights(data, experts, alpha, generator), experts))
    return found


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds with 95% intervals of paired differences, one entry for each alpha."""
    lines = []
    for alpha in sorted({result["alpha"] for result in results}):
        runs = [result for result in results if result["alpha"] == alpha]
        known = {arm: torch.tensor([run["known"][arm] for run in runs]) for arm in runs[0]["known"]}
        gap = (known["membership"] - known["single"]) / (known["bayes"] - known["single"])
        gap_true = (known["membership"] - known["single"]) / (known["true_weights"] - known["single"])
        new = {
            name: torch.tensor([run["new"][name] for run in runs]).double().mean(0).tolist() for name in runs[0]["new"]
        }
        lines.append(
            {
                "alpha": alpha,
                "seeds": len(runs),
                **{arm: values.mean().item() for arm, values in known.items()},
                "membership_minus_user": _paired(known["membership"] - known["user"]),
                "membership_minus_single": _paired(known["membership"] - known["single"]),
                "gap_closed_to_bayes": _paired(gap),
                "gap_closed_to_true_weights": _paired(gap_true),
                "new": new,
            }
        )
    return lines


def _paired(values: Tensor) -> dict[str, float]:
    half = 0.0 if len(values) < 2 else 1.96 * values.std().item() / len(values) ** 0.5
    return {"mean": values.mean().item(), "low": values.mean().item() - half, "high": values.mean().item() + half}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs all seeds and alphas, then simulation-based calibration; prints and writes after every seed."""
    args = _parser().parse_args(arguments)
    results: list[dict[str, Any]] = []
    report: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "output"}}
    report["calibration"] = calibration.run(args.calibration_users, args.calibration_draws)
    print(json.dumps(report["calibration"]), flush=True)
    for seed in args.seeds:
        results += [run_seed(seed, alpha, args) for alpha in args.alphas]
        report |= {"summary": summary(results), "runs": results, "cpu_seconds": time.process_time()}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(report["summary"]), flush=True)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Continuous users over linear experts.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.5, 1.0], help="Dirichlet concentrations")
    parser.add_argument("--users", type=int, default=375, help="times 32 comparisons: 12,000")
    parser.add_argument("--samples", type=int, default=8, help="fixed draws of the bound")
    parser.add_argument("--steps", type=int, default=80, help="of L-BFGS")
    parser.add_argument("--encoder-steps", type=int, default=300)
    parser.add_argument("--calibration-users", type=int, default=2000)
    parser.add_argument("--calibration-draws", type=int, default=1000, help="importance draws for each user")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "continuous_users.json")
    return parser


if __name__ == "__main__":
    main()
