"""Log-probabilities of the training texts under their references, computed once before the first step.

Legend: N distinct texts of the training set, K experts.
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from prefmix.data.comparisons import ComparisonTable, TextTable
from prefmix.experts.interface import AbstractExperts, PaddedTexts
from prefmix.experts.text_pass import pad_texts
from prefmix.policy.text_scores import length_batches
from prefmix.training.config import MixtureConfig

_TOKENS_PER_BATCH = 4096


def known_references(
    experts: AbstractExperts, table: ComparisonTable, args: MixtureConfig, accelerator: Accelerator
) -> Float[Tensor, "N K"] | None:
    """Log pi_ref(k)(y | x) of every training text on the training device, or None where `args` wants them on the fly.

    References never change, so one pass serves all epochs, and a text that many rows name is read once. The processes
    of a run share the pass; those of an expert-parallel run read everything, since only all of them have all experts.

    Args:
        experts: on their device, not divided among processes yet.
        table: training rows.
        args: `precompute_ref_log_probs` and whether bars are wanted.
        accelerator: knows the processes.
    """
    if not args.precompute_ref_log_probs:
        return None
    shares = 1 if args.expert_parallel else accelerator.num_processes
    found = torch.zeros(len(table.texts), args.num_experts, device=args.device)
    batches = list(length_batches(table.texts, _TOKENS_PER_BATCH))
    own = batches[accelerator.process_index :: shares] if shares > 1 else batches
    for rows in tqdm(own, desc="reading references", unit="batch", disable=args.disable_tqdm):
        found[rows] = experts.reference_log_probs(_padded(table.texts, rows, args.device)).to(found)
    return found if shares == 1 else accelerator.reduce(found, reduction="sum")


def _padded(texts: TextTable, rows: np.ndarray, device: torch.device) -> PaddedTexts:
    return PaddedTexts(*(field.to(device) for field in pad_texts(texts, rows)))
