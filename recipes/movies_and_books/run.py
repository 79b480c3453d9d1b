"""Movies and books: a prompt gate over two experts, then a metadata gate over the same experts, none retrained.

    python recipes/movies_and_books/run.py --model smollm2

README.md beside this file says what to expect. A run that is stopped goes on with the next seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from domains import DOMAINS, Sizes, draw_rows
from routing import expert_of_domain, experts_hash, fit_classifier, share_of_oracle
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.evaluation.intervals import nested_bootstrap, paired_difference
from prefmix.evaluation.metrics import hits
from prefmix.evaluation.plots import group_map_svg
from prefmix.evaluation.scoring import RowScores, predict, score_rows
from prefmix.experiments.baselines import Arm, FittedArm, Splits, fit_arm, table_states, tokenize_splits
from prefmix.experiments.demo import fast_dtype
from prefmix.experiments.seen_vocabulary import seen_vocabulary
from prefmix.experts.base_model import BaseModel, load_base
from prefmix.mixture.gates import GateInputs
from prefmix.policy.mixture_policy import MixturePolicy

MOE, SINGLE, OWN = "MoE-DPO", "single DPO", "own DPO"
FIGURES = ("accuracy", "log_loss", "reward")


class Scored(NamedTuple):
    """Figures of B held-out rows.

    Attributes:
        accuracy: [B] 1 where the preferred response is ranked first.
        log_loss: [B] nats.
        reward: [B] implicit reward of the preferred response less the other's, sum_k w_k m_k, nats.
    """

    accuracy: np.ndarray
    log_loss: np.ndarray
    reward: np.ndarray

    @classmethod
    def of(cls, log_weights: Tensor, scores: RowScores) -> Scored:
        """Under weights [B, K]."""
        predictions = predict(log_weights, scores)
        margins = scores.log_lik - scores.log_lik_reversed
        reward = (log_weights.double().exp() * margins).sum(1).numpy()
        return cls(hits(predictions.logit), -predictions.log_prob, reward)

    def select(self, rows: np.ndarray) -> Scored:
        """Some rows."""
        return Scored(*(values[rows] for values in self))


class Place(NamedTuple):
    """One seed's base and tables."""

    base: BaseModel
    domains: Splits
    people: Splits
    options: dict[str, Any]
    folder: Path
    seed: int

    def score(self, policy: MixturePolicy, table: ComparisonTable) -> RowScores:
        """What the experts say of a table, from cached states."""
        with torch.no_grad():
            states = table_states(table, self.base, self.options)
            return score_rows(policy.model.experts, table, beta=policy.config.beta, states=states)

    def prompt_weights(self, policy: MixturePolicy, table: ComparisonTable) -> Tensor:
        """[B, K] log-weights that the prompt gate gives a table's rows."""
        unknown = torch.full((len(table),), -1)
        states = torch.from_numpy(self.prompt_states(table)).float()
        with torch.no_grad():
            return policy.model.gate(GateInputs(unknown, prompt_states=states)).double()

    def prompt_states(self, table: ComparisonTable) -> np.ndarray:
        """[B, D] pooled states of each row's prompt: what the gate reads."""
        pooled = table_states(table, self.base, self.options).prompt_mean
        return np.asarray(pooled[torch.from_numpy(table.prompt)].double().numpy())


