"""The demo's second part: invented people who hold one side of a debate, over the same real arguments.

The true groups are known, so the picture shows whether the library found them. Legend: U users, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from prefmix.data.convarg import convarg_sides
from prefmix.data.planted_tasks import convarg_groups
from prefmix.evaluation.evaluator import evaluate
from prefmix.evaluation.plots import GLYPHS, curve_svg, group_map_svg, group_map_text
from prefmix.evaluation.report import EvaluationReport
from prefmix.experiments.baselines import TrainedArm, standard_arms, tokenize_splits, train_arm
from prefmix.experiments.probe_baseline import user_groups
from prefmix.experts.base_model import BaseModel
from prefmix.policy.mixture_policy import MixturePolicy


@dataclass(frozen=True)
class PlantedSettings:
    """Size of the second part.

    Attributes:
        debates: beginnings of the debates' titles; the first one is talked about at the end.
        num_users: people in both groups together.
        comparisons_per_user: training comparisons of each.
        num_new_users: people whom training does not see.
        noise: how often a person answers against their side.
        max_length: longest prompt plus argument, tokens.
        max_new_tokens: length of the answers shown.
        options: fields of `MixtureConfig`.
    """

    debates: Sequence[str] = ("Which type of endeavor", "William Farquhar")
    num_users: int = 40
    comparisons_per_user: int = 16
    num_new_users: int = 20
    noise: float = 0.1
    max_length: int = 100
    max_new_tokens: int = 48
    options: Mapping[str, Any] = field(
        default_factory=lambda: {
            "num_train_epochs": 4,
            "per_device_train_batch_size": 160,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 1,
            "probe_dim": 16,
            "probe_restarts": 4,
        }
    )


class Answer(NamedTuple):
    """One person's answer.

    Attributes:
        user: who asked.
        group: their true group.
        weights: K posterior weights.
        text: what the policy wrote for them.
    """

    user: str
    group: str
    weights: list[float]
    text: str


class PlantedResult(NamedTuple):
    """What the second part found.

    Attributes:
        mixture: the trained mixture; its report is on the texts that nobody trained on.
        new_people: the report on people whom training did not see.
        prompt: what the two people asked.
        answers: of one person from each learned group.
        pictures: files drawn.
    """

    mixture: TrainedArm
    new_people: EvaluationReport
    prompt: str
    answers: list[Answer]
    pictures: list[Path]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "mixture": self.mixture.report.to_dict(),
            "new people": self.new_people.to_dict(),
            "prompt": self.prompt,
            "answers": [answer._asdict() for answer in self.answers],
        }


def run_planted(
    base: BaseModel, settings: PlantedSettings, output_dir: Path, *, seed: int, say: Callable[[str], None]
) -> PlantedResult:
    """Trains a mixture of two experts, draws whom it put together, and lets two people ask the same."""
    planted = convarg_groups(
        debates=settings.debates,
        num_users=settings.num_users,
        comparisons_per_user=settings.comparisons_per_user,
        num_new_users=settings.num_new_users,
        noise=settings.noise,
        seed=seed,
    )
    train, test, new = (as_chat(rows) for rows in (planted.train, planted.test, planted.new_users))
    splits = tokenize_splits(train, None, test, base, max_length=settings.max_length)
    say(
        f"{settings.num_users} invented people: half prefer arguments for the first side of each debate, half "
        f"for the other, and {100 * settings.noise:.0f}% of answers go against the person's side. "
        f"{len(train)} training comparisons over {len(splits.train.texts)} arguments; test arguments are new."
    )
    say("training: mixture of two experts ...")
    arm = standard_arms(2, None)["mixture"]
    trained = train_arm(arm, splits, base, settings.options, seed=seed, output_dir=output_dir, keep=True)
    say(trained.report.table())
    new_people = evaluate(trained.policy, new, name="people whom training did not see", seed=seed)
    pictures = _draw(trained, new_people, planted.train, splits.train.groups, user_groups(splits.train), output_dir)
    say(_map_text(trained.policy, user_groups(splits.train), splits.train.groups))
    prompt = _prompt(train, settings.debates[0])
    answers = answer_two_people(trained.policy, prompt, user_groups(splits.train), splits.train.groups, settings, seed)
    say(_answers_text(prompt, answers, splits.train.groups))
    return PlantedResult(trained, new_people, prompt, answers, pictures)


def as_chat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain rows as conversations, so that the policy can be talked to."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [
        {**row, **{name: [{"role": role, "content": row[name].strip()}] for name, role in roles.items()}}
        for row in rows
    ]


def user_posteriors(policy: MixturePolicy) -> np.ndarray:
    """[U, K] weights of the users that training met."""
    gate = policy.model.gate.population_log_weights().detach().double().cpu()
    return torch.softmax(gate + policy.users.log_lik, dim=-1).numpy()


def answer_two_people(
    policy: MixturePolicy,
    prompt: str,
    truth: np.ndarray,
    groups: Sequence[str],
    settings: PlantedSettings,
    seed: int,
) -> list[Answer]:
    """The surest person of each expert asks the same; greedy, so that nothing but the person differs."""
    resp = user_posteriors(policy)
    answers = []
    for expert in range(resp.shape[1]):
        user = int(resp[:, expert].argmax())
        text = policy.generate(
            [{"role": "user", "content": prompt}],
            user=policy.users.names[user],
            decoder="top",
            temperature=0.0,
            repetition_penalty=1.1,
            max_new_tokens=settings.max_new_tokens,
            seed=seed,
        )
        answers.append(Answer(policy.users.names[user], groups[truth[user]], resp[user].tolist(), text.strip()))
    return answers


def choice_shares(rows: Sequence[Mapping[str, Any]], users: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """[U, C] share of each user's choices for the first side of each debate, nan without a choice; debate names."""
    first_side = {prompt: set(next(iter(sides.values()))) for prompt, sides in convarg_sides().items()}
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    total, first = np.zeros((len(users), len(prompts))), np.zeros((len(users), len(prompts)))
    index = {user: row for row, user in enumerate(users)}
    for row in rows:
        cell = index[row["user"]], prompts.index(row["prompt"])
        total[cell] += 1
        first[cell] += row["chosen"] in first_side[row["prompt"]]
    with np.errstate(invalid="ignore"):
        return first / total, [prompt.splitlines()[0].removeprefix("Debate: ")[:26] for prompt in prompts]


