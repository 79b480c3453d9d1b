"""Latent groups and metadata features."""

from __future__ import annotations

import json

import numpy as np
import pytest

from prefmix.data.tokenization import tokenize_rows
from prefmix.data.users import MAX_CATEGORIES, MetadataEncoder, latent_groups, num_latent_groups


@pytest.fixture
def table(tiny_tokenizer):
    row = {"prompt": "Sky?", "chosen": " blue", "rejected": " green"}
    rows = [{**row, "user": user} for user in ("b", None, "a", "b", None)]
    return tokenize_rows(rows, tiny_tokenizer, users=["a", "absent"])


def test_under_pair_every_row_is_a_group(table):
    assert latent_groups(table, "pair").tolist() == [0, 1, 2, 3, 4]
    assert num_latent_groups(table, "pair") == 5


def test_under_user_rows_share_their_users_group_and_anonymous_rows_stand_alone(table):
    assert table.users == ("a", "absent", "b")
    assert latent_groups(table, "user").tolist() == [2, 3, 0, 2, 4]
    assert num_latent_groups(table, "user") == 5  # the absent user keeps an empty group
    assert table.user.tolist() == [2, -1, 0, 2, -1]  # untouched


def test_another_latent_is_refused(table):
    with pytest.raises(ValueError, match="latent='both' is not known"):
        latent_groups(table, "both")


TRAINING = [
    {"user_age": 20, "user_sex": "M", "device": "phone", "member": True},
    {"user_age": 40, "user_sex": "F", "device": "phone", "member": False},
    {"user_sex": "F"},
]


def test_numbers_are_standardised_and_categories_one_hot():
    encoder = MetadataEncoder.fit(TRAINING)
    assert encoder.feature_names == [
        *("device=phone", "member=False", "member=True", "user_age", "user_sex=F", "user_sex=M"),
    ]
    expected = [[1, 0, 1, -1, 0, 1], [1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]]
    features = encoder.encode(TRAINING)
    assert features.dtype == np.float32
    assert features.tolist() == expected


def test_unseen_values_and_wrong_kinds_are_zeros():
    encoder = MetadataEncoder.fit(TRAINING)
    assert encoder.encode([{"device": "watch", "user_age": "old", "new_field": 1, "user_sex": None}]).tolist() == [
        [0] * 6
    ]
    assert encoder.encode([]).shape == (0, 6)


def test_a_constant_number_stays_zero_and_categories_are_capped():
    assert MetadataEncoder.fit([{"a": 3}, {"a": 3}]).encode([{"a": 3}]).tolist() == [[0]]
    values = [{"a": f"v{i}"} for i in range(100)] + [{"a": "v99"}]
    encoder = MetadataEncoder.fit(values)
    assert len(encoder) == MAX_CATEGORIES
    assert "a=v99" in encoder.feature_names


def test_user_fields_alone_where_the_gate_must_be_constant_within_a_user():
    encoder = MetadataEncoder.fit(TRAINING, user_fields_only=True)
    assert encoder.feature_names == ["user_age", "user_sex=F", "user_sex=M"]
    with pytest.raises(ValueError, match=r"needs 'user_\*' fields in the column 'metadata'"):
        MetadataEncoder.fit([{"device": "phone"}], user_fields_only=True)


def test_the_encoder_survives_json():
    encoder = MetadataEncoder.fit(TRAINING)
    again = MetadataEncoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    assert np.array_equal(again.encode(TRAINING), encoder.encode(TRAINING))
    with pytest.raises(ValueError, match="format_version 7"):
        MetadataEncoder.from_dict({"format_version": 7, "fields": []})


def test_what_leaves_no_trace_in_the_features_is_named():
    encoder = MetadataEncoder.fit([{"age": 20, "taste": "sweet"}, {"age": 30, "taste": "sour"}])
    assert encoder.ignored({"age": 25, "taste": "sour"}) == []
    entry = {"aeg": 25, "age": "old", "taste": "salty"}
    assert encoder.ignored(entry) == ["aeg", "age=old", "taste=salty"]
    assert not encoder.encode([entry]).any()
