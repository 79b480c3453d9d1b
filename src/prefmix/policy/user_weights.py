"""Weights of the experts for given prompts, users and metadata, and how they learn from a user's comparisons.

Legend: B rows, n comparisons of one user, K experts, D trunk states, M metadata features.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.users import MetadataEncoder
from prefmix.mixture.gates import GateInputs
from prefmix.mixture.membership import GaussianQ, MembershipRows
from prefmix.mixture.posterior import posterior
from prefmix.mixture.user_noise import Responsibilities
from prefmix.policy.metadata_fields import check_metadata
from prefmix.policy.mixture_model import MixtureModel
from prefmix.policy.near_names import near_name
from prefmix.policy.personalization import map_user_offsets
from prefmix.policy.prompt_states import pooled_prompt_states
from prefmix.policy.user_state import UserState


def given_weights(
    weights: Sequence[float] | Sequence[Sequence[float]] | Tensor, num_experts: int, num_rows: int
) -> Float[Tensor, "B K"]:
    """[B, K] log of weights that somebody named, normalised: K for all rows, or K for each.

    Raises:
        ValueError: another number of them, a negative one, or all zero.
    """
    given = torch.as_tensor(weights, dtype=torch.float64).cpu()
    total = given.sum(dim=-1, keepdim=True)
    valid = given.shape in ((num_experts,), (num_rows, num_experts)) and bool((given >= 0).all())
    if not (valid and bool(((total > 0) & (total < torch.inf)).all())):
        each = f" (or {num_rows} rows of them, one for each prompt)" if given.dim() == 2 else ""
        raise ValueError(f"weights={given.tolist()}: give {num_experts} numbers{each}, none negative, not all zero")
    return (given / total).log().expand(num_rows, -1)


class UserWeights(NamedTuple):
    """The gate and what is known of users, together.

    Attributes:
        model: experts (for the prompt's trunk states) and gate.
        latent: `pair`, `user` or `membership`.
        users: known users; `learn` changes it.
        metadata_encoder: or None.
        default: K weights of somebody about whom nothing is known, in the place of the gate's; None: the gate's.
    """

    model: MixtureModel
    latent: str
    users: UserState
    metadata_encoder: MetadataEncoder | None
    default: Sequence[float] | None = None

    @property
    def has_user_term(self) -> bool:
        """Whether the gate has a free row of weights for each user."""
        return "user" in self.model.gate.terms

    def check_adaptable(self) -> None:
        """Raises ValueError where no weight depends on the user."""
        if self.latent == "pair" and not self.has_user_term:
            raise ValueError(
                f"adapt: under latent='pair' with gate={list(self.model.gate.terms)} nothing depends on the user; "
                "train with latent='user', or with latent='pair' and a gate that names 'user'"
            )

    @torch.no_grad()
    def gate(
        self,
        prompts: Sequence[Sequence[int]] | None,
        users: Sequence[str | None],
        metadata: Sequence[Mapping[str, Any] | None],
    ) -> Float[Tensor, "B K"]:
        """[B, K] log w of the gate alone, float64 on the CPU; under `membership` its mean over the prior of z.

        Args:
            prompts: B token sequences; None stands for the average training prompt.
            users: B names or None.
            metadata: B mappings or None (the average).
        """
        log_weights = self._gate(prompts, [self.users.index(user) for user in users], metadata)
        network = self.model.gate.membership
        return log_weights if network is None else network.predictive(log_weights, network.prior(len(users)))

    def gate_terms(
        self,
        prompts: Sequence[Sequence[int]] | None,
        metadata: Sequence[Mapping[str, Any] | None],
    ) -> Float[Tensor, "B K"]:
        """[B, K] log w of the gate's terms for somebody unknown, at z = 0 under `membership`."""
        with torch.no_grad():
            return self._gate(prompts, [-1] * len(metadata), metadata)

    def posterior(
        self,
        prompts: Sequence[Sequence[int]] | None,
        users: Sequence[str | None],
        metadata: Sequence[Mapping[str, Any] | None],
    ) -> Float[Tensor, "B K"]:
        """[B, K] log w that the policy uses: gate and evidence of known users; warns of unknown names.

        Where there are default weights, rows have them whose user has no comparisons and of whom no metadata tells the
        gate; a prompt says nothing of a user.
        """
        index = [self.users.index(user) for user in users]
        with torch.no_grad():
            log_weights = self._gate(prompts, index, metadata)
        self._warn_of_unknown(users)
        network = self.model.gate.membership
        if network is not None:
            log_weights = network.predictive(log_weights, self.users.q(index, network.dim))
        elif self.latent != "pair":
            log_weights = posterior(log_weights, self.users.evidence(index)).log_resp
        if self.default is None:
            return log_weights
        unknown = torch.tensor([self._is_unknown(i, told) for i, told in zip(index, metadata, strict=True)])
        return torch.where(unknown.unsqueeze(1), given_weights(self.default, len(log_weights[0]), 1), log_weights)

    def _is_unknown(self, index: int, metadata: Mapping[str, Any] | None) -> bool:
        """Whether neither comparisons nor metadata that the gate reads say anything of a user."""
        personal = self.latent != "pair" or self.has_user_term
        seen = personal and index >= 0 and float(self.users.count[index]) > 0
        return not seen and not (metadata and "metadata" in self.model.gate.reads)

    @torch.no_grad()
    def learn(
        self,
        user: str,
        prompts: Sequence[Sequence[int]],
        metadata: Sequence[Mapping[str, Any]],
        log_lik: Float[Tensor, "n K"],
        weight: Float[Tensor, "n"],
    ) -> None:
        """Adds the evidence of a user's comparisons.

        Args:
            user: new or known name.
            prompts: n token sequences, the comparisons' prompts.
            metadata: n mappings.
            log_lik: [n, K] log p_k of each comparison, nats.
            weight: [n] a_i.
        """
        self.check_adaptable()
        weight = weight.double()
        row = self.users.add(user)
        if self.latent != "pair":
            self.users.log_lik[row] += weight @ log_lik.double()
        if self.latent != "user":
            gate = self._gate(prompts, [-1] * len(prompts), metadata)
            if self.latent == "membership":
                self.users.set_q(row, self._membership(row, gate, log_lik, weight))
            else:
                self._set_offsets(row, self._offsets(row, gate, log_lik, weight))
        self.users.count[row] += weight.sum()

    def responsibilities(
        self,
        row: int,
        prompts: Sequence[Sequence[int]],
        metadata: Sequence[Mapping[str, Any]],
        weight: Float[Tensor, "n"],
    ) -> Responsibilities:
        """Who judged each of a user's comparisons, from their log p_ik, with what was known of the user before.

            latent="user":        q_k proportional to gate_k prod_{i of user} p_ik, the same for all rows
            latent="pair":        q_ik proportional to w_ik p_ik, w at the user's maximum a posteriori
            latent="membership":  q_ik = E_{q(z)} of w_ik(z) p_ik, normalised

        Args:
            row: of the user.
            prompts: n token sequences, the comparisons' prompts.
            metadata: n mappings.
            weight: [n] a_i.
        """
        gate, network = self._gate(prompts, [-1] * len(prompts), metadata), self.model.gate.membership

        def of_rows(log_lik: Float[Tensor, "n K"]) -> Float[Tensor, "n K"]:
            if network is not None:
                q = self._membership(row, gate, log_lik, weight)
                return network.responsibilities(gate, log_lik, q)
            if self.latent == "pair":
                own = torch.log_softmax(gate + self._offsets(row, gate, log_lik, weight), dim=-1)
                return posterior(own, log_lik).log_resp.exp()
            evidence = self.users.log_lik[row] + weight @ log_lik
            return posterior(gate, evidence.expand_as(gate)).log_resp.exp()

        return of_rows

    @torch.no_grad()
    def forget(self, user: str) -> None:
        """Takes a user out, name and all; the others keep their weights.

        Raises:
            ValueError: the name is unknown.
        """
        if user not in self.users:
            meant = near_name(user, self.users.names)
            hint = "" if meant is None else f" (did you mean {meant!r}?)"
            raise ValueError(f"user={user!r}{hint}: not among the {len(self.users)} users of this policy")
        row = self.users.remove(user)
        if self.has_user_term and row < len(self.model.gate.user):
            self.model.gate.remove_user(row)

    @torch.no_grad()
    def reset(self, user: str) -> None:
        """Takes back what comparisons told of a user; the name stays known, with the population's weights."""
        row = self.users.index(user)
        if row < 0:
            return
        self.users.log_lik[row], self.users.count[row] = 0.0, 0.0
        if self.users.noise is not None:
            self.users.noise[row] = torch.nan
        if self.users.mean is not None and self.users.log_std is not None:
            self.users.mean[row], self.users.log_std[row] = 0.0, 0.0
        if self.has_user_term and row < len(self.model.gate.user):
            self.model.gate.user[row] = 0.0

    def _membership(
        self,
        row: int,
        gate_log_weights: Float[Tensor, "n K"],
        log_lik: Float[Tensor, "n K"],
        weight: Float[Tensor, "n"],
    ) -> GaussianQ:
        network = self.model.gate.membership
        assert network is not None, "latent='membership' comes with a loading"
        nobody_else = torch.zeros(len(weight), dtype=torch.long)
        rows = MembershipRows(gate_log_weights, log_lik.double(), nobody_else, weight, 1)
        before = self.users.q([row], network.dim) if self.users.count[row] > 0 else None
        return network.learn(rows, before)

    def _offsets(
        self,
        row: int,
        gate_log_weights: Float[Tensor, "n K"],
        log_lik: Float[Tensor, "n K"],
        weight: Float[Tensor, "n"],
    ) -> Float[Tensor, "K"]:
        gate = self.model.gate
        if row >= len(gate.user):
            gate.add_users(row + 1 - len(gate.user))
        population = gate.population_log_weights().cpu().double()
        # Prior and earlier comparisons count as pseudo-comparisons with the user's present weights.
        present = torch.log_softmax(population + gate.user[row].cpu().double(), dim=-1)
        past_counts = (self.users.count[row] + gate.user_strength) * present.exp()
        return map_user_offsets(gate_log_weights, log_lik, weight, population, past_counts)

    def _set_offsets(self, row: int, offsets: Float[Tensor, "K"]) -> None:
        gate = self.model.gate
        population = gate.population_log_weights().cpu().double()
        gate.set_user_log_weights(row, (population + offsets).to(gate.user.dtype).to(gate.user.device))

    def _gate(
        self,
        prompts: Sequence[Sequence[int]] | None,
        index: Sequence[int],
        metadata: Sequence[Mapping[str, Any] | None],
    ) -> Float[Tensor, "B K"]:
        gate = self.model.gate
        user = torch.tensor(index, dtype=torch.long)
        if self.has_user_term:
            user[user >= len(gate.user)] = -1
        states, features = self._prompt_states(prompts, len(index)), self._features(metadata)
        device = next(self.model.parameters()).device
        inputs = GateInputs(
            user.to(device),
            None if states is None else states.to(device),
            None if features is None else features.to(device),
        )
        return torch.log_softmax(gate(inputs).cpu().double(), dim=-1)

    def _prompt_states(self, prompts: Sequence[Sequence[int]] | None, num_rows: int) -> Float[Tensor, "B D"] | None:
        if "prompt" not in self.model.gate.reads:
            return None
        if prompts is None:
            return self.model.gate.prompt_mean.expand(num_rows, -1)
        return pooled_prompt_states(self.model.experts.base_model, prompts)

    def _features(self, metadata: Sequence[Mapping[str, Any] | None]) -> Float[Tensor, "B M"] | None:
        if "metadata" not in self.model.gate.reads:
            return None
        assert self.metadata_encoder is not None, "a gate that reads metadata comes with their encoder"
        check_metadata(self.metadata_encoder, metadata)
        return torch.from_numpy(self.metadata_encoder.encode([row or {} for row in metadata]))

    def _warn_of_unknown(self, users: Sequence[str | None]) -> None:
        if self.latent == "pair" and not self.has_user_term:
            return  # nobody has weights of their own
        unknown = sorted({str(user) for user in users if user is not None and self.users.index(user) < 0})
        if unknown:
            meant = near_name(unknown[0], self.users.names) if len(unknown) == 1 else None
            told = ", or what their metadata say" if "metadata" in self.model.gate.reads else ""
            warnings.warn(
                f"unknown users {unknown[:5]}{' ...' if len(unknown) > 5 else ''}"
                f"{'' if meant is None else f' (did you mean {meant!r}?)'} get the population's weights{told}; "
                "adapt(user, comparisons) learns a new user's",
                UserWarning,
                stacklevel=4,
            )
