"""The demo: the main job on rows that ship with the package and a real language model, in minutes on two cores."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from prefmix.evaluation.report import finite
from prefmix.experiments.demo_people import PeopleResult, PeopleSettings, run_people
from prefmix.experiments.demo_planted import PlantedResult, PlantedSettings, run_planted
from prefmix.experts.base_model import BaseModel, load_base


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of both parts; the defaults are what `prefmix demo` runs."""

    people: PeopleSettings = field(default_factory=PeopleSettings)
    planted: PlantedSettings = field(default_factory=PlantedSettings)


@dataclass(frozen=True)
class DemoResult:
    """What both parts found, and where it lies.

    Attributes:
        people: the part on real people.
        planted: the part on planted groups.
        folder: report, pictures and policies.
        seconds: wall time.
    """

    people: PeopleResult
    planted: PlantedResult
    folder: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        parts = {"real people": self.people.to_dict(), "planted groups": self.planted.to_dict()}
        return finite(parts | {"seconds": self.seconds})


def run_demo(
    output_dir: str | Path = "demo",
    *,
    seed: int = 0,
    model: str | BaseModel = "smollm2",
    settings: DemoSettings | None = None,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Trains on real people's judgements and on planted groups, reports both, and says what to do next.

    Args:
        output_dir: gets `report.json`, pictures and a policy folder for each model.
        seed: of splits, heads and order.
        model: the base model; "smollm2" is SmolLM2-135M-Instruct from wherever it can be had.
        settings: sizes; None for the full demo.
        say: gets each paragraph of the story.
    """
    start, settings = time.perf_counter(), settings or DemoSettings()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _quiet()
    base = model if isinstance(model, BaseModel) else load_base(model, dtype=fast_dtype())
    common = {"bf16": base.model.dtype == torch.bfloat16, "disable_tqdm": not sys.stderr.isatty()}
    people, planted = (_with(part, common) for part in (settings.people, settings.planted))
    say(f"base model: {base.source} ({str(base.model.dtype).removeprefix('torch.')}), seed {seed}")
    say("\n== 1 of 2: REAL PEOPLE (UKPConvArg1, CC-BY 4.0): which argument is more convincing? ==")
    people_result = run_people(base, people, folder / "people", seed=seed, say=say)
    say("\n== 2 of 2: PLANTED GROUPS (invented people over the same real arguments) ==")
    planted_folder = folder / "planted"
    planted_folder.mkdir(exist_ok=True)
    planted_result = run_planted(base, planted, planted_folder, seed=seed, say=say)
    result = DemoResult(people_result, planted_result, folder, time.perf_counter() - start)
    (folder / "report.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    say(closing(result))
    return result


def fast_dtype() -> torch.dtype:
    """bfloat16 where the machine multiplies it natively (half the time and memory), else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def closing(result: DemoResult) -> str:
    """Where everything lies and what to do next."""
    policy = result.planted.mixture.folder / "policy"
    user = result.planted.answers[0].user
    pictures = "\n".join(f"  {path}" for path in result.planted.pictures)
    return f"""
done in {result.seconds:.0f} s. Written:
  {result.folder / "report.json"} (every figure above)
{pictures}
  {policy} (the planted mixture; the others are in {result.folder / "people"})

what to do next
  prefmix chat {policy} --user {user}             talk to it as one of its users (/user NAME changes who you are)
  prefmix generate {policy} --user {user} --prompt "{result.planted.prompt.splitlines()[0]}"
  prefmix validate my_rows.jsonl                  rows of your own: prompt, chosen, rejected, user
  prefmix init && prefmix train recipe.yaml       a commented recipe, then training
"""


def _with(part: Any, options: dict[str, Any]) -> Any:
    return replace(part, options=options | dict(part.options))


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