def _draw(
    trained: TrainedArm,
    new_people: EvaluationReport,
    rows: Sequence[Mapping[str, Any]],
    groups: Sequence[str],
    truth: np.ndarray,
    output_dir: Path,
) -> list[Path]:
    resp = user_posteriors(trained.policy)
    shares, debates = choice_shares(rows, trained.policy.users.names)
    title = "Planted groups: what people chose, and the expert each was given"
    pictures = {"groups.svg": group_map_svg(title, resp, shares, debates, truth.tolist(), groups)}
    points = [(float(n), f.accuracy.mean) for n, f in new_people.new_users.items()]
    if points:
        pictures["new_people.svg"] = curve_svg(
            "New people: accuracy after a few comparisons, no training",
            "comparisons known of the person",
            "accuracy on their other comparisons",
            {"personalised": points},
        )
    files = []
    for name, svg in pictures.items():
        (output_dir / name).write_text(svg, encoding="utf-8")
        files.append(output_dir / name)
    return files


def _map_text(policy: MixturePolicy, truth: np.ndarray, groups: Sequence[str]) -> str:
    key = ", ".join(f"{glyph} {group}" for glyph, group in zip(GLYPHS, groups))
    return f"who was put together ({key}):\n{group_map_text(user_posteriors(policy), truth.tolist())}"


def _prompt(rows: Sequence[Mapping[str, Any]], debate: str) -> str:
    prompts = [row["prompt"][0]["content"] for row in rows]
    return next(prompt for prompt in prompts if prompt.startswith(f"Debate: {debate}"))


def _answers_text(prompt: str, answers: Sequence[Answer], groups: Sequence[str]) -> str:
    holds = dict(zip(groups, convarg_sides()[f"{prompt}\n"], strict=True))
    lines = ["two people ask the same: " + prompt.replace("\n", " / ")]
    for answer in answers:
        weights = ", ".join(f"{weight:.2f}" for weight in answer.weights)
        lines.append(f'\n  {answer.user} (prefers "{holds[answer.group]}"; weights {weights}):\n    {answer.text}')
    return "\n".join(lines)
