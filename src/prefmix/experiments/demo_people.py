"""The demo's first part: real people's judgements of arguments; single DPO, a mixture, and the probe beside them.

Legend: B comparisons, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.convarg import load_convarg
from prefmix.evaluation.intervals import Estimate, paired_difference
from prefmix.evaluation.metrics import hits
from prefmix.evaluation.report import plain_table, three_digits
from prefmix.experiments.baselines import Splits, TrainedArm, standard_arms, table_states, tokenize_splits, train_arm
from prefmix.experiments.probe_baseline import ProbeBaseline, probe_baseline
from prefmix.experts.base_model import BaseModel

HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class PeopleSettings:
    """Size of the first part.

    Attributes:
        debates: beginnings of the debates' titles; None for all twelve debates.
        min_judgements: people with fewer decisive judgements of these debates are left out.
        max_length: longest prompt plus argument, tokens; longer arguments are cut.
        num_experts: K of the mixture.
        options: fields of `MixtureConfig` for both models.
    """

    debates: Sequence[str] | None = (
        "Firefox",
        "Human Growth",
        "INDIA",
        "Is porn wrong",
        "Is the school uniform",
        "Pro-Choice",
        "TV is better",
    )
    min_judgements: int = 20
    max_length: int = 72
    num_experts: int = 2  # a third expert kept 2% of the people and gained nothing on validation rows: the lab notes
    options: Mapping[str, Any] = field(
        default_factory=lambda: {
            "num_train_epochs": 4,
            "per_device_train_batch_size": 1024,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 5,
            # To the end: people disagree a little, so the expert of most people learns fastest and would take the rest.
            "init_hold_epochs": 4,
            "token_dropout": 0.5,  # half the cost; see the lab notes for what it does to quality
            "group_texts": True,
            "probe_restarts": 4,
        }
    )


class PeopleResult(NamedTuple):
    """What the first part found.

    Attributes:
        single: one DPO model.
        mixture: the mixture.
        probe: the probe with as many groups as the mixture has experts.
        accuracy_difference: mixture (personalised) minus single, hits on the same held-out judgements.
        log_loss_difference: the same of log-losses; negative is better.
    """

    single: TrainedArm
    mixture: TrainedArm
    probe: ProbeBaseline
    accuracy_difference: Estimate
    log_loss_difference: Estimate

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "single DPO": self.single.report.to_dict(),
            "mixture": self.mixture.report.to_dict(),
            "probe": self.probe.figures.to_dict(),
            "accuracy: mixture minus single": self.accuracy_difference._asdict(),
            "log-loss: mixture minus single": self.log_loss_difference._asdict(),
        }


def run_people(
    base: BaseModel, settings: PeopleSettings, output_dir: Path, *, seed: int, say: Callable[[str], None]
) -> PeopleResult:
    """Trains both models on three quarters of each person's judgements and scores the rest."""
    splits = people_splits(base, settings, seed)
    say(
        f"{len(splits.train)} training and {len(splits.test)} held-out judgements of {len(splits.train.users)} people, "
        f"{len(splits.train.texts)} arguments. Held out are judgements, not arguments: people judge the same texts."
    )
    arms = standard_arms(settings.num_experts, None)
    trained = {}
    for name in ("single DPO", "mixture"):
        say(f"training: {name} ...")
        trained[name] = train_arm(
            arms[name], splits, base, settings.options, seed=seed, output_dir=output_dir, keep=True
        )
    states = (table_states(table, base, settings.options) for table in (splits.train, splits.test))
    train_states, test_states = states
    probe = probe_baseline(
        splits.train, train_states, splits.test, test_states, num_experts=settings.num_experts, restarts=4, seed=seed
    )
    result = PeopleResult(
        trained["single DPO"], trained["mixture"], probe, *_differences(trained["single DPO"], trained["mixture"], seed)
    )
    say(people_table(result))
    return result


def people_splits(base: BaseModel, settings: PeopleSettings, seed: int) -> Splits:
    """A quarter of each person's decisive judgements is held out."""
    rows = load_convarg(topics=settings.debates, min_judgements=settings.min_judgements)
    rows = [row for row in rows if not row["tie"]]
    by_user: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_user.setdefault(row["user"], []).append(index)
    rng = np.random.default_rng(seed)
    held_out: set[int] = set()
    for indices in by_user.values():
        held_out |= set(rng.permutation(indices)[: round(HELD_OUT_SHARE * len(indices))].tolist())
    train = [row for index, row in enumerate(rows) if index not in held_out]
    test = [rows[index] for index in sorted(held_out)]
    return tokenize_splits(train, None, test, base, max_length=settings.max_length)


def people_table(result: PeopleResult) -> str:
    """Figures of all models and a plain verdict."""
    mixture, single = result.mixture.report, result.single.report
    assert mixture.personalised is not None
    rows = [
        *single.baselines.rows(),
        ("single DPO", single.population),
        (f"mixture, K={len(mixture.usage)}: everybody alike", mixture.population),
        (f"mixture, K={len(mixture.usage)}: personalised", mixture.personalised),
        ("probe (linear rewards): personalised", result.probe.figures),
    ]
    cells = [[name, str(f.accuracy), three_digits(f.log_loss.mean), three_digits(f.ece)] for name, f in rows]
    header = ["", "held-out accuracy [95% over people]", "log-loss", "ECE"]
    usage = " ".join(f"{share:.2f}" for share in mixture.usage)
    return "\n".join([plain_table(header, cells), f"share of people by expert: {usage}", verdict(result)])


def verdict(result: PeopleResult) -> str:
    """Whether the mixture predicts held-out judgements better than single DPO, with paired intervals."""
    accuracy, loss = result.accuracy_difference, result.log_loss_difference
    points = f"{100 * accuracy.mean:+.1f} points [{100 * accuracy.low:+.1f}, {100 * accuracy.high:+.1f}]"
    nats = f"{loss.mean:+.4f} nats [{loss.low:+.4f}, {loss.high:+.4f}]"
    if accuracy.low > 0:
        claim = "The mixture ranks held-out judgements better than single DPO"
    elif accuracy.high < 0:
        claim = "The mixture does NOT win: it ranks held-out judgements worse than single DPO"
    else:
        claim = "The mixture does NOT clearly win in accuracy: the interval of its gain holds zero"
    if loss.high < 0:
        claim += "; its probabilities are better (lower log-loss)"
    elif loss.low > 0:
        claim += "; its probabilities are worse (higher log-loss)"
    return f"{claim}. Mixture minus single, paired, 95% over people: accuracy {points}, log-loss {nats}."


def _differences(single: TrainedArm, mixture: TrainedArm, seed: int) -> tuple[Estimate, Estimate]:
    ours, theirs = mixture.report.predictions["personalised"], single.report.predictions["population"]
    user = mixture.report.user
    return (
        paired_difference(hits(ours.logit), hits(theirs.logit), user, seed=seed),
        paired_difference(-ours.log_prob, -theirs.log_prob, user, seed=seed),
    )
