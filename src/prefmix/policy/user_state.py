"""What a policy knows of each user: accumulated evidence about their expert, and how many comparisons they gave.

Legend: U users, K experts, d latent dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.mixture.membership import GaussianQ


@dataclass
class UserState:
    """One row for each known user, in the order of `names`.

    The first users are those of the training set, in the order of the gate's user indices; users that
    `MixturePolicy.adapt` met later follow. Rows are float64: evidence is a sum over all comparisons of a user.
    Under `latent="pair"` with a `user` gate term the weights themselves are the gate's rows, in the same order.

    Attributes:
        names: U user names.
        log_lik: [U, K] sum over the user's comparisons of weight * log p_k, nats. The posterior under
            `latent="user"` is softmax(gate + log_lik). Not read under `latent="pair"`.
        count: [U] sum of the weights of the user's comparisons.
        mean: [U, d] mean of q(z_u) under `latent="membership"`; d = 0 under the others.
        log_std: [U, d] log of its standard deviations.
        noise: [U] error rates of the users' labels where they are learnt for each annotator, NaN where unknown; None:
            the policy has one rate for everybody.
    """

    names: list[str]
    log_lik: Float[Tensor, "U K"]
    count: Float[Tensor, "U"]
    mean: Float[Tensor, "U d"] | None = None
    log_std: Float[Tensor, "U d"] | None = None
    noise: Float[Tensor, "U"] | None = None

    def __post_init__(self) -> None:
        self.names = [str(name) for name in self.names]
        self.log_lik = self.log_lik.detach().to("cpu", torch.float64)
        self.count = self.count.detach().to("cpu", torch.float64)
        if self.mean is not None and self.log_std is not None:
            self.mean, self.log_std = (part.detach().to("cpu", torch.float64) for part in (self.mean, self.log_std))
        self.noise = None if self.noise is None else self.noise.detach().to("cpu", torch.float64)
        assert len(self.names) == len(self.log_lik) == len(self.count), "one row for each user"
        self._index = {name: row for row, name in enumerate(self.names)}
        assert len(self._index) == len(self.names), "user names are distinct"

    @classmethod
    def empty(cls, num_experts: int, names: Sequence[str] = ()) -> UserState:
        """Users without any evidence (their weights are the gate's)."""
        return cls(list(names), torch.zeros(len(names), num_experts), torch.zeros(len(names)))

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def index(self, name: str | None) -> int:
        """The user's row, -1 where unknown."""
        return -1 if name is None else self._index.get(str(name), -1)

    def add(self, name: str) -> int:
        """The user's row, made without evidence where the user is new."""
        name = str(name)
        if name not in self._index:
            self._index[name] = len(self.names)
            self.names.append(name)
            self.log_lik = torch.cat([self.log_lik, self.log_lik.new_zeros(1, self.log_lik.shape[1])])
            self.count = torch.cat([self.count, self.count.new_zeros(1)])
            if self.noise is not None:
                self.noise = torch.cat([self.noise, self.noise.new_full((1,), torch.nan)])
            if self.mean is not None and self.log_std is not None:  # zeros are the prior N(0, I)
                self.mean, self.log_std = (
                    torch.cat([v, v.new_zeros(1, v.shape[1])]) for v in (self.mean, self.log_std)
                )
        return self._index[name]

    def remove(self, name: str) -> int:
        """Takes the user out, whose row is given back; later users move up by one."""
        row = self._index[str(name)]
        del self.names[row]
        self._index = {name: place for place, name in enumerate(self.names)}
        kept = [place for place in range(len(self.log_lik)) if place != row]
        self.log_lik, self.count = self.log_lik[kept], self.count[kept]
        self.noise = None if self.noise is None else self.noise[kept]
        if self.mean is not None and self.log_std is not None:
            self.mean, self.log_std = self.mean[kept], self.log_std[kept]
        return row

    def evidence(self, rows: Sequence[int]) -> Float[Tensor, "B K"]:
        """[B, K] log-likelihoods of users by row; zeros for -1 (unknown)."""
        index = torch.tensor(rows, dtype=torch.long)
        if not len(self):
            return self.log_lik.new_zeros(len(index), self.log_lik.shape[1])
        return torch.where((index >= 0).unsqueeze(1), self.log_lik[index.clamp(min=0)], 0.0)

    def rates(self, rows: Sequence[int], otherwise: float) -> Float[Tensor, "B"] | None:
        """[B] error rates of users by row; `otherwise` for -1 and users without one. None: nobody has one."""
        if self.noise is None or not len(self):
            return None
        index = torch.tensor(rows, dtype=torch.long)
        known = (index >= 0) & (index < len(self))
        found = torch.where(known, self.noise[torch.where(known, index, 0)], torch.nan)
        return torch.where(found.isnan(), otherwise, found)

    def rate(self, name: str) -> float | None:
        """The user's own error rate; None where it was not learnt."""
        row = self.index(name)
        if self.noise is None or row < 0 or bool(self.noise[row].isnan()):
            return None
        return float(self.noise[row])

    def q(self, rows: Sequence[int], dim: int) -> GaussianQ:
        """What is known of users' z by row, [B, d]; the prior N(0, I) for -1 (unknown)."""
        index = torch.tensor(rows, dtype=torch.long)
        if self.mean is None or self.log_std is None or not len(self):
            zeros = torch.zeros(len(index), dim, dtype=torch.float64)
            return GaussianQ(zeros, zeros.clone())
        known = (index >= 0).unsqueeze(1)
        return GaussianQ(*(torch.where(known, v[index.clamp(min=0)], 0.0) for v in (self.mean, self.log_std)))

    def set_q(self, row: int, q: GaussianQ) -> None:
        """Keeps q(z) of one user, [1, d]."""
        if self.mean is None or self.log_std is None:
            self.mean, self.log_std = (torch.zeros(len(self), q.mean.shape[1], dtype=torch.float64) for _ in range(2))
        self.mean[row], self.log_std[row] = q.mean[0].double(), q.log_std[0].double()

    def tensors(self) -> dict[str, Tensor]:
        """What `users/users.safetensors` holds."""
        tensors = {"log_lik": self.log_lik, "count": self.count}
        if self.mean is not None and self.log_std is not None:
            tensors |= {"mean": self.mean, "log_std": self.log_std}
        return tensors if self.noise is None else tensors | {"noise": self.noise}