def run_seed(args: argparse.Namespace, base: BaseModel, seed: int) -> dict[str, Any]:
    """Everything on one draw of rows."""
    start = time.process_time()
    place = _place(args, base, seed)
    moe = _fit(place, MOE, {"num_experts": 2, "gate": ["prompt"], "init": "kmeans"}, place.domains)
    single = _fit(place, SINGLE, {"num_experts": 1, "init": "random"}, place.domains)
    own = own_dpo(place, args.batch_size // 2)
    gate, assignment = gate_figures(place, moe.policy)
    result = {
        "seed": seed,
        "rows": {name: len(table) for name, table in place.domains._asdict().items() if table is not None},
        "gate": gate,
        "domains": domain_figures(place, moe.policy, single.policy, {k: v.policy for k, v in own.items()}),
        "epochs": {MOE: moe.epoch, SINGLE: single.epoch} | {f"{OWN} {k}": v.epoch for k, v in own.items()},
        "validation": {MOE: moe.validation} | {f"{OWN} {k}": v.validation for k, v in own.items()},
        "metadata": metadata_figures(args, place, moe, assignment),
    }
    (args.output.with_name(f"{args.output.stem}-prompts.svg")).write_text(
        prompt_picture(place, moe.policy), encoding="utf-8"
    )
    return result | {"cpu_seconds": round(time.process_time() - start, 1)}


def own_dpo(place: Place, batch_size: int) -> dict[str, FittedArm]:
    """One DPO a domain on its rows alone, all at the epoch that is best for the domains together.

    Half the rows in batches of half the size: as many steps as the mixture's, and as many of its rows in each. One
    epoch for all is what the mixture chooses from the same validation rows; the size of implicit rewards grows with
    every epoch, so that models of different epochs would be compared by when they stopped.
    """
    options = {"num_experts": 1, "init": "random", "per_device_train_batch_size": batch_size}
    tables = {name: _of_domain(place.domains, index) for index, name in enumerate(DOMAINS)}
    fitted = {name: _fit(place, f"{OWN} {name}", options, splits) for name, splits in tables.items()}
    epoch = int(np.mean([arm.validation for arm in fitted.values()], axis=0).argmin()) + 1
    for name, splits in tables.items():
        if fitted[name].epoch != epoch:  # the rate is constant: fewer epochs are the same path, stopped earlier
            last = splits._replace(validation=None)
            again = _fit(place, f"{OWN} {name}", options | {"num_train_epochs": epoch}, last)
            fitted[name] = again._replace(epoch=epoch, validation=fitted[name].validation)
    return fitted


def gate_figures(place: Place, policy: MixturePolicy) -> tuple[dict[str, Any], np.ndarray]:
    """Accuracy of the gate's routes on held-out prompts, the classifier's beside it; and which expert is whose."""
    train, validation, test = (_known(table) for table in place.domains[:3])
    assignment = expert_of_domain(place.prompt_weights(policy, train).numpy(), train.group)
    routes = assignment[place.prompt_weights(policy, test).numpy().argmax(1)] == test.group
    pairs = [(place.prompt_states(table), table.group) for table in (train, validation)]
    classifier = fit_classifier(pairs[0], pairs[1])
    told = classifier.predict(place.prompt_states(test)) == test.group
    return {
        "accuracy": float(routes.mean()),
        "classifier_accuracy": float(told.mean()),
        "classifier_ridge": classifier.ridge,
        "difference": paired_difference(routes, told, np.full(len(routes), -1))._asdict(),
        "held_out_prompts": len(routes),
        "routes_right": routes.astype(int).tolist(),
        "classifier_right": told.astype(int).tolist(),
    }, assignment


def domain_figures(
    place: Place, moe: MixturePolicy, single: MixturePolicy, own: Mapping[str, MixturePolicy]
) -> dict[str, Any]:
    """For each domain and arm: rows' figures, which the summary turns into means and intervals."""
    test, found = place.domains.test, {}
    one = torch.zeros(len(test), 1, dtype=torch.float64)
    by_arm = {
        MOE: Scored.of(place.prompt_weights(moe, test), place.score(moe, test)),
        SINGLE: Scored.of(one, place.score(single, test)),
    }
    for index, name in enumerate(DOMAINS):
        rows = test.group == index
        arms = by_arm | {OWN: Scored.of(one, place.score(own[name], test))}
        found[name] = {arm: _listed(scored.select(rows)) for arm, scored in arms.items()}
    return found


def metadata_figures(args: argparse.Namespace, place: Place, moe: FittedArm, assignment: np.ndarray) -> dict[str, Any]:
    """A gate of metadata over the same experts, on people whom nobody trained on, at a prompt that says nothing."""
    before = experts_hash(moe.policy)
    arm = {
        "num_experts": 2,
        "init_experts": [str(moe.folder / "policy")],
        "train_experts": False,
        "gate": ["global", "metadata"],
        "latent": "user",
        "init": "experts",
        "gate_learning_rate": args.metadata_rate,
        "num_train_epochs": args.metadata_epochs,
        "token_dropout": 0.0,
    }
    policy = _fit(place, "metadata gate", arm, place.people).policy
    after = experts_hash(policy)
    assert after == before, "an expert changed while the gate alone was to learn"
    test = place.people.test
    scores = place.score(policy, test)
    truth = np.argsort(assignment)[test.group]  # the expert that serves each row's taste
    oracle = torch.full((len(test), 2), -torch.inf, dtype=torch.float64)
    oracle[torch.arange(len(test)), torch.from_numpy(truth)] = 0.0
    weights = policy.table_gate_log_weights(test).double().cpu()
    routed = torch.full_like(oracle, -torch.inf).scatter_(1, weights.argmax(1, keepdim=True), 0.0)
    ways = {"metadata": weights, "routed": routed, "uniform": torch.full_like(oracle, -np.log(2)), "oracle": oracle}
    scored = {name: Scored.of(log_weights, scores) for name, log_weights in ways.items()}
    clubs = np.array([entry["user_club"] for entry in test.metadata])
    return {
        "experts_sha256": [before, after],
        "routing_accuracy": float((weights.numpy().argmax(1) == truth).mean()),
        "clubs": {str(club): weights.exp().numpy()[clubs == club].mean(0).tolist() for club in np.unique(clubs)},
        "reward_by_club": {str(club): float(scored["metadata"].reward[clubs == club].mean()) for club in set(clubs)},
        "figures": {name: {key: float(v.mean()) for key, v in s._asdict().items()} for name, s in scored.items()},
        "field_weights": _field_weights(policy),
        "share_of_oracle": {
            way: {
                key: share_of_oracle(*(getattr(scored[w], key).mean() for w in (way, "uniform", "oracle")))
                for key in FIGURES
            }
            for way in ("metadata", "routed")
        },
        "accuracy_difference_to_oracle": paired_difference(
            scored["metadata"].accuracy, scored["oracle"].accuracy, test.user
        )._asdict(),
    }


def _field_weights(policy: MixturePolicy) -> dict[str, float]:
    """The largest weight that the gate gives each metadata field, nats; 0: it says nothing."""
    encoder, weight = policy.metadata_encoder, policy.model.gate.metadata.weight.detach().abs().amax(0)
    assert encoder is not None
    fields = np.array(encoder.field_of_feature)
    return {name: float(weight[fields == place].max()) for place, name in enumerate(encoder.field_names)}


def prompt_picture(place: Place, policy: MixturePolicy) -> str:
    """SVG: one line a held-out prompt, sorted by its route; which texts its two experts like; the true domain."""
    test = place.domains.test
    rows = np.arange(min(len(test), 80))
    weights = place.prompt_weights(policy, test).exp().numpy()[rows]
    chosen_wins = place.score(policy, test).log_lik.exp().numpy()[rows]
    likes_praise = np.where(test.group[rows, None] == 0, chosen_wins, 1 - chosen_wins)
    columns = [f"expert {k}: praise" for k in range(2)]
    return group_map_svg("routes of held-out prompts", weights, likes_praise, columns, test.group[rows], DOMAINS)


def summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of all seeds pooled (each seed draws other reviews): means, and paired differences with 95% intervals.

    `low` and `high` resample rows; `seeds_low` and `seeds_high` seeds first and then rows: two trainings on the same
    rows differ too, and an interval over rows alone takes that for a difference of methods.
    """
    routes, told = (np.concatenate([s["gate"][key] for s in seeds]) for key in ("routes_right", "classifier_right"))
    found: dict[str, Any] = {
        "gate_accuracy": float(routes.mean()),
        "classifier_accuracy": float(told.mean()),
        "gate_minus_classifier": _difference(routes, told),
        "domains": {},
    }
    for name in DOMAINS:
        arms = {
            arm: {key: [np.array(s["domains"][name][arm][key]) for s in seeds] for key in FIGURES}
            for arm in (MOE, OWN, SINGLE)
        }
        found["domains"][name] = {
            arm: {k: float(np.concatenate(v).mean()) for k, v in values.items()} for arm, values in arms.items()
        }
        for other in (OWN, SINGLE):
            found["domains"][name][f"{MOE} minus {other}"] = {
                key: _over_seeds(arms[MOE][key], arms[other][key]) for key in FIGURES
            }
    for key in ("routing_accuracy", "share_of_oracle", "figures"):
        found[f"metadata_{key}"] = [s["metadata"][key] for s in seeds]
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the seeds that are missing; prints the summary and writes JSON after each."""
    args = _parser().parse_args(arguments)
    kept = (
        "train",
        "validation",
        "test",
        "people",
        "epochs",
        "batch_size",
        "learning_rate",
        "metadata_epochs",
        "prompts",
    )
    settings = {name: getattr(args, name) for name in kept} | {"model": Path(args.model).name, "vocabulary": "seen"}
    report: dict[str, Any] = {"settings": settings, "commit": _commit(), "machine": platform.machine(), "seeds": []}
    if args.output.is_file():
        report = json.loads(args.output.read_text(encoding="utf-8"))
        if report["settings"] != settings:
            raise ValueError(f"--output {args.output} was made with other settings; name another file")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    base = load_base(args.model, dtype=fast_dtype() if args.dtype == "auto" else getattr(torch, args.dtype))
    for seed in args.seeds:
        if seed not in [entry["seed"] for entry in report["seeds"]]:
            report["seeds"].append(run_seed(args, base, seed))
            report["summary"] = summary(report["seeds"])
            args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(report["summary"], indent=1), flush=True)
    return report


