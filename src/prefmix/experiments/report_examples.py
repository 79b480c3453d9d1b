"""Texts for a report: comparisons that experts disagree about, and answers of every expert and of the mixture.

Legend: B rows, U users, K experts, C answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from prefmix.data.comparisons import ComparisonTable, TextTable
from prefmix.data.schema import check_rows
from prefmix.data.stages import stage
from prefmix.evaluation.figures.experts import Divergence
from prefmix.evaluation.reference import reference_policy
from prefmix.experiments.diagnose_writing import written_prompts
from prefmix.experiments.run_data import Dispute, Example
from prefmix.policy.generation import PRODUCT
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.policy.preferences import PreferenceScores, candidate_scores
from prefmix.policy.prompts import Prompt, prompt_token_ids
from prefmix.policy.responses import Response
from prefmix.policy.text_scores import text_log_probs

if TYPE_CHECKING:
    from prefmix.experiments.run_report import ReportOptions

DISPUTES, MOST_LETTERS = 5, 600


class Written(NamedTuple):
    """What was generated.

    Attributes:
        examples: one for each prompt.
        divergence: of each expert.
    """

    examples: list[Example]
    divergence: list[Divergence]


def find_disputes(
    policy: MixturePolicy,
    rows: Sequence[Mapping[str, Any]],
    table: ComparisonTable,
    scores: PreferenceScores,
    weights: np.ndarray,
    names: bool,
) -> list[Dispute]:
    """The comparisons of which experts say the most different things, one a prompt and pair of texts.

    Args:
        policy: its tokenizer.
        rows: what `table` was read from; prompts are shown as they are written there.
        table: B comparisons.
        scores: under every expert.
        weights: [B, K] of the rows' users.
        names: whether users' names are written.
    """
    probability = scores.log_prob.double().exp().numpy()
    if probability.shape[1] == 1:
        return []
    found: list[Dispute] = []
    seen: set[int] = set()
    for row in np.argsort(probability.min(axis=1) - probability.max(axis=1), kind="stable"):
        chosen, rejected = int(table.chosen[row]), int(table.rejected[row])
        if seen & {chosen, rejected}:
            continue
        seen |= {chosen, rejected}
        user = table.users[table.user[row]] if names and table.user[row] >= 0 else ""
        sides = [_text(policy, table.texts.completion_ids[i]) for i in (chosen, rejected)]
        compared = check_rows([rows[int(table.source_row[row])]], keep_ties=True).rows[0].responses
        ids = compared.token_ids
        asked = readable(compared.prompt if ids is None else _text(policy, ids.prompt_ids))
        found.append(Dispute(*asked, sides[0], sides[1], user, probability[row].tolist(), weights[row].tolist()))
        if len(found) == DISPUTES:
            break
    return found


def write_examples(
    policy: MixturePolicy, rows: Sequence[Mapping[str, Any]], weights: np.ndarray | None, options: ReportOptions
) -> Written | None:
    """Answers of every expert, of all together and of the reference to a few prompts, drawn at temperature 1.

    Args:
        policy: what writes.
        rows: prompts are drawn from them, evenly spaced among the distinct ones.
        weights: [U, K] users, for whose favourite an answer is; None: there are none.
        options: how many, how long.

    Returns:
        None where prompts are token ids, or empty.
    """
    prompts = written_prompts(policy, rows, options.examples)
    if not prompts:
        return None
    num_experts, seed = policy.config.num_experts, options.seed
    together = PRODUCT if policy.decoder == PRODUCT else "mixture"
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "return_details": True}
    reference, samples = reference_policy(policy), options.samples
    writers = [f"expert {k}" for k in range(num_experts)] + [_together(policy)] * (num_experts > 1)
    writers += [] if reference is None else ["the reference"]
    answers: list[list[Response]] = []  # of each writer, one to each prompt
    divergence: list[Divergence] = []
    with stage("writing answers", len(writers) * len(prompts), "answer", progress=options.progress) as done:
        for k in range(num_experts):
            alone = [float(j == k) for j in range(num_experts)]
            written = policy.generate(prompts, weights=alone, num_return_sequences=samples, seed=seed, **settings)
            asked = [prompt for prompt in prompts for _ in range(samples)]
            divergence.append(_divergence(policy, k, list(zip(asked, written, strict=True))))
            answers.append(written[::samples])
            done(len(prompts))
        if num_experts > 1:
            blend = torch.stack([policy.gate_weights(prompt) for prompt in prompts])
            answers.append(policy.generate(prompts, decoder=together, weights=blend, seed=seed, **settings))
            done(len(prompts))
        if reference is not None:
            answers.append(reference.generate(prompts, seed=seed, **settings))
            done(len(prompts))
    to_each = zip(prompts, zip(*answers, strict=True), strict=True)
    return Written([_example(policy, prompt, writers, found, weights) for prompt, found in to_each], divergence)


def _example(
    policy: MixturePolicy,
    prompt: Prompt,
    writers: Sequence[str],
    answers: Sequence[Response],
    weights: np.ndarray | None,
) -> Example:
    """Who prefers which: each expert's score of every answer, and the share of users who would put it first."""
    num_experts, texts = policy.config.num_experts, _texts(policy, [(prompt, a) for a in answers])
    log_probs = text_log_probs(policy.model.experts, texts)
    one_hot = torch.full((num_experts, num_experts), -torch.inf, dtype=torch.float64).fill_diagonal_(0.0)
    score = np.stack([candidate_scores(log_probs, texts, row, policy.config).numpy() for row in one_hot])
    people: list[float] = []
    # A user's score is the mean of the experts' by the user's weights where likelihoods of experts are mixed.
    if weights is not None and policy.config.feedback_model.likelihood == "mbt":
        first = (weights @ score).argmax(axis=1)
        people = (np.bincount(first, minlength=len(answers)) / len(first)).tolist()
    return Example(*readable(prompt), writers, [clip(a.text) for a in answers], score.tolist(), people)


