"""The fields that `MixtureConfig` adds to `transformers.TrainingArguments`, and what must hold between them.

Nothing here imports torch: a configuration is checked before anything heavy is loaded. A field is documented once,
in its `help`; `--help` and the docs are made from it. Names and defaults are TRL's where TRL has the field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Latent = Literal["auto", "pair", "user"]
GateTerm = Literal["global", "prompt", "user", "metadata"]
Head = Literal["hidden", "logit", "full"]
EStepName = Literal["exact", "hard", "annealed", "gumbel"]
Initialization = Literal["auto", "probe", "random", "kmeans", "labels"]


def _field(default, help_text: str):  # type: ignore[no-untyped-def]
    metadata = {"help": help_text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class MixtureOptions:
    """What is specific to mixtures of expert policies (method.md has the symbols)."""

    # --- model -------------------------------------------------------------------------------------------------------
    num_experts: int = _field(4, "K, the number of experts. 1 is plain DPO.")
    branch_depth: int = _field(0, "Where experts leave the shared trunk: 0 means that only the output head differs.")
    head: Head = _field("hidden", "Head of an expert: low-rank in hidden space, low-rank in logit space, or full.")
    expert_rank: int = _field(16, "Rank r of a low-rank head.")
    # --- likelihood (TRL's names) -------------------------------------------------------------------------------------
    beta: float | list[float] = _field(0.1, "beta_k of the implicit reward; one number, or one for each expert.")
    label_noise: float = _field(0.0, "e in p = (1-e) sigmoid(m) + e sigmoid(-m): share of flipped labels, 0 <= e < 0.5.")
    # --- latent and gate ----------------------------------------------------------------------------------------------
    latent: Latent = _field("auto", "What carries one expert: a comparison (pair) or a user; auto: user where ids repeat.")
    gate: list[GateTerm] = _field(["global"], "Terms of the gate, summed in logit space.")
    gate_update: Literal["closed_form", "gradient", "fixed"] = _field(
        "closed_form", "How a purely global gate moves: EM's closed form, gradient steps, or not at all (uniform)."
    )
    gate_prior_alpha: float = _field(1.0, "Dirichlet concentration of the mixture weights, at least 1 (1 is flat).")
    gate_learning_rate: float = _field(1e-2, "Learning rate of gate terms that learn by gradient.")
    # --- E-step -------------------------------------------------------------------------------------------------------
    estep: EStepName = _field("exact", "How responsibilities are computed.")
    estep_temperature: float = _field(1.0, "Temperature at the start (annealed, gumbel).")
    estep_temperature_end: float = _field(1.0, "Temperature at the end of training (annealed, gumbel).")
    gumbel_hard: bool = _field(True, "Straight-through one-hot samples; false: relaxed samples.")
    # --- initialization -----------------------------------------------------------------------------------------------
    init: Initialization = _field("auto", "First responsibilities; auto: probe with users, else k-means over prompts.")
    init_hold_epochs: float = _field(1.0, "Epochs during which the first responsibilities are held.")
    probe_restarts: int = _field(8, "Random starts of the probe; the best penalised evidence is kept.")
    probe_dim: int = _field(64, "Principal directions of the pooled trunk states that the probe sees.")
    # --- data ---------------------------------------------------------------------------------------------------------
    max_length: int | None = _field(1024, "Longest prompt plus completion in tokens (TRL's default).")
    truncation_mode: Literal["keep_start", "keep_end"] = _field("keep_start", "Which end of a long row stays.")
    group_texts: bool | None = _field(
        None, "Batch comparisons that share a prompt, so that a text is read once; null: where texts repeat often."
    )
    # --- trunk states -------------------------------------------------------------------------------------------------
    cache_states: Literal["auto", "disk", "memory", "off"] = _field("auto", "Where states of the frozen trunk are kept.")
    cache_dir: str | None = _field(None, "Folder of cached trunk states; null: the user's cache folder.")
