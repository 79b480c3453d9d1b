"""The fields that help and recipes show are the fields that MixtureConfig has."""

import dataclasses
from pathlib import Path

from prefmix.cli.config_page import config_page
from prefmix.cli.fields import all_fields
from prefmix.cli.train_help import help_text


def test_fields_equal_the_real_dataclass() -> None:
    """Parsed from source text without importing torch, and still the same names and defaults."""
    from prefmix.training.config import MixtureConfig

    real = {item.name: item for item in dataclasses.fields(MixtureConfig) if item.init}
    shown = {name: doc for name, doc in all_fields().items() if doc.origin != "data" or name == "output_dir"}
    assert set(shown) == set(real)
    for name, doc in shown.items():
        if real[name].default is not dataclasses.MISSING and doc.default is not None:
            assert doc.default == real[name].default, name


def test_every_field_has_help_and_help_names_every_field() -> None:
    assert all(doc.help for doc in all_fields().values())
    text = help_text(every_field=True)
    assert all(f"--{name} " in text for name in all_fields())


def test_short_help_is_short() -> None:
    assert len(help_text(every_field=False).splitlines()) < 200


def test_the_page_of_the_fields_is_up_to_date() -> None:
    """A field is documented once; `make docs` writes the page."""
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == config_page()
