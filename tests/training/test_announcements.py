"""The lines that a run says of itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefmix.data.counted import counted
from prefmix.mixture.held_out import Gain
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.announcements import followers, gain_line
from prefmix.training.trainer import MixtureTrainer

Make = Callable[..., MixtureTrainer]


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefmix: ")]


def test_a_run_says_where_it_starts_and_what_it_left(
    make_trainer: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(init="labels", max_steps=1).train()
    chosen, start, end = lines(capsys)
    assert "by 8 users; 2 experts, latent=user" in chosen and "held for 1 epoch" in chosen and "1 epochs" not in chosen
    assert start == "prefmix: groups to start from: the rows' own groups have 4 and 4 users"
    policy = MixturePolicy.from_pretrained(tmp_path / "run")
    sizes = followers(policy)
    assert sizes is not None and sum(sizes) == 8
    run, who = tmp_path / "run", f"{counted(sizes[0], 'user')} with expert 0, {sizes[1]} with expert 1"
    assert end == f"prefmix: policy saved in {run / 'policy'}: {who}; next: prefmix report {run} --data ROWS"


@pytest.mark.parametrize(
    "fields, start, who",
    [
        ({"latent": "pair", "init": "random"}, r"at random \d+ and \d+ rows?$", False),
        ({"latent": "membership", "init": "probe"}, r"the probe .* and \d+ users?; .* pooling=", True),
        ({"num_experts": 1}, None, False),
        ({"latent": "pair", "gate": ["global", "user"], "init": "random"}, "rows?$", True),
    ],
)
def test_what_has_no_groups_or_no_users_names_none(
    make_trainer: Make, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], start: str | None, who: bool
) -> None:
    make_trainer(max_steps=1, **fields).train()
    first, *middle, end = lines(capsys)
    *middle, gain = [*middle, None] if fields.get("init") != "probe" else middle
    assert gain is None or "predicted better by 2 groups than by one" in gain
    if start is None:
        assert not middle
    else:
        assert re.search(start, middle[0])
    assert ("with expert 0" in end) == who
    assert "1 experts" not in first


def test_groups_that_held_out_users_do_not_bear_out_are_said_so() -> None:
    assert gain_line(Gain(0.5, 3.0), 2).startswith(
        "held-out comparisons are predicted better by 2 groups than by one (+0.50"
    )
    for unclear in (Gain(0.1, 1.2), Gain(-0.5, -3.0), Gain(0.0, 0.0)):
        assert "not clearly" in gain_line(unclear, 2) and "prefmix probe" in gain_line(unclear, 2)
