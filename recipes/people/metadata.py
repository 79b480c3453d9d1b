"""What do age, sex and occupation say of somebody who has compared nothing yet? Films, 753 real people.

    python recipes/people/metadata.py

A mixture of linear rewards on genres and years, then gates of metadata over the same experts, under three priors, and
none. Two fields of noise stand among the metadata. Scored on people whom nobody trained on: nats a person, less those
without metadata; above zero is better. No language model runs; four CPU minutes.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefmix.data.datasets import read_named_file
from prefmix.data.users import MetadataEncoder
from prefmix.experiments.comparison_files import provenance
from prefmix.mixture.linear_em import ProbeData, fit_linear_em
from prefmix.mixture.posterior import group_log_lik, posterior
from prefmix.mixture.relevance import GroupEvidence, Relevance, fit_relevance, most_probable

RESULTS = Path(__file__).parent / "results"
FIELDS = ("age", "sex", "occupation")
NOISE = ("noise_number", "noise_colour")
# Precisions of one width for all fields.
PRIORS = {"flat": 0.01, "one width": 1.0}
APART = 2  # stars between the two films of a comparison
RIDGE, POOLING = 3.0, 20.0


class People:
    """Films as features, and what people said of them."""

    def __init__(self) -> None:
        movies = {row["title"]: row for row in read_named_file("movielens", "movies")}
        genres = sorted({genre for row in movies.values() for genre in row["genres"]})
        self.features = {
            title: np.r_[[genre in row["genres"] for genre in genres], ((row["year"] or 1990) - 1990) / 15]
            for title, row in movies.items()
        }
        self.metadata = {
            row["user"]: {name: row[name] for name in FIELDS} for row in read_named_file("movielens", "users")
        }
        self.ratings: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for row in read_named_file("movielens", "ratings"):
            self.ratings[row["user"]].append((row["movie"], row["rating"]))

    def comparisons(self, users: Sequence[str], each: int, rng: np.random.Generator) -> ProbeData:
        """Up to `each` comparisons a person, of films rated clearly apart."""
        differences, group = [], []
        for index, user in enumerate(users):
            rated = self.ratings[user]
            pairs = [rng.choice(len(rated), 2, replace=False) for _ in range(10 * each)]
            clear = [(rated[i], rated[j]) for i, j in pairs if rated[i][1] - rated[j][1] >= APART][:each]
            differences += [self.features[liked] - self.features[other] for (liked, _), (other, _) in clear]
            group += [index] * len(clear)
        rows = torch.tensor(np.array(differences))
        return ProbeData(rows, torch.tensor(group), torch.ones(len(rows), dtype=torch.float64), len(users))

    def described(self, users: Sequence[str], rng: np.random.Generator) -> list[dict[str, Any]]:
        """Their metadata, and noise."""
        noise = [dict(zip(NOISE, (float(rng.normal()), f"{rng.integers(12)}"), strict=True)) for _ in users]
        return [self.metadata[user] | extra for user, extra in zip(users, noise, strict=True)]


def run_cell(people: People, known: Sequence[str], new: Sequence[str], experts: int, seed: int) -> dict[str, Any]:
    """One mixture and its gates: nats a new person for each prior, and the fields that relevance kept."""
    rng = np.random.default_rng(seed)
    train, test = (people.comparisons(users, 40, rng) for users in (known, new))
    starts = torch.ones(4, dtype=torch.float64)
    fit = fit_linear_em(
        train,
        experts,
        RIDGE * starts,
        anneal=4.0,
        generator=torch.Generator().manual_seed(seed),
        pooling=POOLING * starts,
    )
    coefficients = fit.coefficients[int(fit.penalised.argmax())]
    evidence, told = (_evidence(data, coefficients) for data in (train, test))
    rows = people.described(known, rng)
    encoder = MetadataEncoder.fit(rows)
    features, unseen = (torch.tensor(encoder.encode(r)).double() for r in (rows, people.described(new, rng)))
    field = torch.tensor(encoder.field_of_feature)
    data = GroupEvidence(features, torch.zeros_like(evidence), evidence, torch.ones(len(known), dtype=torch.float64))
    width = torch.ones(len(encoder.field_names), dtype=torch.float64)
    gates = {name: most_probable(precision * width, field, data) for name, precision in PRIORS.items()}
    gates["relevance"] = fit_relevance(data, field)
    without = _score(most_probable(torch.inf * width, field, data), unseen, told)
    kept = torch.isfinite(gates["relevance"].precision).tolist()
    return {
        "seed": seed,
        "gain": {name: _score(gate, unseen, told) - without for name, gate in gates.items()},
        "kept": [name for name, stays in zip(encoder.field_names, kept, strict=True) if stays],
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """All sizes, K and seeds; prints a table and writes JSON."""
    args = _parser().parse_args(arguments)
    people = People()
    names, cells = sorted(people.ratings), {}
    settings = {"people": args.people, "experts": args.experts, "seeds": args.seeds, "new": args.new}
    for count in args.people:
        for experts in args.experts:
            found = []
            for seed in args.seeds:
                order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
                found.append(run_cell(people, order[args.new :][:count], order[: args.new], experts, seed))
            cells[f"{count} people, K={experts}"] = found
            print(line(f"{count} people, K={experts}", found), flush=True)
    report = {"settings": settings | provenance(), "cells": cells}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def line(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    """A row of the table: mean gain and its standard error over seeds, and how often each field was kept."""
    parts = []
    for prior in (*PRIORS, "relevance"):
        gains = np.array([cell["gain"][prior] for cell in found])
        error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
        parts.append(f"{prior} {gains.mean():+.3f} ({error:.3f})")
    kept = {field: sum(field in cell["kept"] for cell in found) for field in (*FIELDS, *NOISE)}
    return f"{name}: {', '.join(parts)}; kept in {len(found)}: {kept}"


def _evidence(data: ProbeData, coefficients: Tensor) -> Tensor:
    return group_log_lik(logsigmoid(data.difference @ coefficients.T), data.group, data.num_groups)


def _score(gate: Relevance, features: Tensor, evidence: Tensor) -> float:
    """Mean log evidence of people whose metadata alone are known, nats a person."""
    log_weights = torch.log_softmax(gate.bias + features @ gate.weight.T, dim=1)
    return float(posterior(log_weights, evidence).log_evidence.mean())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Gates of real people's metadata, under several priors.")
    parser.add_argument("--people", type=int, nargs="+", default=[600, 100, 40], help="that the gate learns from")
    parser.add_argument("--new", type=int, default=150, help="people who are scored")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4])
    # Seeds 0 to 5 were looked at while the prior was made.
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6, 16)))
    parser.add_argument("--output", type=Path, default=RESULTS / "metadata-movielens.json")
    return parser


if __name__ == "__main__":
    main()
