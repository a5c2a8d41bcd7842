"""What the README and docs/ speak of exists: links, headings, files, commands, flags, methods, results."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import frontier
from cce_torchrec import METHODS
from dlrm_example.cli import parse_config
from dlrm_example.sweep.cli import parse_sweep
from tests.docs.fill_readme import fill
from tests.docs.markdown import PAGES, ROOT, blocks, in_repository, prose, relative_to_root

README = ROOT / "README.md"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE_CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?:[\w.-]+/)+[\w.-]+\.(?:py|md|json|png|txt|toml)|(?:tests|docs|benchmarks|requirements)(?:/\w+)*")
COMMAND = re.compile(r"(?:make|\S*python|\S*torchrun) .*")
MADE_BY_RUNNING = "runs/"


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """Shell commands: lines of bash blocks, and inline code that looks like one."""
    lines = [line for block in blocks(page, "bash") for line in block.text.splitlines()]
    lines += [code for code in INLINE_CODE.findall(prose(page)) if COMMAND.fullmatch(code)]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = in_repository(relative_to_root(page, target)) if target else page
        assert path.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to the heading {link}"


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = [code for code in INLINE_CODE.findall(prose(page)) if FILE.fullmatch(code)]
    to_be_written = {"cce_torchrec/methods/two_tables.py"}  # by the reader of docs/add_a_method.md
    for name in named:
        if not name.startswith(MADE_BY_RUNNING) and name not in to_be_written:
            assert in_repository(name).exists(), f"{page.name} speaks of {name}"


@every_page
def test_commands_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(page):
        if command[0] == "make":
            assert command[1] in targets, command
        elif command[0] == "torchx":
            continue  # tests/launch/test_pages.py
        elif "-m" in command:
            assert importlib.util.find_spec(command[command.index("-m") + 1]), command
        else:
            assert in_repository(command[1]).exists(), command


@every_page
def test_flags_of_the_example_exist(page: Path) -> None:
    for command in commands(page):
        if "dlrm_example.train" in command:
            flags = command[command.index("dlrm_example.train") + 1 :]
            if "--print_config" in flags or flags == ["--preset", "list"]:
                with pytest.raises(SystemExit, match="0"):
                    parse_config(flags)
                continue
            config = parse_config(flags)
            assert config.run_dir.startswith(MADE_BY_RUNNING), "where .gitignore looks"
        if "dlrm_example.sweep" in command:
            flags = command[command.index("dlrm_example.sweep") + 1 :]
            sweep = parse_sweep(flags[: flags.index(">")] if ">" in flags else flags)
            assert sweep.runs()
            assert sweep.run_dir.startswith(MADE_BY_RUNNING)


@every_page
def test_every_page_is_in_the_index(page: Path) -> None:
    if page.parent.name == "docs" and page.name != "index.md":
        assert f"]({page.name})" in (ROOT / "docs" / "index.md").read_text()


def test_the_frontier_is_what_the_sweeps_say() -> None:
    level = frontier.full_tables()
    assert frontier.page(level) == (frontier.RESULTS / "frontier.md").read_text(), "run: python -m benchmarks.frontier"
    sweep = (frontier.RESULTS / "sweep_million.md").read_text()
    assert f"test {frontier.LEAST}" in sweep
    assert re.search(rf"`full` .* {level.mean:.4f} ± {level.spread:.4f} ", sweep)


def test_methods_in_the_readme_are_the_registrys() -> None:
    section = README.read_text().split("## Methods")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` ", section, re.MULTILINE)
    assert rows == [(key, method.__name__) for key, method in METHODS.items()]


def test_the_table_of_results_is_the_recorded_one(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text())
    fill(copy)
    assert copy.read_text() == README.read_text(), "run: python -m tests.docs.fill_readme"
    assert copy.read_text().count("movielens_8x:start") == 1


def test_pictures_are_small() -> None:
    assert all(picture.stat().st_size < 200_000 for picture in (ROOT / "docs").rglob("*.png"))
