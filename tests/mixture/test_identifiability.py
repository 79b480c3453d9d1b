"""Opposed equal groups: not identifiable without user ids, and silence with ids or where the prompt separates them."""

import pytest
import torch

from prefmix.mixture.identifiability import identifiability

TEXTS, FEATURES, USERS, PER_USER, PROMPTS = 200, 12, 60, 16, 40
SEEDS = pytest.mark.parametrize("seed", range(5))


class Rows:
    """Two equal groups with opposed tastes over the same texts."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.features = torch.randn(TEXTS, FEATURES, generator=self.draw)
        self.user = torch.arange(USERS).repeat_interleave(PER_USER)
        self.true = self.user % 2
        taste = torch.randn(FEATURES, generator=self.draw)
        first = torch.randint(0, TEXTS, (len(self.user),), generator=self.draw)
        second = (first + torch.randint(1, TEXTS, first.shape, generator=self.draw)) % TEXTS
        better = ((self.features[first] - self.features[second]) @ taste) > 0
        self.liked, self.disliked = torch.where(better, first, second), torch.where(better, second, first)
        self.chosen = torch.where(self.true == 0, self.liked, self.disliked)
        self.rejected = torch.where(self.true == 0, self.disliked, self.liked)
        self.anonymous = torch.full_like(self.user, -1)
        self.prompt = torch.zeros_like(self.user)

    def check(self, chosen=None, rejected=None, user=None, prompt=None, prompt_features=None):
        return identifiability(
            self.features,
            self.chosen if chosen is None else chosen,
            self.rejected if rejected is None else rejected,
            self.anonymous if user is None else user,
            self.prompt if prompt is None else prompt,
            prompt_features,
        )

    def separating_prompts(self):
        """Prompts of two kinds; each group writes one kind."""
        features = torch.randn(PROMPTS, 8, generator=self.draw)
        features[:, 0] += 8.0 * (torch.arange(PROMPTS) % 2)
        prompt = 2 * torch.randint(0, PROMPTS // 2, self.user.shape, generator=self.draw) + self.true
        return prompt, features


@SEEDS
def test_without_ids_the_library_says_so(seed):
    result = Rows(seed).check()
    assert not result.identified and "not identifiable" in result.reason and "user" in result.reason
    assert result.comparisons_per_user == 0 and result.share_repeated == 0


@SEEDS
def test_with_ids_it_is_silent(seed):
    rows = Rows(seed)
    result = rows.check(user=rows.user)
    assert result.identified and result.level == "identified"
    assert result.comparisons_per_user == PER_USER and result.share_repeated == 1


@SEEDS
def test_where_the_prompt_separates_the_groups_it_is_silent(seed):
    rows = Rows(seed)
    prompt, features = rows.separating_prompts()
    result = rows.check(prompt=prompt, prompt_features=features)
    assert result.identified and result.level == "identified"
    assert result.prompt_dependence.z > 3


def test_few_prompts_are_told_apart_by_themselves():
    rows = Rows(0)
    assert rows.check(prompt=rows.true).level == "identified"


@SEEDS
def test_prompts_that_do_not_separate_the_groups_do_not_help(seed):
    rows = Rows(seed)
    _, features = rows.separating_prompts()
    unrelated = torch.randint(0, PROMPTS, rows.user.shape, generator=rows.draw)
    assert not rows.check(prompt=unrelated, prompt_features=features).identified


def test_ids_that_never_repeat_do_not_help():
    rows = Rows(0)
    assert not rows.check(user=torch.arange(len(rows.user))).identified


def test_one_shared_preference_is_weak_but_not_a_coin_flip():
    rows = Rows(0)
    result = rows.check(chosen=rows.liked, rejected=rows.disliked)
    assert result.identified and result.level == "weak" and result.shared_preference.z > 3


def test_pairs_judged_both_ways_are_counted():
    rows = Rows(0)
    both = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 3, 3])
    result = rows.check(*both, user=rows.anonymous[:4], prompt=rows.prompt[:4])
    assert result.both_directions == 0.5


def test_a_single_row_is_answered():
    rows = Rows(0)
    result = rows.check(rows.chosen[:1], rows.rejected[:1], rows.anonymous[:1], rows.prompt[:1])
    assert not result.identified
