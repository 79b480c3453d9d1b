"""Who judged: latent groups of comparisons, and the metadata of users and contexts as features of a gate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from prefmix.data.comparisons import ComparisonTable
from prefmix.data.schema import USER_FIELD_PREFIX

# Beyond the commonest values a field is free text, not a category.
MAX_CATEGORIES = 64


def latent_groups(table: ComparisonTable, latent: Literal["pair", "user", "membership"]) -> np.ndarray:
    """[B] int64: which latent variable each comparison shares.

    `pair`: group i is row i, G = B. `user` and `membership`: group u is user u of `table.users`, and each row without a
    user is a group of its own after them, G = U + rows without a user. Users without a row in this table keep their
    (empty) group, so that the index means the same for training and evaluation.
    """
    if latent == "pair":
        return np.arange(len(table), dtype=np.int64)
    if latent not in ("user", "membership"):
        raise ValueError(f"latent={latent!r} is not known. Use 'pair', 'user' or 'membership'.")
    anonymous = table.user < 0
    group = table.user.astype(np.int64, copy=True)
    group[anonymous] = len(table.users) + np.arange(anonymous.sum())
    return group


def num_latent_groups(table: ComparisonTable, latent: Literal["pair", "user", "membership"]) -> int:
    """G of `latent_groups`, empty groups of users without a row included."""
    return len(table) if latent == "pair" else len(table.users) + int((table.user < 0).sum())


@dataclass(frozen=True)
class _NumericField:
    name: str
    mean: float
    scale: float


@dataclass(frozen=True)
class _CategoricalField:
    name: str
    values: tuple[str, ...]


class MetadataEncoder:
    """Metadata mappings as features [B, M], fitted on training rows.

    Numbers are standardised; text and true/false are one-hot over the values seen (the 64 commonest). Missing fields
    and unseen values are zeros: the mean of a number, no category.
    """

    FORMAT_VERSION = 1

    def __init__(self, fields: Sequence[_NumericField | _CategoricalField]) -> None:
        self._fields = tuple(fields)

    @classmethod
    def fit(cls, metadata: Sequence[Mapping[str, Any]], *, user_fields_only: bool = False) -> MetadataEncoder:
        """Learns fields, categories and scales.

        Args:
            metadata: one mapping for each training comparison.
            user_fields_only: keep `user_*` fields only, which are constant within a user (`latent="user"`).

        Raises:
            ValueError: where no field is left.
        """
        names = sorted({name for row in metadata for name in row})
        if user_fields_only:
            names = [name for name in names if name.startswith(USER_FIELD_PREFIX)]
        if not names:
            kind = f"'{USER_FIELD_PREFIX}*' fields" if user_fields_only else "fields"
            raise ValueError(
                f"gate term 'metadata' needs {kind} in the column 'metadata', and the rows have none. Add them, or "
                "leave 'metadata' out of `gate`."
            )
        return cls([_fit_field(name, [row[name] for row in metadata if row.get(name) is not None]) for name in names])

    @property
    def feature_names(self) -> list[str]:
        """M names, `field` or `field=value`."""
        names = []
        for field in self._fields:
            if isinstance(field, _NumericField):
                names.append(field.name)
            else:
                names.extend(f"{field.name}={value}" for value in field.values)
        return names

    @property
    def field_names(self) -> list[str]:
        """F names of fields."""
        return [field.name for field in self._fields]

    @property
    def field_of_feature(self) -> list[int]:
        """M places in `field_names`."""
        widths = [1 if isinstance(field, _NumericField) else len(field.values) for field in self._fields]
        return [place for place, width in enumerate(widths) for _ in range(width)]

    def __len__(self) -> int:
        return len(self.feature_names)

    def ignored(self, entry: Mapping[str, Any]) -> list[str]:
        """What of one mapping leaves no trace in its features: `field` where nobody had it, `field=value` if unseen."""
        known = {field.name: field for field in self._fields}
        found = []
        for name, value in entry.items():
            field = known.get(name)
            if field is None:
                found.append(name)
            elif isinstance(field, _NumericField):
                found += [] if _is_number(value) else [f"{name}={value}"]
            else:
                found += [] if str(value) in field.values else [f"{name}={value}"]
        return found

    def encode(self, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """[B, M] float32 features."""
        features = np.zeros((len(metadata), len(self)), dtype=np.float32)
        column = 0
        for field in self._fields:
            if isinstance(field, _NumericField):
                for row, entry in enumerate(metadata):
                    features[row, column] = _standardised(entry.get(field.name), field)
                column += 1
            else:
                position = {value: column + i for i, value in enumerate(field.values)}
                for row, entry in enumerate(metadata):
                    hit = position.get(str(entry.get(field.name)))
                    if hit is not None and entry.get(field.name) is not None:
                        features[row, hit] = 1.0
                column += len(field.values)
        return features

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        fields = [
            {"name": f.name, "mean": f.mean, "scale": f.scale}
            if isinstance(f, _NumericField)
            else {"name": f.name, "values": list(f.values)}
            for f in self._fields
        ]
        return {"format_version": self.FORMAT_VERSION, "fields": fields}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> MetadataEncoder:
        """The encoder that `to_dict` described."""
        if state.get("format_version") != cls.FORMAT_VERSION:
            raise ValueError(
                f"metadata encoder has format_version {state.get('format_version')!r}, this version of prefmix reads "
                f"{cls.FORMAT_VERSION}. Install the version that wrote it."
            )
        return cls(
            [
                _CategoricalField(f["name"], tuple(f["values"]))
                if "values" in f
                else _NumericField(f["name"], f["mean"], f["scale"])
                for f in state["fields"]
            ]
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fit_field(name: str, values: Sequence[Any]) -> _NumericField | _CategoricalField:
    if values and all(_is_number(value) for value in values):
        numbers = np.array(values, dtype=np.float64)
        # A constant field carries nothing: scale 1 keeps it at zero for every training row.
        return _NumericField(name, float(numbers.mean()), float(numbers.std()) or 1.0)
    common = Counter(str(value) for value in values).most_common(MAX_CATEGORIES)
    return _CategoricalField(name, tuple(sorted(value for value, _ in common)))


def _standardised(value: Any, field: _NumericField) -> float:
    if not _is_number(value) or not math.isfinite(value):
        return 0.0
    return (value - field.mean) / field.scale
