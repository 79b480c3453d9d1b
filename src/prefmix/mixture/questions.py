"""Which comparison would tell most about a user: mutual information between the answer and the user's expert.

Legend: C candidate comparisons, K experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.precision import at_least_float32


def answer_information(
    log_weights: Float[Tensor, "C K"],
    log_lik: Float[Tensor, "C K"],
    log_lik_reversed: Float[Tensor, "C K"],
) -> Float[Tensor, "C"]:
    """Mutual information of the answer to a comparison and the expert of the user who gives it, nats.

        I = sum_a sum_k w_k p_k(a) [log p_k(a) - log sum_j w_j p_j(a)],   a: the first or the second is preferred

    It is the expected gain in the log-posterior of the true expert, and the entropy of the mixture's answer less the
    mean entropy of the experts': a question on which all experts are undecided says nothing, nor does one on which all
    agree. At most log 2, and at most the entropy of w.

    Args:
        log_weights: [C, K] normalised log w_k; -inf allowed.
        log_lik: [C, K] log p_k(first preferred), nats.
        log_lik_reversed: [C, K] log p_k(second preferred).

    Returns:
        [C] nats, at least 0.

    Source: Lindley 1956; Houlsby et al. 2011 (arXiv 1112.5745), equation 2, with a finite hypothesis space.
    Relations: one question ahead; several questions asked at once would share information.
    """
    log_weights = at_least_float32(log_weights)
    answers = torch.stack([at_least_float32(log_lik), at_least_float32(log_lik_reversed)])
    joint = log_weights + answers
    mixture = torch.logsumexp(joint, dim=-1, keepdim=True)
    # exp(joint) is 0 where an expert excludes the answer or has no weight: 0 log 0 is 0 there.
    excluded = joint == -torch.inf
    ratio = (answers.masked_fill(excluded, 0.0) - mixture).masked_fill(excluded, 0.0)
    return (joint.exp() * ratio).sum(dim=(0, 2)).clamp(min=0.0)
