"""The trained object: K experts, a gate and what is known of users; it writes, scores, ranks and adapts.

Legend: N texts, B comparisons, K experts, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.tokenization import tokenize_rows, tokenize_texts
from prefmix.data.users import MetadataEncoder
from prefmix.experts.base_model import BaseSource
from prefmix.mixture.bradley_terry import mixture_log_lik
from prefmix.mixture.group_objectives import UnknownUserWeights
from prefmix.policy.config import PolicyConfig
from prefmix.policy.folder import check_unchanged, policy_home, saved_state
from prefmix.policy.generation import DECODERS, PRODUCT, SamplingOptions
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.preferences import PreferenceScores, Ranked, candidate_scores, preference_scores, score_dicts
from prefmix.policy.prompts import Prompt, is_single_prompt, prompt_list, prompt_token_ids, users_and_metadata
from prefmix.policy.questions import Question, rank_questions
from prefmix.policy.responses import end_tokens, response_call, stream_response, write_responses
from prefmix.policy.row_form import RowForm
from prefmix.policy.serialization import PolicyParts, read_policy, write_policy
from prefmix.policy.text_scores import product_log_probs, text_log_probs
from prefmix.policy.unknown_users import Objective, default_weights, unknown_user_weights
from prefmix.policy.user_learning import learn_user
from prefmix.policy.user_state import UserState
from prefmix.policy.user_weights import UserWeights, given_weights

Metadata, Rows = Mapping[str, Any], Sequence[Mapping[str, Any]]


class MixturePolicy:
    """A mixture of expert policies.

        pi(y | x, u) = sum_k w_k(x, u) pi_k(y | x)

    a mixture over whole responses; trained with `combine="log_linear"`, their product, normalised at each token (see
    `generation`). `gate_weights` is the prior w; `weights`, and everything else here that names a user, uses the
    posterior of a known user, and for all others the gate, or what `set_unknown_users` said.

    Attributes:
        model: experts and gate.
        tokenizer: the tokenizer of training.
        config: what the policy folder records.
        users: what is known of each user.
        metadata_encoder: features of metadata, where the gate reads them.
        record: what training cost and reached (`training.json`), for the model card; never read by the code.
        path: the folder that the policy was loaded from or saved to last.
    """

    def __init__(
        self,
        model: MixtureModel,
        tokenizer: PreTrainedTokenizerBase,
        config: PolicyConfig,
        users: UserState | None = None,
        metadata_encoder: MetadataEncoder | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        assert model.experts.num_experts == config.num_experts, "one beta for each expert"
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = config
        self.users = users if users is not None else UserState.empty(config.num_experts)
        self.metadata_encoder = metadata_encoder
        self.record = dict(record or {})
        self._row_form = RowForm(config.row_form)
        self.path: Path | None = None
        self._saved: str | None = None

    @property
    def decoder(self) -> str:
        """The decoder that draws from the policy as it was trained."""
        return PRODUCT if self.config.feedback_model.is_product else "sample"

    @property
    def eos_token_ids(self) -> set[int]:
        """Tokens that end a response: the tokenizer's, and those of the base model's generation config."""
        return end_tokens(self.model.experts, self.tokenizer)

    # --- disk ---------------------------------------------------------------------------------------------------------
    def save_pretrained(
        self, path: str | Path, *, user_state: bool = True, experts_folder: str | Path | None = None
    ) -> None:
        """Writes the policy folder atomically; an earlier policy there is replaced, anything else is refused.

        The base model is recorded by source and hash, and copied only where it cannot be found again.

        Args:
            path: the folder.
            user_state: whether to write what is known of users; without it all users are unknown to the copy.
            experts_folder: a folder with finished `expert_k`, which are moved into the policy instead of written (the
                processes of an expert-parallel run write their own).
        """
        self.config = replace(self.config, experts=self.model.experts.describe(), gate=self.model.gate.describe())
        parts = PolicyParts(self.model, self.tokenizer, self.config, self.users, self.metadata_encoder, self.record)
        written = None if experts_folder is None else Path(experts_folder)
        write_policy(path, parts, user_state=user_state, experts_folder=written)
        self.path, self._saved = Path(path), saved_state(Path(path))

    def save_back(self) -> None:
        """Writes the policy to the folder that it came from.

        Raises:
            ValueError: it has no folder yet, or another process saved there since.
        """
        self.save_pretrained(check_unchanged(self.path, self._saved))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, base: BaseSource | None = None, device: str | torch.device | None = None
    ) -> MixturePolicy:
        """Loads a policy folder, or the `policy` folder within a training output.

        Args:
            path: the folder.
            base: where the base model is now, if it has moved, or the model itself; its content must be the same.
            device: where to run; null: a CUDA GPU if there is one, else the CPU.

        Raises:
            ValueError: no policy, damaged files, another format, or another base model.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        policy = cls(*read_policy(path, base=base, device=device))
        policy.path = policy_home(path)
        policy._saved = saved_state(policy.path)
        return policy

    # --- weights ------------------------------------------------------------------------------------------------------
    def gate_weights(
        self, prompt: Prompt | None = None, user: str | None = None, metadata: Metadata | None = None
    ) -> Float[Tensor, "K"]:
        """The prior w(x, u): what the gate says, without a user's accumulated evidence.

        Without a prompt the average training prompt stands in, without metadata the average of metadata.
        """
        return self._user_weights().gate(self._prompts(prompt), [user], [metadata])[0].exp()

    def weights(
        self, prompt: Prompt | None = None, user: str | None = None, metadata: Metadata | None = None
    ) -> Float[Tensor, "K"]:
        """The weights that the policy uses: the posterior of a known user, the gate otherwise.

            latent="user":        w_k proportional to gate_k prod_{i of user} p_k(y_w > y_l)
            latent="membership":  w_k = E_q softmax_k(gate + A z), q(z) of the user, N(0, I) where unknown

        Warns:
            UserWarning: a name that this policy does not know gets the population's weights.
        """
        return self._user_weights().posterior(self._prompts(prompt), [user], [metadata])[0].exp()

    def adapt(self, user: str, comparisons: Rows, save: bool = False, *, anew: bool = False) -> Float[Tensor, "K"]:
        """Learns a user's weights from comparisons, without training; returns them.

        Under `latent="user"` this is the exact posterior; under `latent="pair"` with a `user` gate term the maximum a
        posteriori weights; under `latent="membership"` one pass of the encoder, or a small fit. Where training learnt
        `per_annotator` rates, the user's is fitted along (`user_learning`). The same rows given twice count twice.

        Args:
            user: a new or known name; a `user` column in the rows is not read.
            comparisons: rows with prompt, chosen, rejected, and perhaps weight and metadata.
            save: also write the policy back to the folder that it came from (`save_back`).
            anew: in the place of what the user's earlier comparisons told, not in addition to it.

        Raises:
            ValueError: the policy has nothing that depends on the user, rows are unusable, or `save_back` refuses.
        """
        if save:
            check_unchanged(self.path, self._saved)
        user_weights = self._user_weights()
        user_weights.check_adaptable()
        if not str(user).strip():
            raise ValueError(f"user={user!r}: give the user a name")
        table = self.table(comparisons)
        if anew:
            user_weights.reset(user)
        scores = self._preference_scores(table, [self.users.index(user)] * len(table))
        learn_user(user_weights, user, table, scores, self.config)
        if save:
            self.save_back()
        metadata = table.metadata[0] if len(table) else None
        return user_weights.posterior(None, [user], [metadata])[0].exp()

    def forget(self, user: str, save: bool = False) -> None:
        """Takes a user out: name, evidence, weights. What the experts learnt from their rows in training stays.

        Raises:
            ValueError: the name is unknown, or `save_back` refuses.
        """
        if save:
            check_unchanged(self.path, self._saved)
        self._user_weights().forget(user)
        if save:
            self.save_back()

    def unknown_user_weights(
        self, objective: Objective = "max_min", rows: Rows | None = None, by: str = "user"
    ) -> UnknownUserWeights:
        """Weights for somebody about whom nothing is known, for `generate(weights=...)`; see `unknown_users`."""
        return unknown_user_weights(self, objective, rows, by)  # type: ignore[arg-type]

    def set_unknown_users(self, objective: Objective | None, rows: Any = None, by: Any = "user") -> None:
        """Makes `unknown_user_weights` everybody's of whom nothing is known; saving keeps them. None: the gate's."""
        self.config = replace(self.config, unknown_users=default_weights(self, objective, rows, by))

    def user_log_weights(self, users: Sequence[str]) -> Float[Tensor, "U K"]:
        """[U, K] log-weights of known users at the average prompt and metadata; float64."""
        return self._user_weights().posterior(None, users, [None] * len(users))

    @torch.no_grad()
    def table_gate_log_weights(self, table: ComparisonTable) -> Float[Tensor, "B K"]:
        """[B, K] log w of a table's comparisons by the gate's terms, every user taken as unknown; float64.

        Under `latent="membership"` this is at z = 0: `evaluation.weights` takes the mean over z.
        """
        prompts = [table.texts.prompts[i] for i in table.prompt]
        return self._user_weights().gate_terms(prompts, list(table.metadata))

    # --- texts --------------------------------------------------------------------------------------------------------
    def table(self, rows: Rows, progress: bool = False) -> ComparisonTable:
        """Rows, tokenized as in training; warns where all are plain text and those were messages, or the reverse."""
        reading = self._truncation() | {"keep_ties": self.config.feedback_model.keeps_ties, "progress": progress}
        table = tokenize_rows(rows, self.tokenizer, users=self.users.names, **reading)
        self._row_form.check_rows(table.form)
        return table

    def log_prob(
        self,
        prompts: Prompt | Sequence[Prompt],
        responses: Any,
        *,
        user: str | Sequence[str | None] | None = None,
        metadata: Metadata | Sequence[Metadata | None] | None = None,
        per_expert: bool = False,
    ) -> Float[Tensor, "N"] | Float[Tensor, "N K"]:
        """Log pi(y | x, u) = log sum_k w_k(x, u) pi_k(y | x), nats, summed over the response's tokens.

        Of a log-linear policy it is `text_scores.product_log_probs`, which takes as long as writing the responses.

        Tokenized as in training: plain text ends with the end-of-sequence token, conversations as their template says.

        Args:
            prompts: N prompts (text or messages), or one for all responses.
            responses: N responses (text or messages).
            user: one name for all, or N; None is the population.
            metadata: one mapping for all, or N.
            per_expert: give log pi_k(y | x) [N, K] of every expert instead.
        """
        responses = [responses] if isinstance(responses, str) else list(responses)
        given = prompt_list(prompts) * (len(responses) if is_single_prompt(prompts) else 1)
        if len(given) != len(responses):
            raise ValueError(f"prompts: {len(given)} for {len(responses)} responses; give one each, or one for all")
        texts = tokenize_texts(zip(given, responses), self.tokenizer, **self._truncation())
        log_probs = text_log_probs(self.model.experts, texts).log_probs.double()
        if per_expert:
            return log_probs
        token_ids = [texts.prompts[i] for i in texts.prompt_index]
        rows = users_and_metadata(user, metadata, len(responses))
        log_weights = self._user_weights().posterior(token_ids, *rows)
        if self.config.feedback_model.is_product:
            return product_log_probs(self.model.experts, texts, log_weights)
        return mixture_log_lik(log_weights, log_probs)

    def score(self, rows: Rows) -> list[dict[str, Any]]:
        """Implicit rewards and preference probabilities of comparisons, one JSON-ready dictionary for each row.

        `row` (position in `rows`); `user`; `weights` [K] of that row; under every expert `rewards/chosen`,
        `rewards/rejected`, `rewards/margins` (nats) and `probabilities`, p_k(chosen > rejected), label noise
        included; `probability`, the mixture's sum_k w_k p_k (log-linear: that of the margin sum_k w_k m_k). Rows that
        training would leave out (ties, prompts that fill max_length) have `row` and `dropped` alone.

        Raises:
            DataError: rows that cannot be used.
        """
        table = self.table(rows)
        scores = self._preference_scores(table, table.user.tolist())
        names = [table.users[i] if i >= 0 else None for i in table.user]
        prompts = [table.texts.prompts[i] for i in table.prompt]
        log_weights = self._user_weights().posterior(prompts, names, list(table.metadata))
        scored = score_dicts(scores, log_weights, names, table.source_row.tolist(), self.config)
        return [scored.get(row, {"row": row, "dropped": True}) for row in range(len(rows))]

    def rank(
        self, user: str | None, prompt: Prompt, candidates: Sequence[Any], metadata: Metadata | None = None
    ) -> list[Ranked]:
        """Candidates from best to worst, as this user would judge; see `preferences.beating_probability`."""
        candidates = list(candidates)
        if not candidates:
            raise ValueError("candidates=[]: give at least one response to rank")
        texts = tokenize_texts(((prompt, candidate) for candidate in candidates), self.tokenizer, **self._truncation())
        log_probs = text_log_probs(self.model.experts, texts)
        log_weights = self._user_weights().posterior([texts.prompts[0]], [user], [metadata])[0]
        scores = candidate_scores(log_probs, texts, log_weights, self.config)
        order = torch.argsort(scores, descending=True, stable=True).tolist()
        return [Ranked(candidates[i], float(scores[i]), i) for i in order]

    def next_question(self, user: str | None, candidates: Rows, metadata: Metadata | None = None) -> Question:
        """The candidate pair whose comparison would tell most about this user's expert; see `rank_questions`."""
        return rank_questions(self, user, candidates, metadata)[0]

    # --- generation ---------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        user: str | Sequence[str | None] | None = None,
        metadata: Metadata | Sequence[Metadata | None] | None = None,
        decoder: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        do_sample: bool = True,
        num_return_sequences: int = 1,
        seed: int | None = None,
        weights: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
        stream: bool = False,
        return_details: bool = False,
    ) -> Any:
        """Writes responses.

        `sample` draws one expert from the weights for the whole response; `mixture` mixes the experts token by token
        with Bayes-updated weights. Both draw from exactly sum_k w_k pi_k, at any setting. `top` is the heaviest expert,
        `product` each token's normalised geometric mean. All four serve any experts; the default is the policy itself.

        Args:
            prompt: text, a list of messages, or a list of either.
            user: whose weights; one name, or one for each prompt.
            metadata: what the gate reads of user and context, likewise.
            decoder: `sample`, `mixture`, `top` or `product`; None is `product` for log-linear policies, else `sample`.
            max_new_tokens: longest response, tokens; less where the model's context ends.
            temperature: of every expert; 0 is greedy.
            top_p: nucleus of every expert.
            top_k: most probable tokens of every expert; 0 keeps all.
            repetition_penalty: of every expert.
            do_sample: false is greedy, whatever the temperature.
            num_return_sequences: responses for each prompt.
            seed: equal calls with equal seeds give equal responses.
            weights: K weights to use instead of the user's, or K for each prompt.
            stream: return an iterator over pieces of text; one prompt, one response.
            return_details: give `Response`s instead of strings.

        Returns:
            A string for one prompt; a list, prompt after prompt, for several prompts or responses; an iterator of
            strings with `stream`.
        """
        single, prompts = is_single_prompt(prompt), prompt_list(prompt)
        if stream and (not single or num_return_sequences != 1 or return_details):
            raise ValueError("stream=True: give one prompt, num_return_sequences=1 and return_details=False")
        decoder = self.decoder if decoder is None else decoder
        if decoder not in DECODERS:
            raise ValueError(f"decoder={decoder!r}: choose one of {', '.join(DECODERS)}")
        self._row_form.check_prompts(prompts, self.tokenizer)
        token_ids = [prompt_token_ids(entry, self.tokenizer) for entry in prompts]
        room = self.tokenizer.model_max_length - max(len(ids) for ids in token_ids)
        temperature = temperature if do_sample else 0.0
        options = SamplingOptions(min(max_new_tokens, room), temperature, top_k, top_p, repetition_penalty)
        rows = users_and_metadata(user, metadata, len(prompts))
        if weights is None:
            log_weights = self._user_weights().posterior(token_ids, *rows)
        else:
            log_weights = given_weights(weights, self.config.num_experts, len(prompts))
        token_ids = [ids for ids in token_ids for _ in range(num_return_sequences)]
        start = log_weights.repeat_interleave(num_return_sequences, 0)
        call = response_call(self.model.experts, self.tokenizer, token_ids, start, decoder, seed)
        # A message's content stands alone: the space that a template may put before it is the template's.
        texts = [isinstance(entry, str) for entry in prompts for _ in range(num_return_sequences)]
        call["text_before"] = [ids if text else [] for text, ids in zip(texts, token_ids, strict=True)]
        if stream:
            return stream_response(options=options, **call)
        responses = write_responses(options=options, **call)
        results = responses if return_details else [response.text for response in responses]
        return results[0] if single and num_return_sequences == 1 else results

    # --- parts --------------------------------------------------------------------------------------------------------
    def _user_weights(self) -> UserWeights:
        latent, default = self.config.latent, self.config.default_weights
        return UserWeights(self.model, latent, self.users, self.metadata_encoder, default)

    def _truncation(self) -> dict[str, Any]:
        return {"max_length": self.config.max_length, "truncation_mode": self.config.truncation_mode}

    def _prompts(self, prompt: Prompt | None) -> list[list[int]] | None:
        return None if prompt is None else [prompt_token_ids(prompt, self.tokenizer)]

    def _preference_scores(self, table: ComparisonTable, judges: Sequence[int]) -> PreferenceScores:
        log_probs = text_log_probs(self.model.experts, table.texts)
        return preference_scores(log_probs, table, self.config, self.users.rates(judges, self.config.label_noise))
