"""Gathers what the site shows: docs/, and every file of the repository that its pages link to, one way or another.

    python docs/stage.py build/docs      # `make docs` does, then builds the site

Pages link to files of the repository by relative paths, which work on a code host. On the site those files stand under
`repository/`, links point there, and a link to nothing is an error here.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def stage(output: Path, root: Path = ROOT) -> list[Path]:
    """Writes pages and linked files below `output`, which is replaced; returns what it read, pages first.

    Raises:
        ValueError: links to files that do not exist, all of them, with the page.
    """
    shutil.rmtree(output, ignore_errors=True)
    waiting, seen, problems = sorted((root / "docs").glob("*.md")), [], []
    while waiting:
        source = waiting.pop(0)
        if source in seen:
            continue
        seen.append(source)
        target = output / place(source, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".md":
            shutil.copy(source, target)
            continue
        text = source.read_text(encoding="utf-8")
        for link in links(text):
            found = resolve(source, link)
            if not found.exists():
                problems.append(f"{source.relative_to(root)}: no file {link}")
            elif found not in seen:
                waiting.append(found)
        target.write_text(_rewritten(text, source, root), encoding="utf-8")
    if problems:
        raise ValueError("\n".join(problems))
    return seen


def links(text: str) -> Iterator[str]:
    """Targets of relative links outside code blocks."""
    for match in _LINK.finditer(_CODE.sub("", text)):
        if ":" not in match[2]:
            yield match[2]


def resolve(page: Path, link: str) -> Path:
    """The file that a link means; a folder means its README."""
    found = Path(os.path.normpath(page.parent / link))
    return found / "README.md" if found.is_dir() else found


def place(source: Path, root: Path = ROOT) -> Path:
    """Where a file stands on the site."""
    docs = root / "docs"
    return source.relative_to(docs) if docs in source.parents else Path("repository") / source.relative_to(root)


def _rewritten(text: str, source: Path, root: Path) -> str:
    here = place(source, root).parent

    def moved(match: re.Match[str]) -> str:
        if ":" in match[2]:
            return match[0]
        found = resolve(source, match[2])
        return f"{match[1]}{os.path.relpath(place(found, root), here)}{match[3]}" if found.exists() else match[0]

    return _LINK.sub(moved, text)


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