def _place(args: argparse.Namespace, base: BaseModel, seed: int) -> Place:
    sizes = Sizes(args.train, args.validation, args.test, args.people, args.person_rows, named=args.prompts == "named")
    folder = args.work_dir / f"{Path(args.model).name}-{args.prompts}-{args.train}-{seed}"
    cut, parts = seen_vocabulary(list(draw_rows(sizes, seed)), base, folder / "base")
    # The number of a domain is its place in DOMAINS in every table.
    train, *others = ([row | {"group": f"{DOMAINS.index(row['group'])}"} for row in part] for part in parts)
    domains = tokenize_splits(train, others[0], others[1], cut)
    people = tokenize_splits(others[2], None, others[3], cut)
    options = {
        "latent": "pair",
        "bf16": cut.model.dtype == torch.bfloat16,
        "cache_dir": str(folder / "states"),
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
        "token_dropout": 0.5,
        "gate_learning_rate": args.gate_rate,
        # Clipping looks at all experts' gradients together, and each of two has half of what a model alone has: their
        # steps would be clipped less often, and Adam's would be shorter than those of the models they stand beside.
        "max_grad_norm": 0.0,
    }
    return Place(cut, domains, people, options, folder, seed)


def _fit(place: Place, name: str, options: Mapping[str, Any], splits: Splits) -> FittedArm:
    keep = name == MOE  # its experts are what the metadata gate starts from
    fitted = fit_arm(
        Arm(name, options), splits, place.base, place.options, seed=place.seed, output_dir=place.folder, keep=keep
    )
    print(f"seed {place.seed}: {name}: epoch {fitted.epoch}, validation {np.round(fitted.validation, 4)}", flush=True)
    return fitted


