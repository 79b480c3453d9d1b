"""What a run leaves behind: the policy, and the fingerprint by which a checkpoint knows its run.

Legend: B training rows, U users, K experts.
"""

from __future__ import annotations

import hashlib
import platform
from array import array
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.comparisons import ComparisonTable
from prefmix.evaluation.scoring import score_texts
from prefmix.experts.base_model import BaseModel
from prefmix.experts.quantization import quantization_of
from prefmix.mixture.posterior import group_log_lik
from prefmix.policy.config import PolicyConfig
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.user_state import UserState
from prefmix.training.config import MixtureConfig
from prefmix.training.final_gate import final_gate
from prefmix.training.membership_options import membership_dim
from prefmix.training.membership_step import final_memberships
from prefmix.training.record import training_record
from prefmix.training.setup import expert_description, tokenizer_of

if TYPE_CHECKING:
    from prefmix.training.trainer import MixtureTrainer


def training_log_lik(trainer: MixtureTrainer) -> Float[Tensor, "B K"]:
    """Log-likelihoods of all training rows under the experts as they are: one pass over the distinct texts."""
    comparisons, args, noise = trainer.train_comparisons, trainer.args, trainer.em.noise
    every = torch.arange(len(comparisons.table), device=args.device)
    return score_texts(
        trainer.readings.of(comparisons),
        comparisons.table,
        beta=args.betas,
        feedback=args.feedback_model,
        noise=None if noise is None else noise.of_rows(every).double().cpu(),
    ).log_lik


def user_state(table: ComparisonTable, log_lik: Float[Tensor, "B K"]) -> UserState:
    """Evidence of every training user: sum of weight * log p_k over their rows.

    Args:
        table: training comparisons.
        log_lik: [B, K] log p_ik.
    """
    known = np.flatnonzero(table.user >= 0)
    user, weight = torch.from_numpy(table.user[known]), torch.from_numpy(table.weight[known]).double()
    evidence = group_log_lik(log_lik[torch.from_numpy(known)].double(), user, len(table.users), weight)
    count = torch.zeros(len(table.users), dtype=torch.float64).index_add_(0, user, weight)
    return UserState(list(table.users), evidence, count)


def trained_users(trainer: MixtureTrainer, log_lik: Float[Tensor, "B K"]) -> UserState:
    """What the training rows say of every user, where users stand among the experts included (`membership`).

    Args:
        trainer: its gate and training rows.
        log_lik: [B, K] log p_ik of the training rows.
    """
    users = user_state(trainer.train_comparisons.table, log_lik)
    users.noise = _rates(trainer)
    return final_memberships(trainer, users, log_lik) if trainer.latent == "membership" else users


def running_users(trainer: MixtureTrainer) -> UserState:
    """What the running evidence says of every user, q(z) as of their last visit; nothing under `pair`."""
    table, q = trainer.train_comparisons.table, trainer.em.q
    if trainer.latent == "pair":
        empty = UserState.empty(trainer.args.num_experts, table.users)
        empty.noise = _rates(trainer)
        return empty
    users = user_state(table, trainer.em.evidence.table.cpu())
    users.noise = _rates(trainer)
    if q is not None:
        users.mean, users.log_std = (part[: len(users)].double().cpu() for part in q)
    return users


def _rates(trainer: MixtureTrainer) -> Float[Tensor, "U"] | None:
    noise = trainer.em.noise
    return None if noise is None else noise.of_users(len(trainer.train_comparisons.table.users))


def population_noise(trainer: MixtureTrainer) -> float:
    """Error rate of somebody unknown: as given, or the mean of the learnt rates."""
    return trainer.args.label_noise if trainer.em.noise is None else trainer.em.noise.population


def build_policy(trainer: MixtureTrainer, log_lik: Float[Tensor, "B K"]) -> MixturePolicy:
    """The experts as they stand, with what they say of users, and where they came from.

    Args:
        trainer: its experts, gate and training rows.
        log_lik: [B, K] log p_ik of the training rows.
    """
    args, base = trainer.args, trainer.base
    users, gate = trained_users(trainer, log_lik), final_gate(trainer, log_lik)
    gguf_file = getattr(base, "gguf_file", None)
    config = PolicyConfig(
        experts=trainer.mixture.experts.describe(),
        gate=gate.describe(),
        beta=tuple(args.betas),
        latent=trainer.latent,
        base_source=base.source,
        base_sha256=base.sha256,
        label_noise=population_noise(trainer),
        label_noise_update=args.label_noise_update,
        label_noise_prior=None if args.label_noise_update == "fixed" else cast(Any, args.label_noise_prior),
        feedback=args.feedback_model.to_dict(),
        base_revision=args.model_revision,
        base_gguf_file=gguf_file,
        quantization=cast(Any, quantization_of(base.model)),
        dtype=str(args.trunk_dtype).removeprefix("torch."),
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        row_form=trainer.train_comparisons.table.form,
        provenance={
            "data_sha256": trainer.identity["data_sha256"],
            "training_rows": len(trainer.train_comparisons.table),
            "training_users": len(trainer.train_comparisons.table.users),
            "training_texts": len(trainer.train_comparisons.table.texts),
            "steps": trainer.state.global_step,
            "seed": args.seed,
            "init": trainer.init,
            "label_noise_update": args.label_noise_update,
            "torch": torch.__version__,
            "hardware": f"{platform.machine()}, {args.device.type}",
        },
    )
    model = MixtureModel(trainer.mixture.experts, gate)
    record = training_record(trainer)
    return MixturePolicy(model, tokenizer_of(base), config, users, trainer.metadata_encoder, record)


def identity(args: MixtureConfig, base: BaseModel, table: ComparisonTable, latent: str) -> dict[str, Any]:
    """What a checkpoint must agree with to continue this run; JSON values."""
    # Files of a checkpoint are one an expert then; those of other runs keep the identity that they had.
    spread: dict[str, Any] = {"expert_parallel": True} if args.expert_parallel else {}
    if latent == "membership":
        dim = membership_dim(args.num_experts, args.membership_dim)
        spread |= {"membership_dim": dim, "membership_estep": args.membership_estep}
    feedback = {"feedback": said} if (said := args.feedback_model.to_dict()) else {}
    if args.estep == "amortized":
        spread["estep"] = args.estep
    if args.adaptive_beta is not None:
        spread["adaptive_beta"] = args.adaptive_beta
    if args.label_noise_update != "fixed":
        spread |= {"label_noise_update": args.label_noise_update, "label_noise_prior": list(args.label_noise_prior)}
    return spread | {
        "data_sha256": table_sha256(table),
        "base_sha256": base.sha256,
        **{"expert_rank" if name == "rank" else name: value for name, value in expert_description(args).items()},
        "starts": {"expert_models": list(args.expert_models), "init_experts": list(args.init_experts)},
        "train_experts": args.train_experts,
        "gate": list(args.gate),
        "gate_update": args.gate_update,
        "latent": latent,
        **feedback,
    }


def table_sha256(table: ComparisonTable) -> str:
    """SHA-256 of the token ids and of every column that training reads."""
    digest = hashlib.sha256()
    for lists in (table.texts.prompt_ids, table.texts.completion_ids):
        for ids in lists:
            digest.update(array("q", [len(ids), *ids]).tobytes())
    ranked = () if table.ranked is None else (table.ranked.texts, table.ranked.size, table.ranked.stages)
    further = [column for column in (table.tie, table.label) if column is not None]
    for column in (table.chosen, table.rejected, table.user, table.weight, *further, *ranked):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
