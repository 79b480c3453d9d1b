"""Users go without a trace, evidence can be replaced, and no save takes another's users away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefmix.policy.mixture_policy import MixturePolicy

ROWS = [
    {"prompt": "What color is the sky?", "chosen": " The sky is blue.", "rejected": " The sky is green."},
    {"prompt": "Where is the sun?", "chosen": " In the sky.", "rejected": " In the sea.", "weight": 2.0},
]
KINDS = [("user", ("global",)), ("user", ("global", "user")), ("pair", ("global", "user"))]


@pytest.mark.parametrize(("latent", "terms"), KINDS)
@pytest.mark.parametrize("name", ["anna", "bob", "carol"])
def test_a_forgotten_user_is_nobody_and_the_others_are_as_before(
    make_policy: Callable[..., MixturePolicy], tmp_path: Path, latent: str, terms: tuple[str, ...], name: str
) -> None:
    policy = make_policy(latent, terms)
    for user, times in (("carol", 3), ("dave", 1)):
        policy.adapt(user, ROWS * times)
    before = {user: policy.weights(user=user) for user in policy.users.names}
    policy.save_pretrained(tmp_path / "policy")
    policy.forget(name, save=True)
    again = MixturePolicy.from_pretrained(tmp_path / "policy", device="cpu")
    for kept in (policy, again):
        assert kept.users.names == [user for user in before if user != name]
        for user in kept.users.names:
            torch.testing.assert_close(kept.weights(user=user), before[user])
        with pytest.warns(UserWarning, match="unknown users"):
            torch.testing.assert_close(kept.weights(user=name), kept.weights())
    written = [file for file in (tmp_path / "policy").rglob("*") if file.is_file()]
    assert not [file.name for file in written if f'"{name}"'.encode() in file.read_bytes()]
    if name == "carol":  # everything that was known of her came from these rows
        torch.testing.assert_close(again.adapt(name, ROWS * 3), before[name])


def test_who_is_not_there_cannot_be_forgotten(make_policy: Callable[..., MixturePolicy], tmp_path: Path) -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match=r"user='ana' \(did you mean 'anna'\?\): not among the 2 users"):
        policy.forget("ana")
    with pytest.raises(ValueError, match="no folder yet"):
        policy.forget("anna", save=True)
    assert policy.users.names == ["anna", "bob"]
    with pytest.raises(ValueError, match="give the user a name"):
        policy.adapt(" ", ROWS)


@pytest.mark.parametrize(("latent", "terms"), KINDS)
def test_evidence_can_take_the_place_of_earlier_evidence(
    make_policy: Callable[..., MixturePolicy], latent: str, terms: tuple[str, ...]
) -> None:
    policy = make_policy(latent, terms)
    once = policy.adapt("carol", ROWS)
    twice = policy.adapt("carol", ROWS)
    assert not torch.allclose(once, twice)
    torch.testing.assert_close(policy.adapt("carol", ROWS, anew=True), once)
    assert policy.users.names == ["anna", "bob", "carol"]


def test_of_two_who_save_the_second_is_told(make_policy: Callable[..., MixturePolicy], tmp_path: Path) -> None:
    make_policy().save_pretrained(tmp_path / "policy")
    first, second = (MixturePolicy.from_pretrained(tmp_path / "policy", device="cpu") for _ in range(2))
    first.adapt("carol", ROWS, save=True)
    first.adapt("erin", ROWS, save=True)  # its own save is no other's
    for change in (lambda: second.adapt("dave", ROWS, save=True), lambda: second.forget("anna", save=True)):
        with pytest.raises(ValueError, match="saved by somebody else since it was loaded; load it again"):
            change()
    names = json.loads((tmp_path / "policy" / "users" / "users.json").read_text())
    assert names == ["anna", "bob", "carol", "erin"]
    assert second.users.names == ["anna", "bob"]  # nothing was half done
    second.save_pretrained(tmp_path / "other")
