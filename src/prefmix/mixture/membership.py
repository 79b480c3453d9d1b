"""Continuous groups: every user has a Gaussian z_u, and mixes the experts by softmax(gate + A z_u).

    z_u ~ N(0, I_d),   w_k(x_i, z) = softmax_k(gate_i + A z),   q(z_u) = N(mean_u, diag(std_u^2))
    ELBO = sum_i a_i E_q log p_i(z_u) - sum_u KL(q_u || N(0, I))

and p_i(z) is one of two, each with its name:

    mixture      p_i = sum_k w_ik(z) p_ik                a mixture of experts, the model of the other latents
    log_linear   p_i = sigmoid(sum_k w_ik(z) m_ik)       a sum of margins, so a product of experts

Pure functions of log-likelihoods or margins; draws come first. Legend: S draws, B rows, G users, K experts, d latent
dimensions.

Source: method sections 2 and 3. Kingma & Welling 2014 (reparameterisation); Burda et al. 2016 (importance-weighted
bound, active units); Kingma et al. 2016 (free bits). Log-linear: PAL (arXiv 2406.08469), LoRe (2504.14439), VPL
(2408.10075).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefmix.mixture.bradley_terry import preference_log_lik
from prefmix.mixture.elbo import RowELBO
from prefmix.mixture.precision import at_least_float32

Combination = Literal["mixture", "log_linear"]
COMBINATIONS: tuple[Combination, ...] = ("mixture", "log_linear")
# Variance over users of the q means below which a dimension carries nothing (Burda et al. 2016).
ACTIVE_VARIANCE = 0.01
# Prior variance of an entry of A: logits of +-6 are within two standard deviations.
LOADING_VARIANCE = 9.0


class GaussianQ(NamedTuple):
    """Variational posteriors of G users, independent Gaussians in every dimension.

    Attributes:
        mean: [G, d].
        log_std: [G, d] log of the standard deviations.
    """

    mean: Float[Tensor, "G d"]
    log_std: Float[Tensor, "G d"]

    def select(self, user: Int[Tensor, "B"]) -> GaussianQ:
        """The posteriors of some users, or one for each row."""
        return GaussianQ(self.mean[user], self.log_std[user])


class MembershipRows(NamedTuple):
    """B comparisons under K experts, and whose they are.

    Attributes:
        gate_log_weights: [B, K] log w of the gate, before the user's z.
        score: [B, K] log p_ik in nats (`mixture`) or margins m_ik (`log_linear`).
        user: [B] 0..G-1.
        weight: [B] a_i, inside the user's likelihood: weight 2 means the row twice.
        num_users: G; users without rows are allowed.
        label_noise: e of `log_linear`; under `mixture` it is within p_ik.
    """

    gate_log_weights: Float[Tensor, "B K"]
    score: Float[Tensor, "B K"]
    user: Int[Tensor, "B"]
    weight: Float[Tensor, "B"]
    num_users: int
    label_noise: float = 0.0


class Membership(nn.Module):
    """The loading A and the variational parameters of G users.

    q starts at the prior. A starts at random: at A = 0 its gradient is zero and nobody would ever differ.
    """

    def __init__(self, num_experts: int, dim: int, num_users: int, *, scale: float = 1.0, seed: int = 0) -> None:
        """Builds the module.

        Args:
            num_experts: K.
            dim: d >= 0; K - 1 directions move all weights, fewer tie them.
            num_users: G.
            scale: standard deviation of a logit that z gives at the start.
            seed: of A.
        """
        super().__init__()
        self.loading = nn.Parameter(initial_loading(num_experts, dim, scale, seed))
        self.mean = nn.Parameter(torch.zeros(num_users, dim))
        self.log_std = nn.Parameter(torch.zeros(num_users, dim))

    def forward(self, user: Int[Tensor, "B"]) -> GaussianQ:
        """The posteriors q of the users of B rows."""
        return GaussianQ(self.mean, self.log_std).select(user)


def initial_loading(num_experts: int, dim: int, scale: float = 1.0, seed: int = 0) -> Float[Tensor, "K d"]:
    """Random A [K, d], centred over experts (a common shift moves no weight).

    Args:
        num_experts: K.
        dim: d.
        scale: root mean square over experts of the standard deviation of (A z)_k.
        seed: of the draw.
    """
    draws = torch.randn(num_experts, dim, generator=torch.Generator().manual_seed(seed))
    centred = draws - draws.mean(dim=0)
    length = centred.norm() if num_experts > 1 and dim > 0 else torch.tensor(1.0)
    return scale * math.sqrt(num_experts) * centred / length


def standard_draws(num_samples: int, dim: int, seed: int = 0) -> Float[Tensor, "S d"]:
    """S fixed draws of N(0, I_d) that fill the space evenly (scrambled Sobol points), in pairs of opposite signs.

    With the same draws for every user a bound is a deterministic function, so that L-BFGS, line searches and finite
    differences work on it. Float64. Source: Giordano et al. 2024 (arXiv 2304.05527), deterministic ADVI.

    Args:
        num_samples: S, even (or 1, which is the origin).
        dim: d >= 0.
        seed: of the scrambling.
    """
    if num_samples == 1 or dim == 0:
        return torch.zeros(num_samples, dim, dtype=torch.float64)
    assert num_samples % 2 == 0, "draws come in pairs"
    sobol = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
    uniform = sobol.draw(num_samples // 2, dtype=torch.float64)
    # Strictly inside (0, 1), where the normal quantile is finite.
    half = torch.special.ndtri(uniform * (1 - 2e-9) + 1e-9)
    return torch.cat([half, -half])


def sample_z(q: GaussianQ, noise: Float[Tensor, "S #G d"]) -> Float[Tensor, "S G d"]:
    """Draws z = mean + std * noise, differentiable in q (reparameterisation); noise [S, 1, d] serves all users."""
    return q.mean + q.log_std.exp() * noise


def membership_log_weights(
    gate_log_weights: Float[Tensor, "B K"], loading: Float[Tensor, "K d"], z: Float[Tensor, "S B d"]
) -> Float[Tensor, "S B K"]:
    """Log softmax(gate_i + A z) of every row under every draw.

    Args:
        gate_log_weights: [B, K] log w of the gate.
        loading: [K, d] A.
        z: [S, B, d] draws of the user of each row.
    """
    return torch.log_softmax(at_least_float32(gate_log_weights) + z @ loading.T, dim=-1)


def mixture_rows(log_weights: Float[Tensor, "S B K"], log_lik: Float[Tensor, "B K"]) -> Float[Tensor, "S B"]:
    """Log sum_k w_ik(z) p_ik, nats: one expert judges each comparison, drawn by the user's weights.

    Args:
        log_weights: [S, B, K] log w_ik(z).
        log_lik: [B, K] log p_ik, nats.
    """
    log_lik = at_least_float32(log_lik)
    # As in `posterior`: at -1e4 nats float32 would round the weights away.
    peak = log_lik.detach().amax(dim=-1, keepdim=True)
    return torch.logsumexp((log_lik - peak) + log_weights, dim=-1) + peak.squeeze(-1)


def log_linear_rows(
    log_weights: Float[Tensor, "S B K"], margins: Float[Tensor, "B K"], label_noise: float = 0.0
) -> Float[Tensor, "S B"]:
    """Log p under the summed margin sum_k w_ik(z) m_ik, nats: the user has one reward, a blend of the experts'.

    With equal references that reward belongs to the product of experts prod_k pi_k^w_k (times the reference's rest).

    Args:
        log_weights: [S, B, K] log w_ik(z).
        margins: [B, K] m_ik.
        label_noise: e of `preference_log_lik`.
    """
    return preference_log_lik((log_weights.exp() * at_least_float32(margins)).sum(dim=-1), label_noise)


def rows_log_lik(
    rows: MembershipRows, loading: Float[Tensor, "K d"], z: Float[Tensor, "S G d"], combine: Combination
) -> Float[Tensor, "S B"]:
    """Log p_i(z_u) of every row under every draw of its user's z.

    Args:
        rows: B comparisons; `score` is what `combine` reads.
        loading: [K, d] A.
        z: [S, G, d].
        combine: `mixture` or `log_linear`.
    """
    log_weights = membership_log_weights(rows.gate_log_weights, loading, z[:, rows.user])
    if combine == "mixture":
        return mixture_rows(log_weights, rows.score)
    return log_linear_rows(log_weights, rows.score, rows.label_noise)


def kl_to_prior(q: GaussianQ) -> Float[Tensor, "G d"]:
    """KL(q || N(0, I)) of every dimension, nats: (mean^2 + std^2 - 1) / 2 - log std."""
    return 0.5 * (q.mean.square() + (2.0 * q.log_std).exp() - 1.0) - q.log_std


def free_bits(kl: Float[Tensor, "G d"], nats: float) -> Float[Tensor, "G d"]:
    """The KL with dimensions that are below `nats` on average left free: max(mean_g KL_gd, nats), without gradient.

    Keeps q from falling back to the prior before the experts differ. With nats = 0 this is the KL.

    Args:
        kl: [G, d] of the users at hand; the mean is over them.
        nats: free nats of each dimension.

    Source: Kingma et al. 2016, section C.8, one group for each dimension.
    """
    free = kl.detach().mean(dim=0, keepdim=True) < nats
    return torch.where(free, torch.full_like(kl, nats), kl)


def kl_factor(step_fraction: float, annealing: float) -> float:
    """Factor of the KL: rises linearly from 0 to 1 over the first `annealing` (a share of training), then stays 1."""
    return 1.0 if annealing <= 0 else min(max(step_fraction, 0.0) / annealing, 1.0)


def membership_elbo_rows(
    row_log_lik: Float[Tensor, "S B"],
    kl: Float[Tensor, "B"],
    weight: Float[Tensor, "B"],
    group_weight: Float[Tensor, "B"],
    kl_factor: float = 1.0,
) -> RowELBO:
    """ELBO_i = a_i [ mean_s log p_i(z_s) - c KL(q_u || N(0, I)) / n_u ].

    Summed over all rows this is an unbiased estimate of the ELBO, however they are split into batches, and its gradient
    (pathwise in q) one of the gradient.

    Args:
        row_log_lik: [S, B] log p_i(z_s), z_s drawn from q of the row's user.
        kl: [B] KL of the row's user, summed over dimensions.
        weight: [B] a_i.
        group_weight: [B] n_u, summed weight of the user's rows over the whole training set.
        kl_factor: c of `kl_factor`; at 1 the bound is one.
    """
    expected = row_log_lik.mean(dim=0)
    share = kl_factor * kl / group_weight.to(kl.dtype).masked_fill(group_weight == 0, math.inf)
    return RowELBO(weight.to(expected.dtype) * (expected - share), expected, kl)


def log_importance(
    row_log_lik: Float[Tensor, "S B"], rows: MembershipRows, q: GaussianQ, z: Float[Tensor, "S G d"]
) -> Float[Tensor, "S G"]:
    """Log of p(z_s) prod_i p_i(z_s)^a_i / q(z_s) for every user; its mean over s is the user's ELBO.

    Args:
        row_log_lik: [S, B] log p_i(z_s) of all rows of these users.
        rows: whose rows they are, and their weights.
        q: what z was drawn from.
        z: [S, G, d].
    """
    weighted = row_log_lik * rows.weight.to(row_log_lik.dtype)
    log_lik = row_log_lik.new_zeros(len(row_log_lik), rows.num_users).index_add(1, rows.user, weighted)
    standardised = (z - q.mean) * (-q.log_std).exp()
    log_ratio = (0.5 * (standardised.square() - z.square()) + q.log_std).sum(dim=-1)
    return log_lik + log_ratio


def importance_bound(log_importance: Float[Tensor, "S G"]) -> Float[Tensor, "G"]:
    """Log (1/S) sum_s exp log_importance: never below the ELBO in mean, and the log evidence as S grows.

    Source: Burda et al. 2016. Shift-invariant, finite at any scale; gradients by autograd.
    """
    return torch.logsumexp(log_importance, dim=0) - math.log(len(log_importance))


def resample(
    z: Float[Tensor, "S G d"], log_importance: Float[Tensor, "S G"], num: int, generator: torch.Generator
) -> Float[Tensor, "num G d"]:
    """`num` draws of every user's posterior: z_s with probability proportional to its importance.

    As S grows these are draws of the exact posterior, which q is not. Source: Rubin 1987.
    """
    chosen = torch.multinomial(torch.softmax(log_importance, dim=0).T, num, replacement=True, generator=generator).T
    return z.gather(0, chosen.unsqueeze(-1).expand(-1, -1, z.shape[-1]))


def predictive_log_weights(
    gate_log_weights: Float[Tensor, "B K"],
    loading: Float[Tensor, "K d"],
    q: GaussianQ,
    noise: Float[Tensor, "S d"],
) -> Float[Tensor, "B K"]:
    """Log E_q softmax(gate_i + A z): what a policy uses for a row.

    Under `mixture` these weights give the predictive probability exactly, sum_k E[w_k] p_k; under `log_linear` they
    give the mean blend, whose margin is the mean margin, sum_k E[w_k] m_k.

    Args:
        gate_log_weights: [B, K].
        loading: [K, d] A.
        q: of the *user of each row*, B of them; the prior for an unknown user.
        noise: [S, d] of `standard_draws`.
    """
    z = sample_z(q, noise.to(q.mean).unsqueeze(1))
    log_weights = membership_log_weights(gate_log_weights, loading, z)
    return torch.logsumexp(log_weights, dim=0) - math.log(len(noise))


class ActiveUnits(NamedTuple):
    """Which latent dimensions carry something.

    Attributes:
        variance: [d] variance over users of the q means; 0 where q never left the prior, at most about 1.
        num_active: dimensions with more than `ACTIVE_VARIANCE`.
    """

    variance: Float[Tensor, "d"]
    num_active: int


def active_units(mean: Float[Tensor, "G d"]) -> ActiveUnits:
    """Active units: Var_u(E_q[z_u]) of every dimension. Posterior collapse shows as a number below d.

    Args:
        mean: [G, d] of users with comparisons.
    """
    variance = mean.var(dim=0, unbiased=False)
    return ActiveUnits(variance, int((variance > ACTIVE_VARIANCE).sum()))
