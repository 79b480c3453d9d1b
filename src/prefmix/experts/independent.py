"""K experts that are whole models, of any size, over one tokenizer; only log-probabilities pass between them.

Legend: N texts, L padded length, B sequences, K experts, V vocabulary, M kept sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefmix.experts.base_model import BaseModel
from prefmix.experts.flat_attention import recompute_contexts
from prefmix.experts.head_decoder import HeadDecoder
from prefmix.experts.interface import (
    AbstractExpertDecoder,
    AbstractExperts,
    ExpertLogProbs,
    PackedStates,
    PaddedTexts,
)
from prefmix.experts.text_reader import TextReader
from prefmix.experts.whole_model import check_whole_model, next_token_logits, text_log_probs_of


class IndependentExperts(AbstractExperts):
    """K whole models and the frozen references that they are measured against.

        log pi_k(y | x) from model k, log pi_ref(k)(y | x) from the base or a frozen copy of model k's start

    A reference is computed once, however many experts have it. With `devices` every expert lives where it was put, with
    its own reference; token ids go there and [N] log-probabilities come back.

    Attributes:
        models: the K models that train.
        base_model: a frozen model: what the gate and the probe read, and the reference of experts without their own.
        num_experts: K.
        references: K entries: the frozen start of expert k, or None where the base is its reference.
        devices: K devices, or None where all follow the module (`.to`).
        autocast: type of the products in a forward pass, policy and reference alike; None: the weights' own.
    """

    keeps_activations = True

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        base_model: PreTrainedModel,
        references: Sequence[BaseModel | None] | None = None,
        *,
        devices: Sequence[str | torch.device] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Takes the models as they are; they must be distinct objects.

        Args:
            models: K causal language models over the base's tokenizer.
            base_model: frozen in place.
            references: None: the base for all (`reference="shared"`); else K entries (`reference="per_expert"`).
            devices: K devices.
            autocast: for example torch.bfloat16.

        Raises:
            ValueError: another vocabulary, the wrong number of references or devices, or a model without a plain head.
        """
        super().__init__()
        self.num_experts = len(models)
        self.references = tuple(references) if references is not None else (None,) * len(models)
        self.devices = None if devices is None else tuple(torch.device(device) for device in devices)
        self.autocast = autocast
        _check(models, base_model, self.references, self.devices)
        self.base_model = base_model.requires_grad_(False).eval()
        self.models = nn.ModuleList(models)
        self._reference_index = _distinct(self.references)
        own = {index: entry for index, entry in zip(self._reference_index, self.references) if entry is not None}
        self._own_references = nn.ModuleList(own[index].model.requires_grad_(False).eval() for index in sorted(own))
        if self.devices is not None:
            self._place(self.devices)
        self._readers = [TextReader(model) for model in self.expert_models]
        self._reference_readers = {index: TextReader(self._reference(index)) for index in set(self._reference_index)}

    @property
    def expert_models(self) -> list[PreTrainedModel]:
        """The K models, as what they are."""
        return cast(list[PreTrainedModel], list(self.models))

    def train(self, mode: bool = True) -> IndependentExperts:
        """Training mode for the experts alone: dropout would make a reference random."""
        super().train(mode)
        self.base_model.eval()
        self._own_references.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IndependentExperts:
        """Placed experts stay where they are when the module around them moves."""
        return self if self.devices is not None else super()._apply(fn, recurse)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recomputes the experts' blocks in the backward pass instead of keeping their activations."""
        given = options.get("activation_checkpointing_kwargs") or {}
        if given.get("use_reentrant"):
            self.prefix_sharing = False  # that kind of checkpoint cannot be told how texts lie when it runs again
        else:
            given = given | {"use_reentrant": False, "context_fn": recompute_contexts}
        for model in self.expert_models:
            cast(Any, model).gradient_checkpointing_enable(given)

    def freeze_experts(self, experts: Sequence[int]) -> None:
        """These models get no gradient and no backward pass."""
        for expert in experts:
            self.models[expert].requires_grad_(False)

    def forward(
        self, texts: PackedStates | PaddedTexts, ref_log_probs: Float[Tensor, "N K"] | None = None
    ) -> ExpertLogProbs:
        """Log-probabilities of every text under every expert and its reference, float32, in nats.

        Args:
            texts: right-padded token ids; whole models have no trunk in common whose states could be cached.
            ref_log_probs: [N, K] of these texts, where they are known: the references are not run.
        """
        assert isinstance(texts, PaddedTexts), "independent experts read token ids (cache_states=off)"
        experts = zip(self.expert_models, self._readers, strict=True)
        log_probs = [self._log_probs(model, reader, texts) for model, reader in experts]
        if ref_log_probs is None:
            ref_log_probs = self.reference_log_probs(texts)
        return ExpertLogProbs(torch.stack(log_probs, dim=1), ref_log_probs)

    @torch.no_grad()
    def reference_log_probs(self, texts: PackedStates | PaddedTexts) -> Float[Tensor, "N K"]:
        """Every distinct reference reads the texts once."""
        assert isinstance(texts, PaddedTexts), "independent experts read token ids (cache_states=off)"
        distinct = {
            index: self._log_probs(self._reference(index), reader, texts)
            for index, reader in self._reference_readers.items()
        }
        return torch.stack([distinct[index] for index in self._reference_index], dim=1)

    def for_learners(self, texts: PackedStates | PaddedTexts, learners: Bool[Tensor, "N K"]) -> ExpertLogProbs:
        """Every model reads only the texts that it learns from; 0 stands for all others and for the references."""
        assert isinstance(texts, PaddedTexts), "independent experts read token ids (cache_states=off)"
        log_probs = [self._some_log_probs(k, texts, learners[:, k]) for k in range(self.num_experts)]
        stacked = torch.stack(log_probs, dim=1)
        return ExpertLogProbs(stacked, torch.zeros_like(stacked))

    def decoder(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"], experts: list[int] | None = None
    ) -> StackedDecoder:
        """Starts decoding after left-padded prompts: one pass and one KV cache for each expert."""
        chosen = list(range(self.num_experts)) if experts is None else list(experts)
        assert all(0 <= k < self.num_experts for k in chosen), chosen
        return StackedDecoder([self.expert_models[k] for k in chosen], input_ids, attention_mask)

    def expert_state(self, expert: int) -> dict[str, Tensor]:
        """All weights of one model, tied ones once."""
        return {name: value.detach().clone() for name, value in _weights(self.expert_models[expert]).items()}

    @torch.no_grad()
    def load_expert_state(self, expert: int, state: dict[str, Tensor]) -> None:
        """Takes what `expert_state` gave.

        Raises:
            ValueError: other names or shapes, so the state belongs to another architecture.
        """
        own = _weights(self.expert_models[expert])
        wrong = [name for name in own.keys() | state.keys() if name not in own or name not in state]
        wrong = wrong or [name for name in own if own[name].shape != state[name].shape]
        if wrong:
            raise ValueError(
                f"expert {expert}: {len(wrong)} tensors are missing, superfluous or of another shape (first: "
                f"{sorted(wrong)[0]}); load weights of the same architecture, {type(self.models[expert]).__name__}"
            )
        for name, value in state.items():
            own[name].copy_(value)

    def describe(self) -> dict[str, Any]:
        """JSON description; models and references themselves are folders beside it."""
        return {
            "kind": "independent",
            "num_experts": self.num_experts,
            "architectures": [type(model).__name__ for model in self.models],
            "references": [
                None if entry is None else {"source": entry.source, "sha256": entry.sha256} for entry in self.references
            ],
        }

    def _reference(self, index: int) -> PreTrainedModel:
        return self.base_model if index < 0 else cast(PreTrainedModel, self._own_references[index])

    def _log_probs(self, model: PreTrainedModel, reader: TextReader, texts: PaddedTexts) -> Float[Tensor, "N"]:
        home, device = texts.input_ids.device, model.get_output_embeddings().weight.device
        there = PaddedTexts(*(field.to(device) for field in texts))
        reading = reader.read(there, self.prefix_sharing)
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return text_log_probs_of(model, reading).to(home)

    def _some_log_probs(self, expert: int, texts: PaddedTexts, chosen: Bool[Tensor, "N"]) -> Float[Tensor, "N"]:
        column = torch.zeros(len(chosen), device=chosen.device)
        if not chosen.any():
            return column
        some = PaddedTexts(*(field[chosen] for field in texts))
        found = self._log_probs(self.expert_models[expert], self._readers[expert], some)
        return column.index_put((chosen.nonzero()[:, 0],), found)

    def _place(self, devices: Sequence[torch.device]) -> None:
        cast(nn.Module, self.base_model).to(devices[0])
        for model, device, index in zip(self.expert_models, devices, self._reference_index, strict=True):
            cast(nn.Module, model).to(device)
            if index >= 0:
                cast(nn.Module, self._reference(index)).to(device)


