"""The amortised E-step of continuous groups: a network reads a user's comparisons and gives q(z_u) in one pass.

    c_u = sum_i a_i psi(x_i) / (1 + n_u)                     what the user is like, n_u = sum_i a_i
    (s_i, t_i) = phi(x_i, c_u, log(1 + n_u))                 what comparison i adds to that
    precision = 1 + sum_i a_i softplus(t_i),   mean = sum_i a_i s_i / precision

a deep set whose comparisons act as Gaussian factors on the prior N(0, I). So any number of comparisons in any order
will do, none gives the prior exactly, a row of weight 2 is the row twice, and no posterior is wider than the prior.

Legend: B comparisons, G users, K experts, d latent dimensions, H hidden units, F features.

Source: Zaheer et al. 2017 (deep sets); Kingma & Welling 2014 (amortisation); Johnson et al. 2016 (arXiv 1603.06277, a
network's output as factors of a conjugate prior).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from prefmix.mixture.membership import (
    Combination,
    GaussianQ,
    MembershipRows,
    kl_to_prior,
    rows_log_lik,
    sample_z,
    standard_draws,
)
from prefmix.mixture.posterior import posterior
from prefmix.mixture.precision import at_least_float32

# softplus(-3) = 0.05: before training a comparison says little.
FIRST_PRECISION = -3.0


def comparison_features(gate_log_weights: Float[Tensor, "B K"], log_lik: Float[Tensor, "B K"]) -> Float[Tensor, "B F"]:
    """What the encoder reads of a comparison, all in [0, 1]: posterior of its expert alone, p_ik, and the gate's w_ik.

    Args:
        gate_log_weights: [B, K] log w of the gate.
        log_lik: [B, K] log p_ik, nats.

    Returns:
        [B, F], F = 3 K.
    """
    log_resp = posterior(gate_log_weights, log_lik).log_resp
    return torch.cat([log_resp, at_least_float32(log_lik), gate_log_weights.to(log_resp)], dim=-1).exp()


class UserEncoder(nn.Module):
    """Comparisons of G users -> q(z_u)."""

    def __init__(self, num_experts: int, dim: int, hidden: int = 64) -> None:
        """Builds an encoder that starts near the prior.

        Args:
            num_experts: K; inputs are those of `comparison_features`.
            dim: d.
            hidden: H.
        """
        super().__init__()
        self.num_experts, self.dim, self.hidden = num_experts, dim, hidden
        self.context = nn.Sequential(nn.Linear(3 * num_experts, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.factor = nn.Sequential(
            nn.Linear(3 * num_experts + hidden + 1, hidden), nn.SiLU(), nn.Linear(hidden, 2 * dim)
        )
        last = self.factor[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        with torch.no_grad():
            last.bias[dim:] = FIRST_PRECISION

    def forward(
        self,
        features: Float[Tensor, "B F"],
        user: Int[Tensor, "B"],
        weight: Float[Tensor, "B"],
        num_users: int,
    ) -> GaussianQ:
        """The posterior of every user; the prior for users without comparisons.

        Args:
            features: [B, F] of `comparison_features`.
            user: [B] 0..G-1, in any order.
            weight: [B] a_i.
            num_users: G.
        """
        weight = weight.to(features.dtype).unsqueeze(1)

        def of_users(values: Float[Tensor, "B H"]) -> Float[Tensor, "G H"]:
            return values.new_zeros(num_users, values.shape[1]).index_add(0, user, weight * values)

        total = of_users(torch.ones_like(weight))
        context = torch.cat([of_users(self.context(features)) / (1.0 + total), total.log1p()], dim=1)
        shift, information = self.factor(torch.cat([features, context[user]], dim=1)).chunk(2, dim=1)
        precision = 1.0 + of_users(softplus(information))
        return GaussianQ(of_users(shift) / precision, -0.5 * precision.log())

    def describe(self) -> dict[str, int]:
        """JSON-ready keyword arguments of the constructor."""
        return {"num_experts": self.num_experts, "dim": self.dim, "hidden": self.hidden}


def encode(encoder: UserEncoder, rows: MembershipRows, log_lik: Float[Tensor, "B K"]) -> GaussianQ:
    """The posterior of every user from their comparisons.

    Args:
        encoder: of the same experts.
        rows: comparisons of G users.
        log_lik: [B, K] log p_ik; `rows.score` itself under `mixture`.
    """
    features = comparison_features(rows.gate_log_weights, log_lik)
    return encoder(features, rows.user, rows.weight, rows.num_users)


def fit_encoder(
    rows: MembershipRows,
    log_lik: Float[Tensor, "B K"],
    loading: Float[Tensor, "K d"],
    combine: Combination,
    *,
    hidden: int = 64,
    steps: int = 400,
    users_per_step: int = 100,
    samples: int = 4,
    learning_rate: float = 5e-3,
    generator: torch.Generator | None = None,
) -> UserEncoder:
    """A new encoder for given experts; see `train_encoder`.

    Args:
        rows: comparisons of the training users.
        log_lik: [B, K] log p_ik of the same rows.
        loading: [K, d] A.
        combine: `mixture` or `log_linear`.
        hidden: H.
        steps: Adam's, the rate falling to zero along a cosine.
        users_per_step: drawn without replacement.
        samples: S draws of z for each user.
        learning_rate: at the start.
        generator: None seeds one with 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        encoder = UserEncoder(loading.shape[0], loading.shape[1], hidden).to(loading)
    train_encoder(
        encoder, rows, log_lik, loading, combine, steps=steps, users_per_step=users_per_step, samples=samples,
        learning_rate=learning_rate, generator=generator,
    )  # fmt: skip
    return encoder.eval()


def train_encoder(
    encoder: UserEncoder,
    rows: MembershipRows,
    log_lik: Float[Tensor, "B K"],
    loading: Float[Tensor, "K d"],
    combine: Combination,
    *,
    steps: int,
    users_per_step: int,
    samples: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    """Trains an encoder at given experts: the mean bound of users of whom a random part is seen.

    Each step draws users and keeps a share of each one's comparisons, a new share between 0 and 1 for each user: so the
    encoder meets every number of comparisons, none included, and each part has a bound of its own. Arguments are those
    of `fit_encoder`; no gradient is left behind.
    """
    optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        part, part_log_lik = _part_of_users(rows, log_lik, users_per_step, generator)
        q = encode(encoder, part, part_log_lik)
        noise = standard_draws(samples, loading.shape[1], seed=step).to(loading)
        by_row = rows_log_lik(part, loading.detach(), sample_z(q, noise.unsqueeze(1)), combine).mean(dim=0)
        bound = ((by_row * part.weight).sum() - kl_to_prior(q).sum()) / part.num_users
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def _part_of_users(
    rows: MembershipRows, log_lik: Float[Tensor, "B K"], num: int, generator: torch.Generator
) -> tuple[MembershipRows, Float[Tensor, "C K"]]:
    """Some users, and of each a random share of the comparisons, with `log_lik` of the same."""
    drawn = torch.randperm(rows.num_users, generator=generator)[:num]
    position = torch.full((rows.num_users,), -1).index_put((drawn,), torch.arange(len(drawn)))
    share = torch.rand(rows.num_users, generator=generator)
    kept = (position[rows.user] >= 0) & (torch.rand(len(rows.user), generator=generator) < share[rows.user])
    gate, score, weight = rows.gate_log_weights[kept], rows.score[kept], rows.weight[kept]
    part = MembershipRows(gate, score, position[rows.user[kept]], weight, len(drawn), rows.label_noise)
    return part, log_lik[kept]
