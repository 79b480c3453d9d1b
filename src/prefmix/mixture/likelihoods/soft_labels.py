"""Labels that are probabilities, and label smoothing. Legend: B comparisons, K experts."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def soft_label_log_lik(
    log_win: Float[Tensor, "B K"], log_loss: Float[Tensor, "B K"], label: Float[Tensor, "B"]
) -> Float[Tensor, "B K"]:
    """Expected log-likelihood under a label that is a probability.

        log p_k = y log p_k(first > second) + (1 - y) log p_k(second > first)

    It is the log-likelihood of a share y of judges for the first response and 1 - y for the second, per judge. With
    y = 1 - epsilon everywhere it is conservative DPO (label smoothing: TRL's `CPOTrainer` with `label_smoothing`).

    Args:
        log_win: [B, K] log-likelihood of the preference as it stands, nats, finite.
        log_loss: [B, K] of the opposite preference.
        label: [B] y in [0, 1].

    Source: Mitchell 2023, "A note on DPO with noisy preferences" (conservative DPO), equation 6.

    Relations: label noise (`preference_log_lik`) is a mixture *inside* the logarithm, so a row that is clearly wrong
    costs at most -log e; here its cost grows without bound, and the fitted margin is log(y / (1 - y)).
    """
    share = label.to(log_win.dtype).unsqueeze(-1)
    return share * log_win + (1.0 - share) * log_loss
