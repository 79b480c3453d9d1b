"""One stage: contenders take turns over the same rows, and what each step cost."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from measuring.contenders import (
    OURS,
    TRL,
    Bases,
    Course,
    copy_adapter_to_trl,
    environment_of,
    fields_of_ours,
    our_configuration,
    our_trainer,
    trl_configuration,
    trl_trainer,
)
from measuring.texts import StepTokens, distinct_rows, in_training_order, step_tokens
from measuring.turns import StepCost, SteppedTrainer
from prefmix.data.comparisons import TextTable
from prefmix.data.convarg import load_convarg
from prefmix.experts.trunk_cache import build_trunk_states
from prefmix.training.trainer import MixtureTrainer

CONVARG = "ConvArg"
CONVARG_DEBATES = 4
CONVARG_BATCH = 64
# They carry no bar, or one in brackets, and take part in every other round.
RARE = (
    "TRL LoRA, defaults",
    "TRL LoRA, fastest",
    "LoRA, all blocks, K=1, bf16",
    "full head, K=1",
    "LoRA, all blocks, K=1 | prompts twice",
    "heads, K=1 | pure torch",
    "heads, K=16 | pure torch",
)


class Timed(NamedTuple):
    """What one contender's steps cost.

    Attributes:
        costs: for each round; None where it sat out.
        pairs: comparisons of one step.
        build_cpu: CPU seconds until the first step: tokens, experts; TRL's precomputed reference.
        configuration: what decides its speed.
    """

    costs: list[StepCost | None]
    pairs: int
    build_cpu: float
    configuration: dict[str, Any]

    @property
    def per_pair(self) -> list[float | None]:
        """CPU seconds per comparison, for each round."""
        return [None if cost is None else cost.cpu / self.pairs for cost in self.costs]

    @property
    def per_step(self) -> float:
        """Median CPU seconds of a step."""
        return float(np.median([cost.cpu for cost in self.costs if cost is not None]))


class Cache(NamedTuple):
    """Building the states of the trunk.

    Attributes:
        cpu: CPU seconds.
        texts: distinct texts.
        tokens: their tokens.
        completion_tokens: those whose states are kept.
    """

    cpu: float
    texts: int
    tokens: int
    completion_tokens: int


class StageResult(NamedTuple):
    """A stage.

    Attributes:
        source: where the texts come from.
        tokens: what a step of ours reads, by comparisons of a step.
        timed: by contender.
        caches: by type of the trunk.
    """

    source: str
    tokens: dict[int, StepTokens]
    timed: dict[str, Timed]
    caches: dict[str, Cache]


class Plan(NamedTuple):
    """What to run.

    Attributes:
        name: a mix of lengths, or `CONVARG`.
        contenders: their names, in the order of the first round.
        pairs: comparisons of a step, where texts are distinct.
        repetitions: counted rounds.
        after_round: called after every round.
    """

    name: str
    contenders: list[str]
    pairs: int
    repetitions: int
    after_round: Callable[[], None]


def run_stage(plan: Plan, bases: Bases) -> StageResult:
    """Builds all contenders of a stage, warms them up with one step each, and lets them take turns."""
    with tempfile.TemporaryDirectory(prefix="prefmix-bench-") as cache_dir:
        courses, source = _courses(plan, bases, cache_dir)
        caches: dict[str, Cache] = {}
        stepped: dict[str, SteppedTrainer] = {}
        for name in plan.contenders:
            ours = name not in TRL
            if ours and _is_cached(name):
                caches |= _build_cache(name, bases, courses[True], caches)
            build = our_trainer if ours else trl_trainer
            variables = environment_of(name) if ours else {}
            stepped[name] = SteppedTrainer(partial(build, name, bases, courses[ours]), variables)
            note(f"{plan.name}: built {name} in {stepped[name].build_cpu:.1f} CPU s")
        _same_start(stepped)
        tokens = {}
        for name, contender in stepped.items():
            if name not in TRL:
                with contender.awake() as trainer:
                    tokens.setdefault(courses[True].pairs, _tokens(trainer, courses[True]))
        costs = _take_turns(plan, stepped)
        timed = {}
        for name, contender in stepped.items():
            with contender.awake() as trainer:
                known = our_configuration(name, trainer) if name not in TRL else trl_configuration(trainer)
            timed[name] = Timed(costs[name], courses[name not in TRL].pairs, contender.build_cpu, known)
            contender.close()
    return StageResult(source, tokens, timed, caches)


def _take_turns(plan: Plan, stepped: dict[str, SteppedTrainer]) -> dict[str, list[StepCost | None]]:
    """The first step of each is not counted; odd rounds go backwards, so that nobody always follows the same."""
    for name, contender in stepped.items():
        cost = contender.step()
        note(f"{plan.name}: warm-up of {name}: {cost.cpu:.1f} CPU s")
    costs: dict[str, list[StepCost | None]] = {name: [] for name in stepped}
    for turn in range(plan.repetitions):
        names = list(stepped)
        for name in names if turn % 2 == 0 else reversed(names):
            costs[name].append(None if name in RARE and turn % 2 else stepped[name].step())
        plan.after_round()
        last = ", ".join(f"{name} {c[-1].cpu:.2f}" for name, c in costs.items() if c[-1] is not None)
        note(f"{plan.name}: round {turn + 1} of {plan.repetitions}: {last}")
    return costs


def _courses(plan: Plan, bases: Bases, cache_dir: str) -> tuple[dict[bool, Course], str]:
    """Rows of ours (True) and of TRL (False)."""
    steps = plan.repetitions + 1
    if plan.name == CONVARG:
        debates = sorted({row["metadata"]["topic"] for row in load_convarg()})[:: 24 // CONVARG_DEBATES]
        rows = [row for row in load_convarg(topics=debates[:CONVARG_DEBATES]) if not row["tie"]]
        drawn = np.random.default_rng(0).permutation(len(rows))[: steps * plan.pairs]
        ours = Course(rows, CONVARG_BATCH, steps, cache_dir, {"latent": "user"})
        theirs = Course([rows[i] for i in drawn], plan.pairs, steps, cache_dir)
        return {True: ours, False: theirs}, f"ConvArg, {CONVARG_DEBATES} debates, {len(rows)} judgements"
    tokenizer = bases[torch.float32].tokenizer
    assert tokenizer is not None
    found = distinct_rows(plan.name, steps * plan.pairs, tokenizer)
    ours = Course(found.rows, plan.pairs, steps, cache_dir)
    return {True: ours, False: ours._replace(rows=in_training_order(found.rows, plan.pairs, seed=0))}, found.source


def _is_cached(name: str) -> bool:
    return fields_of_ours(name).get("cache_states") == "disk"


def _build_cache(name: str, bases: Bases, course: Course, known: dict[str, Cache]) -> dict[str, Cache]:
    """Fills the cache that this contender will find, and says what that cost; nothing where it is there already."""
    dtype = torch.bfloat16 if fields_of_ours(name).get("bf16") else torch.float32
    key = str(dtype).removeprefix("torch.")
    if key in known:
        return {}
    uncached = name.replace(", cached", "")
    plain = SteppedTrainer(partial(our_trainer, uncached, bases, course))
    texts: TextTable = plain.trainer.train_comparisons.table.texts
    start = time.process_time()
    build_trunk_states(bases[dtype], texts, cache_dir=course.cache_dir, dtype=dtype, progress=False)
    cpu = time.process_time() - start
    tokens = sum(len(p) + len(c) for p, c in zip(texts.prompt_ids, texts.completion_ids))
    return {key: Cache(cpu, len(texts), tokens, texts.num_completion_tokens)}


def _same_start(stepped: dict[str, SteppedTrainer]) -> None:
    """TRL's LoRA starts where ours does, so that losses can be compared step by step."""
    ours = next((s for name, s in stepped.items() if name.startswith("LoRA, all blocks, K=1")), None)
    for name, theirs in stepped.items():
        if ours is not None and name in TRL and name != "TRL full head":
            copy_adapter_to_trl(ours.trainer, theirs.trainer.model)


def _tokens(trainer: MixtureTrainer, course: Course) -> StepTokens:
    """What the counted steps read: the sampler's own order."""
    order = np.array(list(trainer._get_train_sampler()))[: course.steps * course.pairs]
    batches = np.split(order, range(course.pairs, len(order), course.pairs))
    return step_tokens(trainer.train_comparisons.table, batches[1:])


def note(text: str) -> None:
    """Progress goes to stderr; results to stdout."""
    print(text, file=sys.stderr, flush=True)


assert not set(OURS) & set(TRL)
