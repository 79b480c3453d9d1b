"""`MixtureConfig`: the training arguments of transformers plus the mixture's own fields."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from transformers import TrainingArguments

from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.training.expert_options import default_learning_rate, precomputes_references
from prefmix.training.likelihood_options import feedback_model
from prefmix.training.options import MixtureOptions, RunOptions, reads_states, validate_options
from prefmix.training.processes import needs_cpu


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
        if self.learning_rate is None:
            self.learning_rate = default_learning_rate(vars(self))
        if self.precompute_ref_log_probs is None:
            self.precompute_ref_log_probs = precomputes_references(vars(self))
        if self.train_sampling_strategy is None:
            states = self.expert_kind == "shared_base" and reads_states(self.branch_depth, self.trunk)
            self.train_sampling_strategy = "random" if states and self.cache_states != "off" else "group_by_length"
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not (self.use_cpu or self.fp16) and self.trunk != "full"
        self.use_cpu = self.use_cpu or needs_cpu()
        if self.ddp_find_unused_parameters is None:  # a whole model that no row of a batch draws gets no gradient
            self.ddp_find_unused_parameters = self.expert_kind == "independent" and self.m_step != "all"
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # nothing to copy to; torch would warn at every epoch
        if self.activation_checkpointing is None:
            # The name that transformers calls deprecated is TRL's, so it is ours too; say it to both.
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        # The trunk is loaded in bfloat16 and everything after it is float32 by construction, which autocast would undo.
        self.mixed_precision = "no"

    @property
    def trunk_dtype(self) -> torch.dtype:
        """Type of the frozen trunk and of its cached states; experts, likelihoods and posteriors are float32.

        Whole models are float32, references included, and bf16 is the type of their products (autocast).
        """
        if self.fp16:  # heads alone: nothing has a gradient through the trunk
            return torch.float16
        return torch.bfloat16 if self.bf16 and self.expert_kind == "shared_base" else torch.float32

    @property
    def quantization(self) -> str | None:
        """What `load_base` is asked for: "8bit", "4bit" or None."""
        return "8bit" if self.load_in_8bit else "4bit" if self.load_in_4bit else None

    @property
    def feedback_model(self) -> FeedbackModel:
        """How rows become log-likelihoods."""
        return feedback_model(vars(self))

    @property
    def betas(self) -> list[float]:
        """[K] beta_k."""
        return [float(b) for b in self.beta] if isinstance(self.beta, list | tuple) else [self.beta] * self.num_experts
