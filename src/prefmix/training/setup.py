"""From rows, a base model and a configuration to what training needs: tables, trunk states, experts and gate.

Legend: B comparisons, P distinct prompts, D hidden, M metadata features, K experts.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefmix.data.collator import ComparisonCollator
from prefmix.data.comparisons import ComparisonTable
from prefmix.data.readers import read_source
from prefmix.data.tokenization import tokenize_rows
from prefmix.data.unread_users import unread_columns, unread_users
from prefmix.data.users import MetadataEncoder
from prefmix.experts.base_model import BaseModel, load_base
from prefmix.experts.interface import AbstractExperts
from prefmix.experts.quantization import quantization_of
from prefmix.experts.trunk_cache import TrunkStates, build_trunk_states
from prefmix.mixture.gates import Gate, features_of
from prefmix.policy.feedback_rows import check_feedback
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.row_form import RowForm
from prefmix.training.config import MixtureConfig
from prefmix.training.membership_options import ENCODER_HIDDEN, membership_dim
from prefmix.training.options import expert_head, gate_problems, reads_states
from prefmix.training.processes import first_process_first
from prefmix.training.starting_experts import starting_experts

logger = logging.getLogger(__name__)

ResolvedLatent = Literal["pair", "user", "membership"]


class Comparisons(NamedTuple):
    """A table with everything that the model reads of it.

    Attributes:
        table: B comparisons.
        states: cached trunk states of its texts, or None where the trunk runs in every step.
        prompt_states: [P, D] pooled states of its prompts, where the gate reads them.
        metadata: [B, M] encoded metadata, where the gate reads them.
    """

    table: ComparisonTable
    states: TrunkStates | None
    prompt_states: Float[Tensor, "P D"] | None
    metadata: Float[Tensor, "B M"] | None

    def collator(self, group: np.ndarray, pad_token_id: int) -> ComparisonCollator:
        """Makes batches of this table; `group` [B] is the latent group of each row."""
        return ComparisonCollator(
            self.table,
            group=group,
            pad_token_id=pad_token_id,
            states=None if self.states is None else self.states.gather,
            prompt_states=self.prompt_states,
            metadata=self.metadata,
        )


def as_base_model(
    model: str | Path | PreTrainedModel | BaseModel, args: MixtureConfig, tokenizer: PreTrainedTokenizerBase | None
) -> BaseModel:
    """Loads the base model in the trunk's type, or takes the given one; a given tokenizer wins.

    Raises:
        ValueError: no tokenizer is known, or the given model is not quantised as asked.
    """
    with first_process_first(args):  # it downloads, the others find the files
        base = (
            model
            if isinstance(model, BaseModel)
            else load_base(
                model,
                dtype=args.trunk_dtype,
                revision=args.model_revision,
                trust_remote_code=args.trust_remote_code,
                quantization=args.quantization,
            )
        )
    if args.quantization not in (None, quantization_of(base.model)):
        raise ValueError(
            f"load_in_{args.quantization}=true: the model object holds other weights; give its folder or hub name, or "
            "load it with a quantization_config of transformers"
        )
    if tokenizer is not None:
        base = base._replace(tokenizer=tokenizer)
    if base.tokenizer is None:
        raise ValueError("processing_class=None: the model came without a tokenizer; give its tokenizer")
    return base


def tokenizer_of(base: BaseModel) -> PreTrainedTokenizerBase:
    """The tokenizer that `as_base_model` made sure of."""
    assert base.tokenizer is not None
    return base.tokenizer


def as_table(
    source: Any, tokenizer: PreTrainedTokenizerBase, args: MixtureConfig, like: ComparisonTable | None = None
) -> ComparisonTable:
    """Reads and tokenizes rows in any form; a table is taken as it is.

    Args:
        source: rows, a `datasets` object, a file, a folder, a name, or a `ComparisonTable`.
        tokenizer: the base model's tokenizer.
        args: lengths and truncation.
        like: the training table, whose users and groups keep their indices.
    """
    if isinstance(source, ComparisonTable):
        check_feedback(source, args.feedback_model)
        return source
    rows = read_source(source)
    table = tokenize_rows(
        rows.rows,
        tokenizer,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        users=None if like is None else like.users,
        groups=None if like is None else like.groups,
        where=rows.where,
        source=rows.name,
        progress=not args.disable_tqdm,
        keep_ties=args.feedback_model.keeps_ties,
    )
    check_feedback(table, args.feedback_model)
    if like is not None and args.should_log:
        RowForm(like.form).check_rows(table.form)
    if table.dropped:
        logger.info("%s: left out %s", rows.name, ", ".join(f"{n} rows ({why})" for why, n in table.dropped.items()))
    if like is None and args.should_log and (warning := unread_users(rows.rows, unread_columns(rows.rows))) is not None:
        logger.warning("prefmix: %s", warning)
    return table


def resolve_latent(args: MixtureConfig, table: ComparisonTable) -> ResolvedLatent:
    """`auto` is `user` where most users have two or more rows and the gate is constant within a user, else `pair`."""
    if args.latent != "auto":
        return args.latent
    rows_of_user = np.bincount(table.user[table.user >= 0], minlength=len(table.users))
    repeated = len(rows_of_user) > 0 and np.mean(rows_of_user >= 2) > 0.5
    return "user" if repeated and not gate_problems(args.gate, "user") else "pair"


def metadata_encoder(args: MixtureConfig, table: ComparisonTable, latent: ResolvedLatent) -> MetadataEncoder | None:
    """Features of the gate's metadata term; under `latent="user"` only fields that are constant within a user."""
    if "metadata" not in features_of(args.gate):
        return None
    return MetadataEncoder.fit(table.metadata, user_fields_only=latent == "user")


