"""What a run says of itself, one line each on standard error: what was chosen, where it starts, what it left.

Legend: G latent groups, K experts, U users.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from prefmix.data.counted import counted
from prefmix.mixture.held_out import Gain
from prefmix.policy.mixture_policy import MixturePolicy
from prefmix.training.penalties import pooling_of

if TYPE_CHECKING:
    from prefmix.training.trainer import MixtureTrainer

# Standard errors.
CLEAR = 2.0
_FOUND_BY = {
    "probe": "the probe of the frozen model parts them into",
    "kmeans": "k-means over prompts parts them into",
    "labels": "the rows' own groups have",
    "random": "at random",
    "experts": "by what the experts that they start from say of them,",
}


def report_choices(trainer: MixtureTrainer) -> None:
    """What was chosen where the configuration said "auto", and the sizes."""
    if not trainer.args.should_log:
        return
    table, args = trainer.train_comparisons.table, trainer.args
    repeated = "chosen because most users have two or more rows" if trainer.latent == "user" else "one expert a row"
    latent = f"latent={trainer.latent}" + (f" ({repeated})" if args.latent == "auto" else "")
    held = args.init_hold_epochs and trainer.init != "experts"  # experts say themselves who is whose
    hold = f" held for {counted(args.init_hold_epochs, 'epoch')}" if held else ""
    sizes = f"{counted(len(table), 'comparison')} of {counted(len(table.texts), 'text')}"
    _say(
        f"{sizes} by {counted(len(table.users), 'user')}; {counted(args.num_experts, 'expert')}, {latent}, "
        f"gate={'+'.join(args.gate)}, init={trainer.init}{hold}"
    )


def report_start(trainer: MixtureTrainer, resp: Float[Tensor, "G K"]) -> None:
    """The sizes of the groups that experts start from, and what holds experts together where nobody said how much.

    Args:
        trainer: of a fresh run.
        resp: first responsibilities.
    """
    if trainer.args.num_experts == 1 or not trainer.args.should_log:
        return
    num_users = len(trainer.train_comparisons.table.users)
    of_users = trainer.latent != "pair" and num_users > 0
    *others, last = _sizes(resp[:num_users] if of_users else resp)
    sizes = f"{', '.join(map(str, others))} and {counted(last, 'user' if of_users else 'row')}"
    held = pooling_of(trainer.args, trainer.em.pooling) if trainer.args.pooling is None else 0.0
    pooled = f"; experts are held together as the probe's are, pooling={held:.2g}" if held else ""
    _say(f"groups to start from: {_FOUND_BY[trainer.init]} {sizes}{pooled}")
    if trainer.em.gain is not None:
        _say(gain_line(trainer.em.gain, trainer.args.num_experts))


def gain_line(gain: Gain, num_experts: int) -> str:
    """What the probe's linear rewards say of K groups against one, on comparisons that their fits had not seen."""
    figures = f"{gain.mean:+.2f} nats a user, z {gain.z:.1f}"
    better = f"predicted better by {num_experts} groups than by one ({figures}, by the probe)"
    if gain.z >= CLEAR:
        return f"held-out comparisons are {better}"
    return f"held-out comparisons are not clearly {better}: one expert may do as well; prefmix probe says more"


def followers(policy: MixturePolicy) -> list[int] | None:
    """[K] users of whom each expert is the heaviest; None where no weight depends on the user."""
    personal = policy.config.latent != "pair" or "user" in policy.model.gate.terms
    if policy.config.num_experts == 1 or not (personal and len(policy.users)):
        return None
    return _sizes(policy.user_log_weights(policy.users.names))


def report_end(folder: Path, run_dir: Path, users: list[int] | None, silent: Sequence[str] = ()) -> None:
    """Where the policy is, who is with which expert, and what to do next.

    Args:
        folder: of the policy.
        run_dir: of the run.
        users: `followers`.
        silent: `silent_fields`.
    """
    if silent:
        _say(f"metadata that say nothing of who prefers what, and get no weight in the gate: {', '.join(silent)}")
    sizes = [str(size) if k else counted(size, "user") for k, size in enumerate(users or [])]
    who = ", ".join(f"{size} with expert {k}" for k, size in enumerate(sizes))
    _say(f"policy saved in {folder}{': ' + who if who else ''}; next: prefmix report {run_dir} --data ROWS")


def _sizes(log_weights: Float[Tensor, "G K"]) -> list[int]:
    """[K] rows whose largest entry is each column's."""
    return torch.bincount(log_weights.argmax(dim=1), minlength=log_weights.shape[1]).tolist()


def _say(text: str) -> None:
    print(f"prefmix: {text}", file=sys.stderr)
