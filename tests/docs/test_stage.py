"""The pages of the site: every link leads somewhere, inside docs or out of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def docs_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))


def test_every_link_of_the_site_leads_somewhere(tmp_path: Path) -> None:
    from stage import links, stage

    pages = [page for page in stage(tmp_path / "site") if page.suffix == ".md"]
    assert {page.name for page in DOCS.glob("*.md")} <= {page.name for page in pages}
    staged = sorted((tmp_path / "site").rglob("*.md"))
    assert len(staged) == len(pages)
    for page in staged:
        for link in links(page.read_text(encoding="utf-8")):
            found = (page.parent / link).resolve()
            assert found.is_file(), f"{page}: {link}"
            assert tmp_path.resolve() in found.parents, f"{page}: {link} leaves the site"


def test_links_out_of_docs_follow_their_file_and_broken_ones_are_named(tmp_path: Path) -> None:
    from stage import stage

    (tmp_path / "docs").mkdir()
    (tmp_path / "recipes" / "one").mkdir(parents=True)
    (tmp_path / "recipes" / "one" / "README.md").write_text("[back](../../docs/a.md#top) ![p](p.svg)", encoding="utf-8")
    (tmp_path / "recipes" / "one" / "p.svg").write_text("<svg/>", encoding="utf-8")
    text = "[one](../recipes/one/README.md) [web](https://x.org/a.md)\n```\n[code](nowhere.md)\n```\n"
    (tmp_path / "docs" / "a.md").write_text(text, encoding="utf-8")
    stage(tmp_path / "site", tmp_path)
    page = (tmp_path / "site" / "a.md").read_text(encoding="utf-8")
    assert "[one](repository/recipes/one/README.md) [web](https://x.org/a.md)" in page
    inner = (tmp_path / "site" / "repository" / "recipes" / "one" / "README.md").read_text(encoding="utf-8")
    assert inner == "[back](../../../a.md#top) ![p](p.svg)"
    assert (tmp_path / "site" / "repository" / "recipes" / "one" / "p.svg").is_file()

    (tmp_path / "docs" / "b.md").write_text("[lost](lost.md) [gone](../gone/x.py)", encoding="utf-8")
    with pytest.raises(ValueError, match=r"docs/b\.md: no file lost\.md\ndocs/b\.md: no file \.\./gone/x\.py"):
        stage(tmp_path / "site", tmp_path)


def test_every_page_has_its_place_in_the_menu() -> None:
    menu = (DOCS.parent / "zensical.toml").read_text(encoding="utf-8")
    named = set(re.findall(r'"([\w-]+\.md)"', menu))
    assert named == {page.name for page in DOCS.glob("*.md")}
