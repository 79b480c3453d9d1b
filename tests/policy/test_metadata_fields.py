"""What a policy says of metadata that its gate does not know, or gives no weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from prefmix.data.users import MetadataEncoder
from prefmix.policy.metadata_fields import check_metadata, silent_fields
from prefmix.policy.mixture_policy import MixturePolicy

ENCODER = MetadataEncoder.fit([{"user_age": 30, "user_job": "cook"}, {"user_age": 50, "user_job": "pilot"}])


def test_known_fields_and_rows_without_metadata_are_no_mistake() -> None:
    entries = [{"user_job": "cook"}, {"user_age": 33, "shoe": 43}, {"user_job": None}, {}, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_metadata(ENCODER, entries)


def test_unseen_values_and_strange_rows_are_counted_and_named() -> None:
    entries = [{"user_job": "Cook"}, {"job": "cook"}, {"user_job": "cook"}, {"user_age": "old"}]
    with pytest.warns(UserWarning) as caught:
        check_metadata(ENCODER, entries)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("metadata of 3 of 4 rows did not occur")
    for name in ("user_job=Cook", "job", "user_age=old", "the gate reads user_age, user_job=cook, user_job=pilot"):
        assert name in message


def test_a_policy_warns_refuses_text_and_its_card_says_which_fields_decide(
    make_policy: Callable[..., MixturePolicy], tmp_path
) -> None:
    policy = make_policy("user", ("global", "metadata"))
    encoder = policy.metadata_encoder
    assert encoder is not None
    with pytest.warns(UserWarning, match="metadata of 1 of 1 row did not occur in training"):
        policy.weights(metadata={"user_hobby": "chess"})
    with pytest.raises(ValueError, match="metadata='cook': give a mapping"):
        policy.weights(metadata="cook")
    first, *others = encoder.field_names
    place = torch.tensor(encoder.field_of_feature) == 0
    with torch.no_grad():
        policy.model.gate.metadata.weight.fill_(1.0)
        assert silent_fields(policy.model.gate, encoder) == ()
        policy.model.gate.metadata.weight[:, place] = 0.0
    assert silent_fields(policy.model.gate, encoder) == (first,)
    policy.save_pretrained(tmp_path / "policy")
    card = (tmp_path / "policy" / "README.md").read_text(encoding="utf-8")
    assert f"without weight: `{first}`" in card and all(f"`{name}`" in card for name in others)
