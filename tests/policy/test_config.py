"""mixture_config.json: round trip, and clear refusals."""

from __future__ import annotations

import json

import pytest

from prefmix.policy.config import FORMAT_VERSION, PolicyConfig


def config(**fields):
    return PolicyConfig(
        **{"beta": (0.1, 0.2), "latent": "user", "base_source": "a/b", "base_sha256": "c" * 64} | fields
    )


def test_round_trip():
    written = config(
        label_noise=0.1, experts={"kind": "shared_base"}, gate={"terms": ["global"]}, provenance={"seed": 1}
    )
    assert PolicyConfig.from_json(written.to_json()) == written
    assert written.num_experts == 2 and json.loads(written.to_json())["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 99}, "format_version=99"),
        ({"format_version": None}, "format_version=None"),
        ({"colour": "red"}, r"unknown fields \['colour'\]"),
        ({"latent": "auto"}, "latent='auto'"),
        ({"beta": [0.1, -1]}, "beta="),
        ({"label_noise": 0.5}, "label_noise=0.5"),
    ],
)
def test_what_cannot_be_read_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig.from_json(json.dumps(json.loads(config().to_json()) | change))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_broken_files_are_refused(text):
    with pytest.raises(ValueError, match="mixture_config.json"):
        PolicyConfig.from_json(text)


def test_missing_fields_are_named():
    values = json.loads(config().to_json())
    del values["beta"]
    with pytest.raises(ValueError, match=r"missing fields \['beta'\]"):
        PolicyConfig.from_json(json.dumps(values))
