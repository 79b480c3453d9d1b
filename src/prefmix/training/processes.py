"""What several processes of one run must agree on: how many they are, who writes, and what all of them have seen.

Legend: B rows of one process's batch, R rows of a table, K experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments


def check_processes(num_processes: int, expected: int | None, environment: Mapping[str, str] = os.environ) -> None:
    """Refuses a run that has another number of processes than was asked for; nothing else would ever say so.

    `accelerate launch` without a GPU starts one process whatever `--num_processes` says, and processes that do not know
    of each other would each train alone, into one folder.

    Args:
        num_processes: how many processes this run really has.
        expected: `num_processes` of the configuration.
        environment: the launcher's variables.

    Raises:
        ValueError: with the command that works.
    """
    remedy = "start it with: torchrun --nproc_per_node N -m prefmix train ... (add --use_cpu true where no GPU is)"
    launched = int(environment.get("WORLD_SIZE", "1"))
    if launched != num_processes:
        raise ValueError(
            f"WORLD_SIZE={launched}: the launcher started {launched} processes, but this run has {num_processes}, so "
            f"each would train alone into one folder; {remedy}"
        )
    if "WORLD_SIZE" not in environment and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= environment.keys():
        raise ValueError(
            "accelerate launch was asked for several processes and started one (it does so without a GPU); " + remedy
        )
    if expected is not None and expected != num_processes:
        raise ValueError(f"num_processes={expected}: this run has {num_processes} processes; {remedy}")


def needs_cpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether one of several processes finds no accelerator: only `use_cpu` makes them know of each other then."""
    return int(environment.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


@contextmanager
def first_process_first(args: TrainingArguments) -> Iterator[None]:
    """The first process of each machine runs the body before the others: it downloads and fills caches for them."""
    if args.world_size == 1:
        yield
        return
    with args.main_process_first(local=True, desc="download and cache"):
        yield


def from_first_process(accelerator: Accelerator, like: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """What the first process computes, on every process, so that rounding elsewhere cannot part them.

    Args:
        accelerator: knows the processes.
        like: a tensor of the result's shape, type and device.
        compute: called by the first process alone.
    """
    value = compute().to(like) if accelerator.is_main_process else torch.empty_like(like)
    share_tensors(accelerator, [value])
    return value


def share_tensors(accelerator: Accelerator, tensors: list[Tensor]) -> None:
    """Overwrites the tensors of all processes with those of the first."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def share_object(accelerator: Accelerator, value: Any) -> Any:
    """The first process's value (small, such as metrics), on every process."""
    if accelerator.num_processes == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def share_draws(accelerator: Accelerator) -> None:
    """Lets every process draw what the first one draws from here on."""
    if accelerator.num_processes > 1:
        seed = torch.randint(2**62, (1,)).to(accelerator.device)
        dist.broadcast(seed, src=0)
        torch.manual_seed(int(seed))


class Readers(NamedTuple):
    """The processes that read different rows. Those of an expert-parallel run all read the same: they count as one.

    Attributes:
        accelerator: knows the processes.
        number: how many parts a global batch has.
    """

    accelerator: Accelerator
    number: int


def follow_epochs(loader: DataLoader) -> DataLoader:
    """A loader that accelerate has split among processes, whose order follows the epoch also where batches are skipped.

    In a resumed epoch the split stands one level deeper than `set_epoch` of accelerate looks for the sampler, and rows
    would come in the order of the first epoch.
    """
    shares = loader.batch_sampler
    if isinstance(shares, BatchSamplerShard):
        shares.sampler = shares.batch_sampler.sampler
    return loader


def read_by_all(loader: DataLoader) -> DataLoader:
    """A loader that accelerate has split among processes, made to give every process all of it."""
    shares = loader.batch_sampler
    if isinstance(shares, BatchSamplerShard):
        shares.num_processes, shares.process_index, shares.even_batches = 1, 0, False
    return loader


def summed(readers: Readers, tensor: Tensor) -> Tensor:
    """The sum over what all have read; the tensor itself where there is one reader."""
    return tensor if readers.number == 1 else readers.accelerator.reduce(tensor.clone(), reduction="sum")


def gathered(readers: Readers, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all readers, in their order; every reader brings equally many."""
    if readers.number == 1:
        return tensors
    return tuple(readers.accelerator.gather(tensor.detach().contiguous()) for tensor in tensors)


def own_rows(readers: Readers, everywhere: Tensor) -> Tensor:
    """The inverse of `gathered` for this process."""
    size = len(everywhere) // readers.number
    return everywhere[readers.accelerator.process_index * size :][:size]
