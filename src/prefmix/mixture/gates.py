"""The gate: prior weights of the experts from the population, the prompt, the user and metadata.

    log w(x, u) = log_softmax( global + prompt(x) + user[u] + metadata(x, u) )

Terms are summed in logit space and every term starts at zero, so the gate starts uniform. With `global` alone this is
Mix-DPO; with any other term it is MoE-DPO (arXiv 2510.08256). Legend: B rows, K experts, U users, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from prefmix.mixture.gate_terms import GATE_TERMS, build_term
from prefmix.mixture.membership import Combination
from prefmix.mixture.membership_network import MembershipNetwork
from prefmix.mixture.precision import at_least_float32
from prefmix.mixture.priors import check_alpha, dirichlet_log_density, map_log_weights

TERMS = ("global", "prompt", "user", "metadata")
UPDATES = ("closed_form", "gradient", "fixed")


class GateInputs(NamedTuple):
    """What the gate may look at.

    Attributes:
        user: [B] index into the known users; -1 for an unknown user, who gets the population's weights.
        prompt_states: [B, D] pooled trunk states of the prompts, or None where no `prompt` term exists.
        metadata: [B, M] encoded metadata, or None where no `metadata` term exists.
    """

    user: Int[Tensor, "B"]
    prompt_states: Float[Tensor, "B D"] | None = None
    metadata: Float[Tensor, "B M"] | None = None


class Gate(nn.Module):
    """Log weights of K experts as a sum of terms in logit space.

    `Gate(**gate.describe())` builds an equal, untrained gate. A purely global gate with update "closed_form" or
    "fixed" holds its weights as a buffer: EM's M-step sets them, or nothing does. In every other case `global` is a
    parameter and learns by gradient, as the other terms do.
    """

    global_log_weights: Tensor
    no_global: Tensor
    prompt_mean: Tensor
    prompt_scale: Tensor
    membership: MembershipNetwork | None

    def __init__(
        self,
        num_experts: int,
        terms: Sequence[str],
        *,
        num_users: int = 0,
        prompt_dim: int = 0,
        metadata_dim: int = 0,
        update: str = "closed_form",
        alpha: float = 1.0,
        user_strength: float | None = None,
        membership_dim: int = 0,
        membership_encoder: int = 0,
        membership_combine: Combination = "mixture",
        membership_noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Builds a uniform gate.

        Args:
            num_experts: K.
            terms: some of "global", "prompt", "user", "metadata", and names of `GATE_TERMS`.
            num_users: U, rows of the `user` table.
            prompt_dim: D, size of the pooled prompt states.
            metadata_dim: M, number of encoded metadata features.
            update: how a purely global gate moves: "closed_form", "gradient" or "fixed".
            alpha: Dirichlet concentration of the global weights, at least 1 (flat).
            user_strength: c, pseudo-comparisons that pull a user's weights to the global ones, in total. None means K,
                one for each expert: enough that a user with two comparisons does not become one-hot.
            membership_dim: d of `latent="membership"`, whose loading lives here; 0 under the other latents.
            membership_encoder: hidden units of its encoder of users; 0: none.
            membership_combine: how a blend judges, `mixture` or `log_linear`.
            membership_noise: e of rows that `log_linear` blends judge.
            seed: of the loading.

        Raises:
            ValueError: an unknown or repeated term, an unknown update, alpha < 1, or a missing size.
        """
        super().__init__()
        sizes = {"prompt_dim": prompt_dim, "metadata_dim": metadata_dim}
        _check_terms(terms, update, alpha, sizes)
        self.num_experts = num_experts
        self.terms = tuple(terms)
        self.update = update
        self.alpha = alpha
        self.user_strength = float(num_experts) if user_strength is None else user_strength
        self._global_term()
        if "prompt" in terms:
            self.prompt = _zero_linear(prompt_dim, num_experts)
        if "prompt" in self.reads:
            self.register_buffer("prompt_mean", torch.zeros(prompt_dim))
            self.register_buffer("prompt_scale", torch.ones(prompt_dim))
        if "user" in terms:
            self.user = nn.Parameter(torch.zeros(num_users, num_experts))
        if "metadata" in terms:
            self.metadata = _zero_linear(metadata_dim, num_experts)
        self.metadata_dim = metadata_dim
        self.further = nn.ModuleDict(
            {name: build_term(name, sizes[f"{GATE_TERMS[name].reads}_dim"], num_experts)
             for name in terms if name in GATE_TERMS}
        )  # fmt: skip
        blend = (membership_dim, membership_encoder, seed, membership_combine, membership_noise)
        self.membership = MembershipNetwork(num_experts, *blend) if membership_dim else None

    @property
    def reads(self) -> set[str]:
        """Which features its terms need: "prompt", "metadata"."""
        return features_of(self.terms)

    @property
    def is_global(self) -> bool:
        """Whether the weights are the same for every row."""
        return self.terms == ("global",)

    @property
    def is_closed_form(self) -> bool:
        """Whether EM's closed form sets the weights (`closed_form_update`)."""
        return self.is_global and self.update == "closed_form"

    def forward(self, inputs: GateInputs) -> Float[Tensor, "B K"]:
        """Normalised log weights, at least float32 whatever the surrounding precision.

        Args:
            inputs: GateInputs of B rows.

        Returns:
            [B, K] log w_k(x, u); rows sum to 1 in probability.
        """
        with torch.autocast(inputs.user.device.type, enabled=False):
            logits = self._global_logits().expand(len(inputs.user), -1)
            if "prompt" in self.terms:
                assert inputs.prompt_states is not None, "the gate has a prompt term, but no prompt states were given"
                logits = logits + _linear(self.prompt, self._standardised(inputs.prompt_states))
            if "user" in self.terms:
                logits = logits + self.user_offsets(inputs.user)
            if "metadata" in self.terms:
                assert inputs.metadata is not None, "the gate has a metadata term, but no metadata were given"
                logits = logits + _linear(self.metadata, at_least_float32(inputs.metadata))
            for name, term in self.further.items():
                logits = logits + at_least_float32(term(self._features(name, inputs)))
            return torch.log_softmax(logits, dim=-1)

    def population_log_weights(self) -> Float[Tensor, "K"]:
        """Log weights of the `global` term alone: the centre of the users' prior."""
        return torch.log_softmax(self._global_logits(), dim=-1)

    @torch.no_grad()
    def closed_form_update(self, mean_resp: Float[Tensor, "K"], num_groups: float) -> None:
        """EM's M-step of a global gate: w_k = (G mean_k + alpha - 1) / (G + K (alpha - 1)).

        With alpha = 1 it is the mean responsibility. It maximises sum_g E_q log w + log Dirichlet(w | alpha).

        Args:
            mean_resp: [K] mean of q over *all* groups of the training set (under `latent="pair"`, weighted by row).
            num_groups: G, or the summed row weight under `latent="pair"`.
        """
        assert self.is_closed_form, f"gate {self.terms} with update={self.update!r} has no closed form"
        counts = at_least_float32(mean_resp) * num_groups
        self.global_log_weights.copy_(map_log_weights(counts, torch.full_like(counts, self.alpha)))

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of the gate's weights, counted once for the whole training set, nats.

            log Dirichlet(w_global | alpha) + sum_u log Dirichlet(softmax(global + user[u]) | 1 + c w_global)
            + log N(A | 0, 9) under `latent="membership"`

        EM's objective is sum_i ELBO_i + log_prior. The loss is a mean over row weights, so a step subtracts
        `log_prior() / total_weight`, with total_weight the summed row weight of the whole training set: then the mean
        of the losses over an epoch is -(ELBO + log prior) / total_weight.
        """
        population = self.population_log_weights()
        total = population.new_zeros(())
        if "global" in self.terms:
            total = total + dirichlet_log_density(population, torch.full_like(population, self.alpha))
        if "user" in self.terms:
            rows = torch.log_softmax(self._global_logits() + at_least_float32(self.user), dim=-1)
            total = total + dirichlet_log_density(rows, self.user_concentration()).sum()
        return total if self.membership is None else total + self.membership.log_prior()

    def user_concentration(self) -> Float[Tensor, "K"]:
        """Dirichlet concentration of a user's weights, 1 + c w_global: its mode is the global weights."""
        return 1.0 + self.user_strength * self.population_log_weights().exp()

    def user_offsets(self, user: Int[Tensor, "B"]) -> Float[Tensor, "B K"]:
        """Logit offsets of users; zero for -1 (unknown)."""
        if len(self.user) == 0:
            return self._global_logits().new_zeros(len(user), self.num_experts)
        # A product with a mask would turn the -inf of a user with a zero weight into NaN for unknown users.
        known = (user >= 0).unsqueeze(1)
        return torch.where(known, at_least_float32(self.user)[user.clamp(min=0)], 0.0)

    @torch.no_grad()
    def add_users(self, num_new: int) -> Int[Tensor, "M"]:
        """Appends users with zero offsets; returns their indices. An optimizer must be built after this."""
        assert "user" in self.terms
        first = len(self.user)
        self.user = nn.Parameter(torch.cat([self.user, self.user.new_zeros(num_new, self.num_experts)]))
        return torch.arange(first, first + num_new)

    @torch.no_grad()
    def remove_user(self, user: int) -> None:
        """Takes a user's row out; later users move up by one. An optimizer must be built after this."""
        assert "user" in self.terms
        self.user = nn.Parameter(torch.cat([self.user[:user], self.user[user + 1 :]]))

    @torch.no_grad()
    def set_user_log_weights(self, user: int, log_weights: Float[Tensor, "K"]) -> None:
        """Stores the offsets that give `user` these weights where no other term speaks (adaptation by MAP)."""
        assert "user" in self.terms
        self.user[user] = (log_weights - self.population_log_weights()).to(self.user.dtype)

    @torch.no_grad()
    def set_metadata(self, weight: Float[Tensor, "K M"], bias: Float[Tensor, "K"]) -> None:
        """Puts the `metadata` term at these coefficients."""
        assert "metadata" in self.terms
        self.metadata.weight.copy_(weight)
        self.metadata.bias.copy_(bias)

    @torch.no_grad()
    def fit_prompt_scale(self, prompt_states: Float[Tensor, "P D"]) -> None:
        """Sets mean and scale of the prompt term from the distinct training prompts; constant columns keep scale 1."""
        assert "prompt" in self.reads
        states = prompt_states.double()
        scale = states.std(dim=0, unbiased=False)
        self.prompt_mean.copy_(states.mean(dim=0))
        self.prompt_scale.copy_(torch.where(scale > 1e-6 * scale.max(), scale, torch.ones_like(scale)))

    def describe(self) -> dict[str, Any]:
        """JSON-ready keyword arguments of the constructor."""
        membership: dict[str, Any] = {}
        if self.membership is not None:
            encoder = self.membership.encoder
            membership = {
                "membership_dim": self.membership.dim,
                "membership_encoder": 0 if encoder is None else encoder.hidden,
            }
            if self.membership.combine == "log_linear":
                noise = self.membership.label_noise
                membership |= {"membership_combine": "log_linear", "membership_noise": noise}
        return membership | {
            "num_experts": self.num_experts,
            "terms": list(self.terms),
            "num_users": len(self.user) if "user" in self.terms else 0,
            "prompt_dim": len(self.prompt_mean) if "prompt" in self.reads else 0,
            "metadata_dim": self.metadata_dim if "metadata" in self.reads else 0,
            "update": self.update,
            "alpha": self.alpha,
            "user_strength": self.user_strength,
        }

    def _global_term(self) -> None:
        if self.is_global and self.update != "gradient":
            uniform = torch.full((self.num_experts,), -math.log(self.num_experts))
            self.register_buffer("global_log_weights", uniform)
        elif "global" in self.terms:
            self.global_logits = nn.Parameter(torch.zeros(self.num_experts))
        else:
            # Not saved: the anchor that carries device and type when no term is global.
            self.register_buffer("no_global", torch.zeros(self.num_experts), persistent=False)

    def _global_logits(self) -> Float[Tensor, "K"]:
        for name in ("global_log_weights", "global_logits", "no_global"):
            if name in self._buffers or name in self._parameters:
                return at_least_float32(getattr(self, name))
        raise AssertionError("a gate always has one of its three global tensors")

    def _features(self, name: str, inputs: GateInputs) -> Float[Tensor, "B D"]:
        """What a further term gets."""
        if GATE_TERMS[name].reads == "metadata":
            assert inputs.metadata is not None, "a gate term reads metadata, but none were given"
            return at_least_float32(inputs.metadata)
        assert inputs.prompt_states is not None, "a gate term reads prompts, but no prompt states were given"
        return self._standardised(inputs.prompt_states)

    def _standardised(self, prompt_states: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Zero mean, and unit *length* on average, so that one learning rate suits every trunk size."""
        scale = at_least_float32(self.prompt_scale) * math.sqrt(self.prompt_scale.numel())
        return (at_least_float32(prompt_states) - at_least_float32(self.prompt_mean)) / scale


def features_of(terms: Sequence[str]) -> set[str]:
    """Which features gate terms need: "prompt", "metadata"."""
    return {term for term in terms if term in ("prompt", "metadata")} | {
        GATE_TERMS[term].reads for term in terms if term in GATE_TERMS
    }


def _check_terms(terms: Sequence[str], update: str, alpha: float, sizes: dict[str, int]) -> None:
    known = [*TERMS, *GATE_TERMS]
    if not terms or len(set(terms)) != len(terms) or not set(terms) <= set(known):
        raise ValueError(
            f"gate is {list(terms)}, but it must name some of {known}, each once; a term of your own must be "
            "registered before a policy that uses it is loaded."
        )
    if update not in UPDATES:
        raise ValueError(f"gate_update is {update!r}; choose one of {list(UPDATES)}.")
    check_alpha(alpha)
    for term in features_of(terms):
        if sizes[f"{term}_dim"] < 1:
            raise ValueError(
                f"the gate has a {term} term, but {term}_dim is {sizes[f'{term}_dim']}: give its features."
            )


def _zero_linear(in_features: int, num_experts: int) -> nn.Linear:
    layer = nn.Linear(in_features, num_experts)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _linear(layer: nn.Linear, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
    weight = at_least_float32(layer.weight)
    return linear(x.to(weight.dtype), weight, at_least_float32(layer.bias))
