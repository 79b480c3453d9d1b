"""What to ask a user next: candidate pairs of responses, by what an answer would tell about the user's expert."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from prefmix.mixture.questions import answer_information

if TYPE_CHECKING:
    from prefmix.policy.mixture_policy import MixturePolicy


class Question(NamedTuple):
    """A pair of responses that a user could compare.

    Attributes:
        candidate: as it was given.
        position: where it stood in the list that was given.
        information: mutual information of the answer and the user's expert, nats.
        probability: sum_k w_k p_k(first response preferred).
    """

    candidate: Mapping[str, Any]
    position: int
    information: float
    probability: float


def rank_questions(
    policy: MixturePolicy,
    user: str | None,
    candidates: Sequence[Mapping[str, Any]],
    metadata: Mapping[str, Any] | None = None,
) -> list[Question]:
    """All candidates, the most informative first; those that training would leave out are left out.

    Args:
        policy: trained under `latent="user"`.
        user: known by the policy or not; what it knows of the user counts.
        candidates: mappings with `prompt` and the two responses under `chosen` and `rejected`, as in preference rows;
            which of them stands where does not matter.
        metadata: of the user, where the gate reads it.

    Raises:
        ValueError: another latent, no candidate, or none that can be used.
    """
    if policy.config.latent != "user":
        raise ValueError(
            f"next_question: under latent={policy.config.latent!r} a user has no single expert to find out; train with "
            "latent='user'"
        )
    extra: dict[str, Any] = {"user": user} if user is not None else {}
    extra |= {"metadata": dict(metadata)} if metadata else {}
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected") if name in row} | extra for row in candidates]
    if not rows:
        raise ValueError("candidates=[]: give at least one pair of responses to choose from")
    with warnings.catch_warnings():
        # Somebody new is whom questions are for, and the population's weights are the right prior.
        warnings.filterwarnings("ignore", message="unknown users", category=UserWarning)
        scored = [entry for entry in policy.score(rows) if "probabilities" in entry]
    if not scored:
        raise ValueError("candidates: none of them can be compared (ties, or prompts that fill max_length); add others")
    weights, first = (torch.tensor([e[n] for e in scored], dtype=torch.float64) for n in ("weights", "probabilities"))
    information = answer_information(weights.log(), first.log(), torch.log1p(-first)).tolist()
    order = sorted(range(len(scored)), key=lambda i: -information[i])
    return [
        Question(candidates[scored[i]["row"]], scored[i]["row"], information[i], scored[i]["probability"])
        for i in order
    ]
