"""The demo from end to end on a tiny random model and few rows: its story, files and honesty."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmix.evaluation.intervals import Estimate
from prefmix.experiments.demo import DemoSettings, run_demo
from prefmix.experiments.demo_people import PeopleResult, PeopleSettings, verdict
from prefmix.experiments.demo_planted import PlantedSettings, choice_shares
from prefmix.experts.base_model import BaseModel, content_sha256
from prefmix.policy.mixture_policy import MixturePolicy

FAST = {"num_train_epochs": 2, "learning_rate": 1e-2, "probe_dim": 4, "probe_restarts": 2, "cache_states": "memory"}
SMALL = DemoSettings(
    PeopleSettings(
        debates=("TV is better",),
        min_judgements=50,
        max_length=90,
        num_experts=2,
        options=FAST | {"per_device_train_batch_size": 1024},
    ),
    PlantedSettings(
        debates=("TV is better", "Firefox"),
        num_users=6,
        comparisons_per_user=4,
        num_new_users=4,
        max_length=140,
        max_new_tokens=4,
        options=FAST | {"per_device_train_batch_size": 16},
    ),
)


@pytest.fixture
def tiny_base(make_tiny_model: Callable[..., Any], tiny_chat_tokenizer: Any, tmp_path: Path) -> BaseModel:
    folder = tmp_path / "base"
    model = make_tiny_model()
    model.save_pretrained(folder)
    tiny_chat_tokenizer.save_pretrained(folder)
    return BaseModel(model, tiny_chat_tokenizer, str(folder), content_sha256(model))


def test_demo_tells_both_stories_and_leaves_everything_behind(tiny_base: BaseModel, tmp_path: Path) -> None:
    told: list[str] = []
    result = run_demo(tmp_path / "demo", model=tiny_base, settings=SMALL, say=told.append)
    story = "\n".join(told)
    for phrase in (
        "REAL PEOPLE",
        "PLANTED GROUPS",
        "single DPO",
        "probe (linear rewards)",
        "Mixture minus single, paired",
        "who was put together",
        "two people ask the same",
        "what to do next",
    ):
        assert phrase in story
    report = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    assert report["real people"]["mixture"]["personalised"]["accuracy"]["num_rows"] > 0
    assert len(report["planted groups"]["answers"]) == 2
    assert all(picture.read_text(encoding="utf-8").startswith("<svg") for picture in result.planted.pictures)
    policy = MixturePolicy.from_pretrained(result.planted.mixture.folder / "policy")
    assert len(policy.users) == 6


@pytest.mark.parametrize(
    ("low", "high", "phrase"),
    [
        (0.001, 0.02, "ranks held-out judgements better"),
        (-0.01, 0.02, "NOT clearly win"),
        (-0.02, -0.001, "does NOT win"),
    ],
)
def test_verdict_says_plainly_whether_the_mixture_wins(low: float, high: float, phrase: str) -> None:
    difference = Estimate((low + high) / 2, 0.01, low, high, 1000, 50)
    result = PeopleResult(None, None, None, difference, difference)  # type: ignore[arg-type]
    assert phrase in verdict(result)
    assert ("probabilities are worse" in verdict(result)) == (low > 0)
    assert ("probabilities are better" in verdict(result)) == (high < 0)


def test_choice_shares_count_first_sides() -> None:
    from prefmix.data.convarg import convarg_sides

    prompt, sides = next(iter(convarg_sides().items()))
    first, second = (texts[0] for texts in sides.values())
    rows = [
        {"prompt": prompt, "user": "a", "chosen": first, "rejected": second},
        {"prompt": prompt, "user": "a", "chosen": second, "rejected": first},
        {"prompt": prompt, "user": "b", "chosen": first, "rejected": second},
    ]
    shares, debates = choice_shares(rows, ["a", "b"])
    assert shares.tolist() == [[0.5], [1.0]] and len(debates) == 1