def comparisons(
    table: ComparisonTable, base: BaseModel, args: MixtureConfig, encoder: MetadataEncoder | None
) -> Comparisons:
    """Computes or finds the trunk states of a table, and the gate's features."""
    heads_alone = args.expert_kind == "shared_base" and reads_states(args.branch_depth, args.trunk)
    cached = args.cache_states != "off" and heads_alone
    with first_process_first(args):  # it fills the cache, the others map the same file
        states = trunk_states(table, base, args) if cached else None
        prompt_states = None
        if "prompt" in features_of(args.gate):
            prompt_states = (states or trunk_states(table, base, args)).prompt_mean
    metadata = None if encoder is None else torch.from_numpy(encoder.encode(table.metadata))
    return Comparisons(table, states, prompt_states, metadata)


def trunk_states(table: ComparisonTable, base: BaseModel, args: MixtureConfig) -> TrunkStates:
    """States of every distinct text; on disk unless asked otherwise, because later epochs and runs read them again."""
    return build_trunk_states(
        base,
        table.texts,
        mode="disk" if args.cache_states in ("auto", "disk") else "memory",
        cache_dir=args.cache_dir,
        dtype=args.trunk_dtype,
        progress=not args.disable_tqdm,
    )


def build_model(
    base: BaseModel, args: MixtureConfig, train: Comparisons, encoder: MetadataEncoder | None
) -> MixtureModel:
    """K experts at their start and a uniform gate, seeded by `args.seed`."""
    generator = torch.Generator().manual_seed(args.seed)
    experts = starting_experts(base, args, expert_description(args), generator)
    for part in experts.modules():
        if isinstance(part, AbstractExperts):
            part.prefix_sharing = args.prefix_sharing
    terms = tuple(args.gate)
    gate = Gate(
        args.num_experts,
        terms,
        num_users=len(train.table.users) if "user" in terms else 0,
        prompt_dim=0 if train.prompt_states is None else train.prompt_states.shape[1],
        metadata_dim=0 if encoder is None else len(encoder),
        # Only a purely global gate has a closed form, and none beside z; every other one learns by gradient.
        update=args.gate_update if terms == ("global",) and args.latent != "membership" else "gradient",
        alpha=args.gate_prior_alpha,
        **_membership(args),
    )
    if train.prompt_states is not None:
        gate.fit_prompt_scale(train.prompt_states)
    return MixtureModel(experts, gate)


def _membership(args: MixtureConfig) -> dict[str, Any]:
    """What `Gate` is told of continuous groups."""
    if args.latent != "membership":
        return {}
    hidden = ENCODER_HIDDEN if args.membership_estep == "encoder" else 0
    dim = membership_dim(args.num_experts, args.membership_dim)
    blend = {"membership_combine": args.combine, "membership_noise": args.label_noise}
    return {"membership_dim": dim, "membership_encoder": hidden, "seed": args.seed, **blend}


def expert_description(args: MixtureConfig) -> dict[str, Any]:
    """The experts that a configuration asks for, as `AbstractExperts.describe` would describe them."""
    if args.expert_kind == "independent":
        return {"kind": "independent", "num_experts": args.num_experts, "reference": args.reference}
    description = {
        "kind": "shared_base",
        "branch_depth": args.branch_depth,
        "num_experts": args.num_experts,
        "head": expert_head(args.head, args.branch_depth),
        "rank": args.expert_rank,
    }
    if reads_states(args.branch_depth, args.trunk):
        return description
    alpha = 2.0 * args.expert_rank if args.lora_alpha is None else float(args.lora_alpha)
    return description | {"kind": "branched", "lora_alpha": alpha, "trunk": args.trunk}


def known_users(table: ComparisonTable, num_users: int) -> ComparisonTable:
    """The table with users beyond the first `num_users` (the training set's) marked as unknown, -1."""
    user = np.where(table.user < num_users, table.user, -1)
    return replace(table, user=user, users=table.users[:num_users])
