"""What a gate of continuous groups learns beside its terms: the loading A, and an encoder of users where there is one.

    w(x, u) = softmax(gate(x, u) + A z_u)

It also knows how the experts' judgements are combined (`membership.Combination`), which A and the encoder serve.

Legend: B rows, C comparisons, G users, K experts, d latent dimensions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefmix.mixture.bradley_terry import margins_of_log_lik
from prefmix.mixture.membership import (
    LOADING_VARIANCE,
    Combination,
    GaussianQ,
    MembershipRows,
    initial_loading,
    membership_log_weights,
    predictive_log_weights,
    sample_z,
    standard_draws,
)
from prefmix.mixture.membership_fit import fit_users
from prefmix.mixture.user_encoder import UserEncoder, encode

# A's logits at the start have this standard deviation: users differ from the first step on.
FIRST_SPREAD = 2.0
PREDICTIVE_DRAWS = 64
FIT_DRAWS = 32


class MembershipNetwork(nn.Module):
    """The loading A [K, d] and, where new users are to be encoded, the encoder."""

    encoder: UserEncoder | None

    def __init__(
        self,
        num_experts: int,
        dim: int,
        encoder_hidden: int = 0,
        seed: int = 0,
        combine: Combination = "mixture",
        label_noise: float = 0.0,
    ) -> None:
        """Builds a loading in general position.

        Args:
            num_experts: K.
            dim: d, at least 1.
            encoder_hidden: hidden units of the encoder; 0: no encoder, users are fitted.
            seed: of A and of the encoder's weights.
            combine: `mixture` or `log_linear`.
            label_noise: e of the rows, which `log_linear` applies to the summed margin.
        """
        super().__init__()
        self.combine, self.label_noise = combine, label_noise
        self.loading = nn.Parameter(initial_loading(num_experts, dim, FIRST_SPREAD, seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = UserEncoder(num_experts, dim, encoder_hidden) if encoder_hidden else None

    @property
    def dim(self) -> int:
        """Latent dimensions, d."""
        return self.loading.shape[1]

    def prior(self, num_users: int) -> GaussianQ:
        """N(0, I) for users of whom nothing is known; float64 on the CPU."""
        zeros = torch.zeros(num_users, self.dim, dtype=torch.float64)
        return GaussianQ(zeros, zeros.clone())

    @torch.no_grad()
    def predictive(self, gate_log_weights: Float[Tensor, "B K"], q: GaussianQ) -> Float[Tensor, "B K"]:
        """[B, K] log E_q softmax(gate + A z), float64 on the CPU; `q` is of the user of each row."""
        noise = standard_draws(PREDICTIVE_DRAWS, self.dim)
        return predictive_log_weights(gate_log_weights.double().cpu(), self.loading.double().cpu(), q, noise)

    def judged(self, rows: MembershipRows) -> MembershipRows:
        """Rows whose `score` is log p_ik as the combination reads them: with margins under `log_linear`."""
        if self.combine == "mixture":
            return rows
        score = margins_of_log_lik(rows.score, self.label_noise)
        return rows._replace(score=score, label_noise=self.label_noise)

    @torch.no_grad()
    def learn(self, rows: MembershipRows, before: GaussianQ | None = None) -> GaussianQ:
        """What the comparisons of G users tell of them: one pass of the encoder, or a small fit.

        Args:
            rows: comparisons; `score` is log p_ik, whatever the combination.
            before: what was known of the one user whose rows these are. It plays the part of the prior (streaming
                variational Bayes, Broderick et al. 2013), z = mean + std z' with z' ~ N(0, I), and z' is fitted.

        Returns:
            GaussianQ, float64 on the CPU.
        """
        if before is None and self.encoder is not None:
            as_trained = rows_as(rows, self.loading.dtype, self.loading.device)
            q = encode(self.encoder, as_trained, as_trained.score)
            return GaussianQ(q.mean.double().cpu(), q.log_std.double().cpu())
        rows, loading = self.judged(rows_as(rows, torch.float64, "cpu")), self.loading.double().cpu()
        noise = standard_draws(FIT_DRAWS, self.dim)
        if before is None:
            return fit_users(rows, loading, self.combine, noise).q
        assert rows.num_users == 1, "earlier knowledge is of one user"
        moved = rows._replace(gate_log_weights=rows.gate_log_weights + before.mean @ loading.T)
        q = fit_users(moved, loading * before.log_std.exp(), self.combine, noise).q
        return GaussianQ(before.mean + before.log_std.exp() * q.mean, before.log_std + q.log_std)

    @torch.no_grad()
    def responsibilities(
        self, gate_log_weights: Float[Tensor, "B K"], log_lik: Float[Tensor, "B K"], q: GaussianQ
    ) -> Float[Tensor, "B K"]:
        """[B, K] E_q of the posterior of each row's expert, rows of one user; float64 on the CPU.

        It is the gradient of the user's bound in log p_ik (`mixture`).
        """
        noise = standard_draws(PREDICTIVE_DRAWS, self.dim).to(q.mean)
        z = sample_z(q, noise.unsqueeze(1)).expand(-1, len(log_lik), -1)
        log_weights = membership_log_weights(gate_log_weights.double().cpu(), self.loading.double().cpu(), z)
        return torch.softmax(log_weights + log_lik.double().cpu(), dim=-1).mean(dim=0)

    def log_prior(self) -> Float[Tensor, ""]:
        """Log density of A under independent N(0, v) up to a constant, nats; the encoder's weights have a flat prior.

        That prior's gradient is 0, but there: DDP waits for one of every parameter, also while first responsibilities
        are held and nobody asks the encoder.
        """
        flat = [0.0 * parameter.sum() for parameter in self.encoder.parameters()] if self.encoder is not None else []
        return -0.5 / LOADING_VARIANCE * self.loading.square().sum() + sum(flat)


def rows_as(rows: MembershipRows, dtype: torch.dtype, device: torch.device | str) -> MembershipRows:
    """The rows in another type, on another device."""
    gate, score, weight = (part.to(device, dtype) for part in (rows.gate_log_weights, rows.score, rows.weight))
    return MembershipRows(gate, score, rows.user.to(device), weight, rows.num_users, rows.label_noise)