def _together(policy: MixturePolicy) -> str:
    return "the product" if policy.decoder == PRODUCT else "the mixture"


def _divergence(policy: MixturePolicy, expert: int, written: Sequence[tuple[Prompt, Response]]) -> Divergence:
    """Mean of log pi_k(y) - log pi_ref(y) over responses y that expert k drew."""
    log_probs = text_log_probs(policy.model.experts, _texts(policy, written))
    ratio = (log_probs.log_probs - log_probs.ref_log_probs)[:, expert].double().numpy()
    error = float(ratio.std(ddof=1) / np.sqrt(len(ratio))) if len(ratio) > 1 else float("nan")
    tokens = float(np.mean([len(response.token_ids) for _, response in written]))
    return Divergence(float(ratio.mean()), error, len(ratio), tokens)


def _texts(policy: MixturePolicy, written: Sequence[tuple[Prompt, Response]]) -> TextTable:
    """The very tokens that were drawn, as texts to score."""
    prompts = [prompt_token_ids(prompt, policy.tokenizer) for prompt, _ in written]
    return TextTable(prompts, [response.token_ids for _, response in written], np.arange(len(written)), prompts)


def readable(prompt: Prompt) -> tuple[str, str]:
    """What was asked last, for a title, and the whole prompt: text, or a line of "role: content" for each message."""
    if isinstance(prompt, str):
        return clip(prompt), clip(prompt)
    whole = "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)
    asked = [str(message.get("content")) for message in prompt if message["role"] == "user"]
    return clip(asked[-1] if asked else whole), clip(whole)


def _text(policy: MixturePolicy, token_ids: Sequence[int]) -> str:
    return clip(str(policy.tokenizer.decode(list(token_ids), skip_special_tokens=True)))


def clip(text: str) -> str:
    """At most `MOST_LETTERS`; a report is no place for whole documents."""
    text = text.strip()
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1].rstrip() + "…"
