"""What the page of a run shows, gathered from its folder, its policy and held-out rows.

Legend: B rows, U users, K experts, C answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prefmix.evaluation.figures.experts import Divergence, ExpertRows
from prefmix.evaluation.intervals import Estimate
from prefmix.evaluation.report import EvaluationReport
from prefmix.experiments.diagnosis import Diagnosis, Finding
from prefmix.policy.folder import LOG_FILE

if TYPE_CHECKING:
    from prefmix.policy.mixture_policy import MixturePolicy

FINISHED = "finished.json"


class People(NamedTuple):
    """Users and their weights.

    Attributes:
        weights: [U, K] what the policy uses for each, rows sum to one.
        names: U names; empty where they must not be written.
        groups: U true groups, None where unknown; empty where rows name none.
        trained: how many users the training rows named; None where the policy does not say.
    """

    weights: np.ndarray
    names: Sequence[str] = ()
    groups: Sequence[str | None] = ()
    trained: int | None = None


class GateView(NamedTuple):
    """Mean weights for kinds of rows.

    Attributes:
        title: of the figure.
        rows: (kind, count, K mean weights).
        caption: how to read it.
    """

    title: str
    rows: Sequence[tuple[str, int, Sequence[float]]]
    caption: str


class Gain(NamedTuple):
    """This run minus another policy on the same rows, paired over people.

    Attributes:
        accuracy: of 1; more is better.
        log_loss: nats a comparison; less is better.
    """

    accuracy: Estimate
    log_loss: Estimate


class Dispute(NamedTuple):
    """A comparison that experts disagree about.

    Attributes:
        title: what was asked last.
        prompt, chosen, rejected: as text.
        user: who judged; empty where names must not be written.
        probability: K values p_k(chosen > rejected).
        weights: K weights of the user.
    """

    title: str
    prompt: str
    chosen: str
    rejected: str
    user: str
    probability: Sequence[float]
    weights: Sequence[float]


class Example(NamedTuple):
    """A prompt and what was written to it.

    Attributes:
        title: what was asked last.
        prompt: as text.
        writers: C names: each expert, the mixture, and the reference.
        answers: C texts.
        score: K rows of C: how often expert k prefers the answer to another of these.
        people: C shares of users whose weights put this answer first; empty where no users are known.
    """

    title: str
    prompt: str
    writers: Sequence[str]
    answers: Sequence[str]
    score: Sequence[Sequence[float]]
    people: Sequence[float] = ()


@dataclass(frozen=True)
class RunData:
    """Everything that the page reads; parts that are None or empty have their reason in `absent`.

    Attributes:
        name: of the run.
        facts: what was trained on what.
        num_experts: K.
        cost: name -> value.
        log: lines of `metrics.jsonl`.
        evaluation: held-out figures.
        against: name -> figures of another policy on the same rows.
        verdicts: what the figures mean beside length, a coin and the gate.
        gains: name -> how much better the run is than it.
        people: users.
        gate: mean weights by kinds of rows.
        experts: held-out rows under every expert.
        disputes: comparisons that experts disagree about.
        examples: prompts with answers.
        divergence: distance from the reference, one for each expert.
        diagnosis: findings with remedies.
        absent: part -> why there is none.
        source: what the held-out rows are called.
    """

    name: str
    facts: Mapping[str, str]
    num_experts: int
    cost: Mapping[str, str] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()
    evaluation: EvaluationReport | None = None
    against: Mapping[str, EvaluationReport] = field(default_factory=dict)
    verdicts: Sequence[Finding] = ()
    gains: Mapping[str, Gain] = field(default_factory=dict)
    people: People | None = None
    gate: Sequence[GateView] = ()
    experts: ExpertRows | None = None
    disputes: Sequence[Dispute] = ()
    examples: Sequence[Example] = ()
    divergence: Sequence[Divergence] = ()
    diagnosis: Diagnosis | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    source: str = ""


def read_log(run: Path) -> list[dict[str, Any]]:
    """Lines of the run's log; empty where there is none. A last line that a killed run left half is passed over."""
    file = run / LOG_FILE
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def facts_of(policy: MixturePolicy) -> dict[str, str]:
    """What was trained on what, as far as the policy knows."""
    config, made, record = policy.config, policy.config.provenance, policy.record
    described = config.experts
    counts = [(made.get(f"training_{name}"), name) for name in ("rows", "users", "texts")]
    read = ", ".join(f"{count:,} {name}" for count, name in counts if count is not None)
    source = Path(str(record["data"])).name if record.get("data") else ""
    facts = {
        "base model": "a copy within the policy"
        if config.base_source == "./base"
        else _short_source(config.base_source),
        "trained on": ": ".join(part for part in (source, read) if part),
        "experts": f"{config.num_experts}: "
        + ", ".join(f"{name} {value}" for name, value in described.items() if value),
        "β": ", ".join(f"{beta:g}" for beta in config.beta),
        "one expert carries": {"user": "a user", "pair": "a comparison", "membership": "users, who blend"}[
            config.latent
        ],
        "gate reads": " + ".join(str(term) for term in config.gate.get("terms", [])),
        "label noise": f"{config.label_noise:g}" if config.label_noise else "",
        "likelihood": ", ".join(f"{name} {value}" for name, value in config.feedback.items()),
        "first responsibilities": str(made.get("init", "")),
        "steps": str(made.get("steps", "")),
        "seed": str(made.get("seed", "")),
        "changed since training": "; ".join(made.get("changes", ())),
        "SHA-256 of the rows": str(made.get("data_sha256", ""))[:16],
        "SHA-256 of the base": config.base_sha256[:16],
    }
    return {name: value for name, value in facts.items() if value}


def cost_of(policy: MixturePolicy, run: Path) -> dict[str, str]:
    """Time, memory and parameters, from the policy's record and `finished.json`."""
    record = policy.record
    found: dict[str, str] = {}
    if "seconds" in record:
        since = f" (since step {record['first_step']}, when the run was resumed)" if record.get("first_step") else ""
        found["training, wall clock"] = _duration(record["seconds"]) + since
        found["training, CPU time"] = _duration(record["cpu_seconds"])
    elif (run / FINISHED).is_file():
        found["training, wall clock"] = _duration(_finished(run).get("train_runtime", 0.0))
    if "peak_memory_bytes" in record:
        found["peak memory"] = f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"
    if "trained_parameters" in record:
        trained, base = record["trained_parameters"], record["base_parameters"]
        found["parameters trained"] = f"{trained:,} ({trained / base:.2%} of the base's {base:,})"
    found["machine"] = str(record.get("machine", ""))
    found["processes"] = str(record.get("processes", ""))
    return {name: value for name, value in found.items() if value}


def _finished(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / FINISHED).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _short_source(source: str) -> str:
    """A hub name as it is; of a folder its last part, since pages are passed on."""
    return Path(source).name if Path(source).is_absolute() else source


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