def _of_domain(splits: Splits, domain: int) -> Splits:
    train, validation = (_known(table).select(table.group == domain) for table in splits[:2])
    return Splits(train, validation, splits.test)


def _known(table: ComparisonTable | None) -> ComparisonTable:
    assert table is not None
    return table


def _listed(scored: Scored) -> dict[str, list[float]]:
    return {key: [round(float(value), 4) for value in values] for key, values in scored._asdict().items()}


def _over_seeds(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> dict[str, Any]:
    """The pooled difference of seeds' rows, with both intervals."""
    apart = [a - b for a, b in zip(first, second, strict=True)]
    interval = nested_bootstrap(
        lambda draws: [float(np.concatenate([apart[d.group][d.members] for d in draws]).mean())],
        [len(rows) for rows in apart],
        num_resamples=2000,
    )[0]
    both = {"seeds_low": interval.low, "seeds_high": interval.high}
    return (
        _difference(np.concatenate(first), np.concatenate(second)) | both | {"each": [float(d.mean()) for d in apart]}
    )


def _difference(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    return paired_difference(first, second, np.full(len(first), -1))._asdict()


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A prompt gate, then a metadata gate over the same experts.")
    parser.add_argument("--model", default="smollm2", help="base model")
    # Seeds 0 to 6 were looked at while the recipe was made.
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9, 10, 11, 12])
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the trunk")
    parser.add_argument("--train", type=int, default=400, help="training comparisons of both domains together")
    parser.add_argument("--validation", type=int, default=100, help="that choose each arm's epoch")
    parser.add_argument("--test", type=int, default=300, help="that are reported")
    parser.add_argument(
        "--prompts", choices=("named", "quoted"), default="named", help="say film or book, or quote a review alone"
    )
    parser.add_argument("--people", type=int, default=36, help="of the metadata gate, in training and in test")
    parser.add_argument("--person-rows", type=int, default=16, help="comparisons of each, for the metadata gate")
    parser.add_argument("--epochs", type=int, default=5, help="the best one on validation rows is kept")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--gate-rate", type=float, default=0.1, help="learning rate of the prompt gate")
    parser.add_argument("--metadata-rate", type=float, default=0.3, help="learning rate of the metadata gate")
    parser.add_argument("--metadata-epochs", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=Path("movies_and_books"), help="cut models, states, runs")
    parser.add_argument("--output", type=Path, default=Path("movies_and_books/results.json"))
    return parser


if __name__ == "__main__":
    main()
