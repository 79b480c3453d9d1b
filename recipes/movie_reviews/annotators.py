"""Invented annotators with one hidden objective each, who compare responses that the reference wrote.

Legend: N responses, R objectives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from prefmix.evaluation.generation_quality import Samples


class Annotators(NamedTuple):
    """Who judges, and how surely.

    Attributes:
        objectives: names of the R objectives; annotators are spread over them evenly.
        each: annotators of each objective.
        slope: p(first is chosen) = sigmoid(slope * difference), differences in standard deviations of the reference.
        min_gap: pairs that differ by less are called a tie and left out, standard deviations.
    """

    objectives: tuple[str, ...]
    each: int
    slope: float = 4.0
    min_gap: float = 0.5

    def rows(
        self, samples: Samples, rewards: np.ndarray, comparisons: int, prompt_ids: list[list[int]], seed: int
    ) -> list[dict[str, Any]]:
        """Preference rows with token ids as they were drawn, `user` and the true `group`.

        Args:
            samples: responses to P prompts.
            rewards: [N, R] standardised rewards.
            comparisons: of each annotator, over different prompts; fewer where too few prompts have a clear pair.
            prompt_ids: P prompts as token ids.
            seed: of prompts, pairs and noise.
        """
        rng, rows = np.random.default_rng([seed, 77]), []
        by_prompt = np.arange(len(samples.responses)).reshape(len(samples.prompts), -1)
        for objective, name in enumerate(self.objectives):
            value = rewards[:, objective]
            for annotator in range(self.each):
                drawn = 0
                for prompt in rng.permutation(len(by_prompt)):
                    pair = self._pair(by_prompt[prompt], value, samples, rng)
                    if pair is None:
                        continue
                    first, second = pair
                    sure = 1 / (1 + np.exp(-self.slope * (value[first] - value[second])))
                    chosen, rejected = (first, second) if rng.random() < sure else (second, first)
                    rows.append(
                        {
                            "prompt_ids": prompt_ids[prompt],
                            "chosen_ids": samples.token_ids[chosen],
                            "rejected_ids": samples.token_ids[rejected],
                            "user": f"annotator {objective}-{annotator}",
                            "group": name,
                        }
                    )
                    drawn += 1
                    if drawn == comparisons:
                        break
        return rows

    def _pair(
        self, responses: np.ndarray, value: np.ndarray, samples: Samples, rng: np.random.Generator
    ) -> tuple[int, int] | None:
        """Two responses to one prompt that clearly differ, at random; None where all are alike."""
        clear = [
            (int(a), int(b))
            for i, a in enumerate(responses)
            for b in responses[:i]
            if abs(value[a] - value[b]) >= self.min_gap and samples.token_ids[a] != samples.token_ids[b]
        ]
        return clear[int(rng.integers(len(clear)))] if clear else None
