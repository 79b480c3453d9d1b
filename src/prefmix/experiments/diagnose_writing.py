"""Do the experts still write? A few responses of each, beside the reference's own. Legend: K experts.

Held-out rows cannot tell: their texts are people's or the reference's, and an expert that ranks them well may put its
probability on loops that no row shows. So each expert writes, and what it wrote is compared with what the reference
writes to the same prompts, at temperature 1:

- repetition: share of a response's 3-grams of tokens that stood in it before. A loop repeats nearly all of them, and a
  language model finds loops likely, so that neither of the other two sees one.
- perplexity under the reference: exp of the mean surprise of a token.
- KL a token: mean of log pi_k(y) - log pi_ref(y) over the tokens that expert k drew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prefmix.data.schema import check_rows
from prefmix.data.stages import stage
from prefmix.evaluation.generation_quality import Samples, language_figures, sample_responses
from prefmix.evaluation.reference import reference_policy
from prefmix.evaluation.text_statistics import repeated_share
from prefmix.experiments.diagnosis import Finding
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.prompts import Prompt, prompt_token_ids

PROMPTS, RESPONSES, MAX_NEW_TOKENS = 4, 8, 48

# More than a fifth of what was written is repeated beyond what the reference repeats: two of eight responses that loop.
# Responses at temperature 1 that do not loop are within 0.05 of it.
LOOPS = 0.2
# 1.4 nats of surprise a token above the reference's own. A token's surprise has a deviation of 2 to 3 nats, so chance
# moves the mean of 400 tokens by 0.15, and the prompts and the numbers of tokens are the same for all.
PERPLEXITY_RATIO = 4.0
# Each token e times as likely under the expert as under the reference in the geometric mean: 48 nats over a response.
KL_PER_TOKEN = 1.0

REMEDY = (
    "train fewer epochs, or with load_best_model_at_end, a lower learning_rate, sft_weight or token_dropout; without "
    "training, `policy.strength.at_strength` below 1 moves heads back towards the reference"
)


class Writing(NamedTuple):
    """What a few responses look like.

    Attributes:
        kl: log pi(y) - log pi_ref(y) a token, over its own responses, nats.
        perplexity: under the reference.
        repetition: mean share of repeated 3-grams of tokens.
        responses: how many.
    """

    kl: float
    perplexity: float
    repetition: float
    responses: int


def writing(policy: MixturePolicy, rows: Sequence[Mapping[str, Any]], *, seed: int = 0) -> Finding | None:
    """Lets every expert and the reference write `RESPONSES` responses, to up to `PROMPTS` prompts of the rows.

    Args:
        policy: the policy.
        rows: preference rows; prompts that leave no room for an answer are passed over.
        seed: of the draws.

    Returns:
        None where nothing can be written: prompts are token ids or too long, or experts have references of their own.
    """
    found, reference = written_prompts(policy, rows, PROMPTS, MAX_NEW_TOKENS), reference_policy(policy)
    if not found or reference is None:
        return None
    num_experts = policy.config.num_experts
    call: dict[str, Any] = {"each": math.ceil(RESPONSES / len(found)), "max_new_tokens": MAX_NEW_TOKENS, "seed": seed}
    total = num_experts + 1
    with stage("letting experts and the reference write", total, "writer") as done:
        own = _figures(sample_responses(reference, found, **call), 0)  # type: ignore[arg-type]
        done(1)
        experts = []
        for k in range(num_experts):
            alone = [float(j == k) for j in range(num_experts)]
            samples = sample_responses(policy, found, weights=alone, **call)  # type: ignore[arg-type]
            experts.append(_figures(samples, k))
            done(1)
    return judge_writing(experts, own)


def _figures(samples: Samples, expert: int) -> Writing:
    tokens = sum(len(ids) for ids in samples.token_ids)
    kl = float((samples.expert_log_probs[:, expert] - samples.ref_log_probs).sum() / tokens)
    repeated = float(np.mean([repeated_share(ids) for ids in samples.token_ids]))
    return Writing(kl, language_figures(samples).perplexity, repeated, len(samples.responses))


def judge_writing(experts: Sequence[Writing], reference: Writing) -> Finding:
    """What K experts write, beside the reference.

    Args:
        experts: K of them.
        reference: its own responses to the same prompts.
    """
    faults, numbers = [], {"reference_repetition": reference.repetition, "reference_perplexity": reference.perplexity}
    for k, own in enumerate(experts):
        ratio = own.perplexity / reference.perplexity
        numbers |= {f"kl_per_token_{k}": own.kl, f"perplexity_{k}": own.perplexity, f"repetition_{k}": own.repetition}
        if own.repetition > reference.repetition + LOOPS:
            faults.append(
                f"expert {k} repeats itself: {own.repetition:.0%} of its 3-grams stood in the response before, "
                f"{reference.repetition:.0%} of the reference's"
            )
        elif ratio > PERPLEXITY_RATIO or own.kl > KL_PER_TOKEN:
            faults.append(
                f"expert {k} writes what the reference hardly would: perplexity under it {own.perplexity:.0f}, the "
                f"reference's own {reference.perplexity:.0f}; KL {own.kl:.2f} nats a token"
            )
    kl = " ".join(f"{own.kl:.2f}" for own in experts)
    repeated = " ".join(f"{own.repetition:.0%}" for own in experts)
    seen = (
        f"KL from the reference {kl} nats a token, repeated 3-grams {repeated} (the reference's "
        f"{reference.repetition:.0%}), over {experts[0].responses} responses an expert"
    )
    if faults:
        return Finding("writing", "warning", "; ".join([*faults, seen]), numbers, REMEDY)
    return Finding("writing", "fine", seen, numbers)


def written_prompts(
    policy: MixturePolicy, rows: Sequence[Mapping[str, Any]], count: int, room: int = 1
) -> list[Prompt] | None:
    """Up to `count` distinct prompts of the rows, evenly spaced, with room for so many tokens of an answer.

    Returns:
        None where prompts are token ids.
    """
    checked = check_rows(rows, keep_ties=policy.config.feedback_model.keeps_ties)
    if checked.form == "tokenized":
        return None
    distinct: dict[str, Any] = {}
    for row in checked.rows:
        distinct.setdefault(repr(row.responses.prompt), row.responses.prompt)
    longest = policy.tokenizer.model_max_length - room
    found = [p for p in distinct.values() if p and len(prompt_token_ids(p, policy.tokenizer)) <= longest]
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[i] for i in dict.fromkeys(places.tolist())]
