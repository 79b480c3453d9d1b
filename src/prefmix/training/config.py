"""`MixtureConfig`: the training arguments of transformers plus the mixture's own fields."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from transformers import TrainingArguments

from prefmix.training.options import MixtureOptions, RunOptions, validate_options


@dataclass
class MixtureConfig(MixtureOptions, RunOptions, TrainingArguments):  # type: ignore[misc]  # bf16 may be null
    """Arguments of a `MixtureTrainer`.

    Every field of `transformers.TrainingArguments` works. Defaults that we change stand in `RunOptions`, each with its
    reason, and the mixture's own fields in `MixtureOptions`; names are TRL's `DPOConfig`'s where it has them.
    `per_device_train_batch_size` counts comparisons.

    Raises:
        ValueError: every problem of the configuration at once, one a line, with field, value and remedy.
    """

    def __post_init__(self) -> None:
        validate_options({item.name: getattr(self, item.name) for item in fields(self) if item.init})
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not self.use_cpu and self.trunk != "full"
        super().__post_init__()
        # The trunk is loaded in bfloat16 and everything after it is float32 by construction, which autocast would undo.
        self.mixed_precision = "no"

    @property
    def trunk_dtype(self) -> torch.dtype:
        """Type of the frozen trunk and of its cached states; experts, likelihoods and posteriors are float32."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def betas(self) -> list[float]:
        """[K] beta_k."""
        return [float(b) for b in self.beta] if isinstance(self.beta, list | tuple) else [self.beta] * self.num_experts