class StackedDecoder(AbstractExpertDecoder):
    """K models with a KV cache each, reading the same tokens."""

    def __init__(
        self, models: Sequence[PreTrainedModel], input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]
    ) -> None:
        """Reads left-padded prompts (the last column holds a token of every prompt)."""
        self._home = input_ids.device
        self._devices = [model.get_output_embeddings().weight.device for model in models]
        self._decoders = [
            HeadDecoder(model, _logits_of(model), input_ids.to(device), attention_mask.to(device))
            for model, device in zip(models, self._devices, strict=True)
        ]

    def logits(self) -> Float[Tensor, "B K V"]:
        """Float32 next-token logits of every expert after the tokens read so far."""
        return torch.cat([decoder.logits().to(self._home) for decoder in self._decoders], dim=1)

    def append(self, tokens: Int[Tensor, "B"]) -> None:
        """Reads one more token of every sequence."""
        for decoder, device in zip(self._decoders, self._devices, strict=True):
            decoder.append(tokens.to(device))

    def select(self, index: Int[Tensor, "M"]) -> None:
        """Keeps the sequences `index`, in that order."""
        for decoder, device in zip(self._decoders, self._devices, strict=True):
            decoder.select(index.to(device))


def _logits_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    return lambda hidden: next_token_logits(model, hidden)[:, None]


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and stored buffers, tied ones under their first name."""
    stored = model.state_dict(keep_vars=True).keys()
    buffers = {name: value for name, value in model.named_buffers() if name in stored}
    return dict(model.named_parameters()) | buffers


def _distinct(references: Sequence[BaseModel | None]) -> list[int]:
    """-1 for the base, else a running number; equal content counts once."""
    numbers: dict[str, int] = {}
    return [-1 if entry is None else numbers.setdefault(entry.sha256, len(numbers)) for entry in references]


def _check(
    models: Sequence[PreTrainedModel],
    base_model: PreTrainedModel,
    references: Sequence[BaseModel | None],
    devices: Sequence[torch.device] | None,
) -> None:
    if not models or len(references) != len(models) or (devices is not None and len(devices) != len(models)):
        raise ValueError(
            f"{len(models)} expert models, {len(references)} references, "
            f"{'no' if devices is None else len(devices)} devices; give one each"
        )
    frozen = [base_model, *(entry.model for entry in references if entry is not None)]
    assert len({id(model) for model in models}) == len(models), "every expert is a model of its own"
    assert not {id(model) for model in models} & {id(model) for model in frozen}, "a reference must not train"
    vocab = base_model.get_output_embeddings().weight.shape[0]
    for expert, model in enumerate(models):
        size = model.get_output_embeddings().weight.shape[0]
        if size != vocab:
            raise ValueError(
                f"expert {expert} ({model.config.name_or_path or type(model).__name__}): vocabulary of {size} tokens, "
                f"the base has {vocab}; all experts must share one tokenizer"
            )
    for model in [*models, *frozen]:
        check_whole_model(model)
