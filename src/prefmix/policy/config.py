"""What a policy folder says about itself: `mixture_config.json`. Nothing here imports torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from prefmix.mixture.likelihoods.model import FeedbackModel

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PolicyConfig:
    """Everything but tensors that a `MixturePolicy` is made of; JSON on disk.

    Attributes:
        beta: K values, the beta_k of the implicit reward r_k = beta_k (log pi_k - log pi_ref).
        latent: what carries one expert, a comparison (`pair`) or a user (`user`), or users who blend (`membership`).
        base_source: hub name or folder of the base model; `./base` where the policy folder holds a copy.
        base_sha256: hash of the base model's content; another base is refused.
        label_noise: e in p = (1-e) sigmoid(m) + e sigmoid(-m); where rates are learnt for each annotator (`UserState`),
            that of somebody unknown, their mean.
        label_noise_update: whether training learnt e, for everybody (`global`) or for each annotator, where `adapt`
            learns that of a new user too; policies older than this field have `fixed`.
        label_noise_prior: Beta(a, b) under which it was learnt; null where it was not.
        feedback: what else the loss was (`FeedbackModel.to_dict`); empty: Bradley-Terry, mixed.
        base_revision: revision on the hub, null for its main branch.
        base_gguf_file: file within `base_source`, where that is a GGUF repository.
        quantization: "8bit" or "4bit" where bitsandbytes holds the base's linear layers; null: whole weights.
        dtype: type that the base model runs in, as torch names it (`float32`); null: its own.
        max_length: longest prompt plus completion at training, tokens; longer texts are cut in the same way.
        truncation_mode: which end of a long text stays.
        experts: `AbstractExperts.describe()`: kind, number, head and rank, from which untrained experts are rebuilt.
            `MixturePolicy` fills it in.
        gate: `Gate.describe()`: terms and sizes, from which an untrained gate is rebuilt; filled in likewise.
        unknown_users: weights of somebody about whom nothing is known, `{"objective": name, "weights": K numbers}`
            (`MixturePolicy.set_unknown_users`); empty: the gate's.
        row_form: how training rows were written: `conversational` (messages, in the chat template), `standard` (plain
            text) or `tokenized`; null: unknown, in policies older than this field.
        provenance: data hash, seed, versions, hardware: JSON values for the reader, never read by the code.
        format_version: of the folder's layout.
    """

    beta: tuple[float, ...]
    latent: Literal["pair", "user", "membership"]
    base_source: str
    base_sha256: str
    label_noise: float = 0.0
    base_revision: str | None = None
    base_gguf_file: str | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    dtype: str | None = "float32"
    max_length: int | None = 1024
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    experts: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    feedback: Mapping[str, Any] = field(default_factory=dict)
    unknown_users: Mapping[str, Any] = field(default_factory=dict)
    label_noise_update: Literal["fixed", "global", "per_annotator"] = "fixed"
    label_noise_prior: tuple[float, float] | None = None
    row_form: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", tuple(float(beta) for beta in self.beta))
        if self.latent not in ("pair", "user", "membership"):
            raise ValueError(
                f"latent={self.latent!r}: a trained policy has 'pair', 'user' or 'membership' ('auto' is for training)"
            )
        if not all(beta > 0 for beta in self.beta) or not self.beta:
            raise ValueError(f"beta={list(self.beta)}: give one positive number for each expert")
        if not 0 <= self.label_noise < 0.5:
            raise ValueError(f"label_noise={self.label_noise}: must be at least 0 and below 0.5")
        self._check_learnt_noise()
        weights = self.default_weights
        if weights is not None and (len(weights) != self.num_experts or min(weights) < 0 or not sum(weights) > 0):
            raise ValueError(
                f"unknown_users.weights={weights}: give {self.num_experts} numbers, none negative, not all zero"
            )
        FeedbackModel.from_dict(self.feedback, self.label_noise)

    def _check_learnt_noise(self) -> None:
        update, prior = self.label_noise_update, tuple(float(count) for count in self.label_noise_prior or ())
        if update not in ("fixed", "global", "per_annotator"):
            raise ValueError(f"label_noise_update={update!r}: one of fixed, global, per_annotator")
        if (update == "fixed") != (self.label_noise_prior is None):
            raise ValueError(
                f"label_noise_update={update!r} with label_noise_prior={self.label_noise_prior}: a learnt "
                "rate has a prior, such as [1.2, 2.8], and a fixed one has none"
            )
        if prior and not (len(prior) == 2 and all(1.0 <= count < math.inf for count in prior)):
            raise ValueError(f"label_noise_prior={list(prior)}: two numbers, each at least 1, such as [1.2, 2.8]")
        object.__setattr__(self, "label_noise_prior", prior or None)

    @property
    def feedback_model(self) -> FeedbackModel:
        """How rows become log-likelihoods."""
        return FeedbackModel.from_dict(self.feedback, self.label_noise)

    @property
    def default_weights(self) -> list[float] | None:
        """K weights of somebody about whom nothing is known; None: the gate's."""
        return list(self.unknown_users["weights"]) if self.unknown_users else None

    @property
    def num_experts(self) -> int:
        """K."""
        return len(self.beta)

    def to_json(self) -> str:
        """The text of `mixture_config.json`."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PolicyConfig:
        """Reads `to_json`'s text.

        Raises:
            ValueError: not JSON, a newer format, or missing and unknown fields.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"mixture_config.json is not JSON ({error}); restore the policy folder") from error
        if not isinstance(values, dict):
            raise ValueError("mixture_config.json does not hold a JSON object; restore the policy folder")
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"mixture_config.json: format_version={version!r}, this prefmix reads {FORMAT_VERSION}; "
                "use the prefmix release that wrote it, or train again"
            )
        known = {entry.name for entry in fields(cls)}
        required = {"experts", "gate", "beta", "latent", "base_source", "base_sha256"}
        if values.keys() - known or required - values.keys():
            raise ValueError(
                f"mixture_config.json: unknown fields {sorted(values.keys() - known)}, "
                f"missing fields {sorted(required - values.keys())}; use the prefmix release that wrote it"
            )
        return cls(**values)
