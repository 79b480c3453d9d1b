"""Quality against cost: held-out accuracy of real people's preferences against CPU seconds, for every kind of expert.

    python recipes/quality_and_cost/run.py --model smollm2 --output results.json

README.md beside this file says what to expect. A run that is stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from arguments import load_arguments
from arms import Arm, all_arms
from films import load_films, mean_ratings
from pairs import Sizes
from runs import (
    Workplace,
    products_per_second,
    read_states,
    reads_states,
    reference_logits,
    score,
    state_of,
    states_name,
    train,
    with_state,
)
from safetensors.torch import load_file, save_file
from tables import best_scale, judge, table_text, write_pictures

from prefmix.experts.base_model import load_base

FILMS, ARGUMENTS = "films", "arguments"
RATE_STEP = 3.0  # of further rates; about the step of the grids


class Run(NamedTuple):
    """One training run to make or to find.

    Attributes:
        arm: what.
        rate: learning rate.
        seed: of heads, LoRA and the order of rows.
    """

    arm: Arm
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Its name in the JSON."""
        return f"{self.arm.name}, rate {self.rate:g}, seed {self.seed}"


class Study:
    """All runs of one set of rows, written to one JSON after each of them."""

    def __init__(
        self, place: Workplace, items: str, output: Path, settings: dict[str, Any], max_seconds: float
    ) -> None:
        """Goes on from `output` where it exists.

        Raises:
            ValueError: `output` was made with other settings.
        """
        self._place, self._items, self._output = place, items, output
        self._end = time.process_time() + max_seconds
        self.results: dict[str, Any] = {"settings": settings, "rows": _rows_in_words(place, items), "runs": {}}
        self.results |= {"chosen": {}, "reading_seconds": {}}
        if output.is_file():
            found = json.loads(output.read_text(encoding="utf-8"))
            if (found["settings"], found["rows"]) != (settings, self.results["rows"]):
                raise ValueError(f"--output {output} was made with other settings or rows; name another file")
            self.results = found

    def start(self) -> None:
        """What every arm is compared with."""
        if "baselines" not in self.results:
            self.results["baselines"] = self._baselines()
            self._write()

    def train_arm(self, arm: Arm) -> bool:
        """All runs of an arm, and the test scores of those at the chosen rate; false where the time is over."""
        reading = self.results["reading_seconds"]
        if reads_states(arm) and states_name(arm) not in reading:
            reading[states_name(arm)] = round(read_states(arm, self._place), 2)
        rate = self.results["chosen"].get(arm.rate_of) if arm.rate_of else self._choose_rate(arm)
        if rate is None:
            return False
        self.results["chosen"][arm.name] = rate
        return all(self._find(Run(arm, rate, seed), scored=True) is not None for seed in arm.seeds)

    def _choose_rate(self, arm: Arm) -> float | None:
        """The rate with the lowest (scaled) log-loss on validation pairs, with the arm's first seed."""
        rates, losses = list(arm.rates), {}
        further = arm.more_rates
        while True:
            for rate in rates:
                record = self._find(Run(arm, rate, arm.seeds[0]), scored=False)
                if record is None:
                    return None
                losses[rate] = record["validation"]["log_loss"]
            best = min(losses, key=lambda rate: losses[rate])
            beyond = {min(losses): best / RATE_STEP, max(losses): best * RATE_STEP}.get(best)
            if not further or beyond is None or len(losses) == 1:
                return best
            rates, further = [float(f"{beyond:.1g}")], further - 1

    def _find(self, run: Run, scored: bool) -> dict[str, Any] | None:
        """The record of a run, made where it is missing."""
        record = self.results["runs"].get(run.key)
        states = self._place.folder / "experts" / f"{run.key.replace(', ', '-').replace(' ', '_')}.safetensors"
        if record is None or (scored and "test" not in record and not states.is_file()):
            if time.process_time() > self._end:
                return None
            record = self._train(run, states)
        if scored and "test" not in record:
            experts = with_state(record["experts"], load_file(str(states)), self._place)
            margins = score(experts, self._place.rows.test, self._place)
            record["test"] = judge(margins, record["validation"]["scale"]).to_dict()
            record["test"]["margins"] = [round(float(margin), 4) for margin in margins]
            self._write()
            states.unlink()
        return record

    def _train(self, run: Run, states: Path) -> dict[str, Any]:
        before = products_per_second()
        trained = train(run.arm, run.rate, run.seed, self._place)
        speed = [round(before, 1), round(products_per_second(), 1)]
        margins = score(trained.experts, self._place.rows.validation, self._place)
        scale = best_scale(margins)
        record = {
            "loop_seconds": round(trained.seconds, 2),
            "products_gf_per_cpu_second": speed,
            "steps": trained.steps,
            "parameters": trained.parameters,
            "experts": trained.experts.describe(),
            "validation": judge(margins, scale).to_dict() | {"scale": scale},
        }
        states.parent.mkdir(parents=True, exist_ok=True)
        save_file(state_of(trained.experts), str(states))
        self.results["runs"][run.key] = record
        self._write()
        found = record["validation"]
        print(
            f"{run.key}: {trained.seconds:.0f} CPU s, validation {found['accuracy']:.3f} / {found['log_loss']:.4f} "
            f"({speed[0]:.0f}, {speed[1]:.0f} GF/s)",
            flush=True,
        )
        return record

    def _baselines(self) -> dict[str, Any]:
        test = self._place.rows.test
        logits = {"reference": reference_logits(test, self._place)}
        if self._items == FILMS:
            logits |= _of_films(test.rows)
        else:
            longer = [len(row["chosen"]) - len(row["rejected"]) for row in test.rows]
            logits["the longer argument"] = np.array(longer)
        return {name: round(judge(values, 1.0).accuracy, 5) for name, values in logits.items()}

    def _write(self) -> None:
        self._output.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._output.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._output)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains what is not in the JSON yet, prints the table and draws the pictures."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    base = load_base(args.model, dtype=torch.float32)
    sizes = Sizes(args.training_pairs, args.more_pairs, args.max_held_out)
    rows = (load_films if args.rows == FILMS else load_arguments)(base.tokenizer, sizes, args.split_seed)
    place = Workplace(base, rows, args.work_dir)
    settings = sizes._asdict() | {"split_seed": args.split_seed, "model": Path(args.model).name, "commit": args.commit}
    study = Study(place, args.rows, args.output, settings, 60 * args.max_cpu_minutes)
    study.start()
    arms = {name: arm for name, arm in all_arms().items() if not args.arms or name in args.arms}
    for arm in arms.values():
        if not study.train_arm(arm):
            print(f"stopped before {arm.name} was complete; the same command goes on", flush=True)
            break
    finished = [all_arms()[name] for name in all_arms() if _complete(study.results, all_arms()[name])]
    print(table_text(study.results, finished, rows.test))
    if finished:
        write_pictures(study.results, finished, rows.test, args.output)
    return study.results


