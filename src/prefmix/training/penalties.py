"""What a loss has beside the bound: terms that hold experts together, or to what people prefer.

Legend: N texts, B comparisons, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.likelihoods.feedback import text_rewards
from prefmix.mixture.likelihoods.model import FeedbackModel
from prefmix.policy.mixture_model import MixtureOutput
from prefmix.training.objective import batch_rows, completion_lengths

if TYPE_CHECKING:
    from prefmix.training.config import MixtureConfig


def penalty(
    output: MixtureOutput,
    inputs: Mapping[str, Tensor],
    resp: Float[Tensor, "B K"],
    beta: Float[Tensor, "K"],
    args: MixtureConfig,
    pooling: float,
) -> Float[Tensor, ""] | float:
    """The terms that a configuration asks for, summed over the batch's rows, nats; 0 for none.

    Args:
        output: log-probabilities of the batch's texts under all experts, all with gradient.
        inputs: the batch.
        resp: [B, K] responsibilities q_ik.
        beta: [K] beta_k.
        args: `pooling`, `sft_weight`.
        pooling: what the start asks for.
    """
    found: Tensor | float = 0.0
    strength = pooling_of(args, pooling)
    if strength:
        found = found + strength * pooling_penalty(output, inputs, beta=beta, model=args.feedback_model).sum()
    if args.sft_weight:
        found = found + args.sft_weight * sft_rows(output, inputs, resp, args.token_dropout).sum()
    return found


def pooling_of(args: MixtureConfig, start: float) -> float:
    """`args.pooling`, or where that is null what the start asks for, if several experts explain rows and all learn.

    The other two likelihoods are of one policy, whose experts need not explain a row each.
    """
    if args.pooling is not None:
        return args.pooling
    return start if args.num_experts > 1 and args.m_step == "all" and args.likelihood == "mbt" else 0.0


def pooling_penalty(
    output: MixtureOutput, inputs: Mapping[str, Tensor], *, beta: Float[Tensor, "K"], model: FeedbackModel
) -> Float[Tensor, "B"]:
    """[B] a_i v_i with v_i = sum_k (m_ik - mean_j m_ij)^2 / K: how far experts lie apart, nats^2, with gradient.

    pooling * sum_i a_i v_i is minus the log of a Gaussian prior of deviations in function space, whatever an expert
    is. For linear experts m_ik = c_k . d_i it is sum_k |c_k - mean_j c_j|^2 / 2 in the metric (2 pooling / K) sum_i
    a_i d_i d_i^T: the hierarchical prior of `mixture.linear_em`, scaled as the data are.

    Args:
        output: log-probabilities of the batch's texts under all experts, all with gradient.
        inputs: the batch; of a ranking, the best text is set against the last.
        beta: [K] beta_k.
        model: the observation model, whose rewards are meant.

    Source: Zellner 1986 (g-prior); Evgeniou & Pontil 2004 for penalising tasks' distance from their mean.
    """
    rows = batch_rows(inputs, model)
    rewards = text_rewards(output.log_probs, output.ref_log_probs, beta, rows.num_tokens, model)
    return inputs["weight"].to(rewards.dtype) * expert_variance(rewards[rows.chosen] - rewards[rows.rejected])


def pooling_like(
    precision: float, difference: Float[Tensor, "B P"], weight: Float[Tensor, "B"], num_experts: int
) -> float:
    """The `pooling` that holds experts' differences as a linear mixture's prior of this precision holds its own.

    Deviations e_k = c_k - mean_j c_j of linear rewards have the log prior -precision/2 sum_k |e_k|^2, and `pooling`
    stands for -pooling sum_i a_i sum_k (e_k . d_i)^2 / K: two metrics, made equal in trace,

        pooling = precision K P / (2 sum_i a_i |d_i|^2),

    so the whole prior keeps its strength and a row's share of it falls as rows are added.

    Args:
        precision: of the linear rewards' deviations (`mixture.linear_em`: ridge + pooling).
        difference: [B, P] d_i of the comparisons.
        weight: [B] a_i.
        num_experts: K.
    """
    spread = float((weight * difference.square().sum(dim=1)).sum())
    return precision * num_experts * difference.shape[1] / (2 * spread) if spread > 0 else 0.0


def expert_variance(margins: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """[B] sum_k (m_ik - mean_j m_ij)^2 / K, nats^2."""
    return margins.var(dim=1, unbiased=False)


def sft_rows(
    output: MixtureOutput, inputs: Mapping[str, Tensor], resp: Float[Tensor, "B K"], token_dropout: float = 0.0
) -> Float[Tensor, "B"]:
    """[B] - a_i sum_k q_ik sum_s t_is log pi_k(y_s | x_i) / |y_s|: supervised learning of what was preferred, nats.

    A comparison only asks for a difference, so DPO may lower both responses, and their probability goes to what nobody
    compared. This term holds the preferred one up. t_i is (1, 0); the label of a soft one, a half for a tie; of a
    ranking, the best text is meant.

    Args:
        output: log-probabilities of the batch's texts under all experts, all with gradient.
        inputs: the batch.
        resp: [B, K] responsibilities q_ik.
        token_dropout: share of the tokens that the batch leaves out; log-probabilities were divided by the rest.

    Source: Pang et al. 2024, Iterative Reasoning Preference Optimization, equation 2; TRL's loss_type "sft".
    """
    lengths = completion_lengths(inputs).clamp(min=1).to(output.log_probs.dtype)
    per_token = output.log_probs * (1 - token_dropout) / lengths.unsqueeze(1)
    share = torch.ones_like(inputs["weight"]) if inputs.get("label") is None else inputs["label"]
    if inputs.get("tie") is not None:
        share = torch.where(inputs["tie"], 0.5, share)
    share = share.to(per_token.dtype).unsqueeze(1)
    said = share * per_token[inputs["chosen"]] + (1 - share) * per_token[inputs["rejected"]]
    return -inputs["weight"].to(said.dtype) * (resp.detach() * said).sum(1)
