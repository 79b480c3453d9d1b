"""Options of label noise that is learnt, and what must hold between them and others. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FIRST_NOISE = 0.1


@dataclass
class NoiseOptions:
    """How `label_noise` moves in training."""

    label_noise_update: Literal["fixed", "global", "per_annotator"] = field(
        default="fixed",
        metadata={
            "help": "label_noise as given (fixed), or learnt by EM: one rate for everybody (global), or one for each "
            "user, at most 1/2, an annotator who answers at random (per_annotator; rows without a user share one). "
            "Rates start at label_noise, or where that is 0 at the prior's mode."
        },
    )
    label_noise_prior: list[float] = field(
        default_factory=lambda: [1.2, 2.8],
        metadata={
            "help": "Beta(a, b) of a learnt rate, both at least 1: a - 1 comparisons that were flipped, b - 1 that "
            "were not. The default has its mode at 0.1 and is worth two comparisons; [1, 1] is flat."
        },
    )


def first_noise(values: Mapping[str, Any]) -> float:
    """Where rates start: `label_noise`, or in its absence the prior's mode; EM never leaves 0."""
    if values["label_noise_update"] == "fixed" or values["label_noise"] > 0:
        return float(values["label_noise"])
    flipped, kept = (float(count) - 1.0 for count in values["label_noise_prior"])
    mode = flipped / (flipped + kept) if flipped > 0 else FIRST_NOISE
    return min(max(mode, 0.01), 0.49)


def stronger_prior(prior: Sequence[float]) -> list[float]:
    """Beta(a, b) worth four times the pseudo-comparisons, for rows that the experts came to fit."""
    flipped, kept = (float(count) - 1.0 for count in prior)
    return [1.0 + 4.0 * max(flipped, 0.5), 1.0 + 4.0 * max(kept, 2.0)]


def noise_problems(values: Mapping[str, Any]) -> list[str]:
    """Why learnt noise does not go with other options, or nothing."""
    prior, update = list(values["label_noise_prior"]), values["label_noise_update"]
    if update == "fixed":
        used = prior != NoiseOptions().label_noise_prior
        remedy = "no effect there; use 'global' or 'per_annotator'"
        return [f"label_noise_prior with label_noise_update='fixed': {remedy}"] if used else []
    problems = []
    if len(prior) != 2 or not all(1.0 <= count < float("inf") for count in prior):
        problems.append(f"label_noise_prior={prior}: two numbers, each at least 1, such as [1.2, 2.8]")
    fitting = (
        ("loss_type", ("sigmoid", "sigmoid_norm"), "flips have a probability under sigmoid and sigmoid_norm; use one"),
        ("label_smoothing", (0.0,), "noise would be counted twice; leave it at 0"),
        ("ties", ("drop",), "flipped ties are not modelled; use ties='drop'"),
        ("likelihood", ("mbt",), "a flip's probability is that of an expert's judgement; use 'mbt'"),
    )
    return problems + [
        f"{name}={values[name]!r} with label_noise_update={update!r}: {why}"
        for name, good, why in fitting
        if values[name] not in good
    ]