def _complete(results: dict[str, Any], arm: Arm) -> bool:
    rate = results["chosen"].get(arm.name)
    return rate is not None and "test" in results["runs"].get(Run(arm, rate, arm.seeds[0]).key, {})


def _of_films(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What needs no language model: the year, and what everybody thinks of a film."""
    ratings = mean_ratings()
    return {
        "the older film": np.array([_year(row["rejected"]) - _year(row["chosen"]) for row in rows]),
        "the film with the higher mean rating": np.array(
            [ratings[row["chosen"]] - ratings[row["rejected"]] for row in rows]
        ),
    }


def _rows_in_words(place: Workplace, items: str) -> dict[str, Any]:
    rows, numbers = place.rows, {}
    for name, some in (("training", rows.few), ("more_training", rows.many)):
        different = {row[side] for row in some for side in ("chosen", "rejected")}
        numbers |= {f"{name}_pairs": len(some), f"{name}_{items}": len(different)}
    for name, pairs in (("validation", rows.validation), ("test", rows.test)):
        numbers |= {f"{name}_pairs": len(pairs.table), f"{name}_{items}": len(pairs.table.texts)}
    return numbers


def _year(film: str) -> int:
    """Year in "Title (1942): genres"; 0 where there is none."""
    found = re.findall(r"\((\d{4})\)", film)
    return int(found[-1]) if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Held-out accuracy against CPU seconds for every kind of expert.")
    parser.add_argument("--model", default="smollm2", help="base model")
    parser.add_argument("--rows", choices=(FILMS, ARGUMENTS), default=FILMS, help="what people compared")
    parser.add_argument("--training-pairs", type=int, default=500, help="of every arm")
    parser.add_argument("--more-pairs", type=int, default=2000, help="of heads that train on more")
    parser.add_argument("--max-held-out", type=int, help="at most so many validation and test pairs")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", help="these models only")
    parser.add_argument("--max-cpu-minutes", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--commit", default="", help="of the code, for the JSON")
    parser.add_argument("--work-dir", type=Path, default=Path("quality_and_cost"), help="cached states, experts")
    parser.add_argument("--output", type=Path, default=Path("quality_and_cost/results.json"))
    return parser


if __name__ == "__main__":
    main()
