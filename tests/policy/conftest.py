"""Tiny experts that visibly differ, and policies made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from prefmix.experts.shared_base import SharedBaseExperts
    from prefmix.policy.mixture_policy import MixturePolicy


@pytest.fixture(scope="session")
def make_experts() -> Callable[..., SharedBaseExperts]:
    """Experts with random heads, large enough that their next-token distributions visibly differ."""

    def build(
        model: LlamaForCausalLM, num_experts: int = 4, head: str = "hidden", rank: int = 4, scale: float = 1.0
    ) -> SharedBaseExperts:
        import torch

        from prefmix.experts.shared_base import SharedBaseExperts

        generator = torch.Generator().manual_seed(7)
        experts = SharedBaseExperts(model, num_experts, head=head, rank=rank, generator=generator)
        with torch.no_grad():
            for name, parameter in experts.head.named_parameters():
                if name != "down":
                    # The logit head has no W between: its corrections are smaller at equal numbers.
                    step = scale * (0.6 if head == "hidden" else 1.0)
                    parameter.add_(step * torch.randn(parameter.shape, generator=generator))
        return experts

    return build


@pytest.fixture
def make_policy(
    make_tiny_model: Callable[..., LlamaForCausalLM],
    make_experts: Callable[..., SharedBaseExperts],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Callable[..., MixturePolicy]:
    """A policy over a tiny base in memory: two known users under `latent="user"` unless asked otherwise."""

    def build(
        latent: str = "user",
        terms: Sequence[str] = ("global",),
        *,
        num_experts: int = 3,
        head: str = "hidden",
        users: Sequence[str] = ("anna", "bob"),
        tokenizer: PreTrainedTokenizerFast = tiny_tokenizer,
        base_source: str = "",
        base_sha256: str = "0" * 64,
        label_noise: float = 0.0,
        scale: float = 1.0,
        model: LlamaForCausalLM | None = None,
    ) -> MixturePolicy:
        import torch

        from prefmix.data.users import MetadataEncoder
        from prefmix.mixture.gates import Gate
        from prefmix.policy.config import PolicyConfig
        from prefmix.policy.mixture_model import MixtureModel
        from prefmix.policy.mixture_policy import MixturePolicy
        from prefmix.policy.user_state import UserState

        encoder = MetadataEncoder.fit([{"user_age": 20}, {"user_age": 40}]) if "metadata" in terms else None
        gate = Gate(
            num_experts,
            terms,
            num_users=len(users) if "user" in terms else 0,
            prompt_dim=32 if "prompt" in terms else 0,
            metadata_dim=0 if encoder is None else len(encoder),
            update="closed_form" if tuple(terms) == ("global",) else "gradient",
        )
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            if gate.is_closed_form:
                gate.closed_form_update(torch.arange(1.0, num_experts + 1) / sum(range(1, num_experts + 1)), 10)
        experts = make_experts(model or make_tiny_model(), num_experts, head, scale=scale)
        config = PolicyConfig(
            beta=(0.1,) * num_experts,
            latent=latent,
            base_source=base_source,
            base_sha256=base_sha256,
            label_noise=label_noise,
            max_length=128,
            provenance={"data_sha256": "abc", "seed": 0},
        )
        state = UserState(
            list(users), torch.randn(len(users), num_experts, generator=generator), torch.ones(len(users))
        )
        return MixturePolicy(MixtureModel(experts, gate), tokenizer, config, state, encoder)

    return build
