"""The Markdown files whose words and code are tested, and their parts."""

import importlib
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = [Block(*match.groups()) for match in _FENCE.finditer(page.read_text())]
    return [block for block in found if language in (None, block.language)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def in_repository(path: str) -> Path:
    """Where a path from the repository's root lies; packages may be installed elsewhere, when the wheel is tested."""
    top, _, rest = path.partition("/")
    if top in ("cce_torchrec", "dlrm_example", "launch"):
        return Path(importlib.import_module(top).__path__[0]) / rest
    return ROOT / path


def relative_to_root(page: Path, target: str) -> str:
    """A link of a page as a path from the repository's root."""
    return str((page.parent / target).resolve().relative_to(ROOT))
