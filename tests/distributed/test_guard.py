"""A bad value on one process (of two, gloo) stops both with one message, which numbers experts among all K."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from prefmix.experts.spread_experts import SpreadExperts, experts_of_process
from prefmix.training.guards import FiniteGuard, NonFiniteError

NUM_EXPERTS, PROCESSES, BAD = 5, 2, 3  # expert 3 is the second one of process 1


class Spread(SpreadExperts):
    """The experts of one process without their models' insides: one linear layer each."""

    def __init__(self, index: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.own_experts = NUM_EXPERTS, experts_of_process(NUM_EXPERTS, PROCESSES, index)
        self.own = nn.Module()
        self.own.models = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in self.own_experts)


class Mixture(nn.Module):
    """Experts and a gate that is sound."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.experts = Spread(index)
        self.gate = SimpleNamespace(population_log_weights=lambda: torch.full((NUM_EXPERTS,), 1 / NUM_EXPERTS).log())


def one_process(index: int, place: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=index, world_size=PROCESSES)
    model, guard, said = Mixture(index), FiniteGuard(np.arange(4)), []
    for step in (1, 2):  # a sound step first, after which everybody goes on
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if step == 2 and BAD in model.experts.own_experts:
            model.experts.own.models[model.experts.own_experts.index(BAD)].weight.grad[0, 0] = torch.nan
        zeros = torch.full((2, NUM_EXPERTS), -0.7)
        guard.observe_batch(torch.tensor([0, 3]), zeros, zeros, torch.tensor(0.5))
        guard.observe_gradients(model)
        try:
            guard.check(step, model)
        except NonFiniteError as error:
            said.append(str(error))
    Path(place, f"said_{index}").write_text("\n".join(said), encoding="utf-8")
    dist.destroy_process_group()


def test_a_bad_gradient_on_one_process_stops_both_with_one_message(tmp_path: Path) -> None:
    mp.spawn(one_process, args=(str(tmp_path),), nprocs=PROCESSES)
    first, second = ((tmp_path / f"said_{index}").read_text(encoding="utf-8") for index in range(PROCESSES))
    assert first == second
    assert first.startswith("step 2: NaN or infinity in gradient of expert 3 (weight) after rows [0, 3] of the input")
