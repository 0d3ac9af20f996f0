"""What the pages show works: request files are taken, commands are understood, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from cluster.cli import app
from jobs.allowance import Allowance
from jobs.request_files.local_folders import LocalFolders
from jobs.request_files.reading import Origin, read_requests, read_text
from tests.contract.test_folders import ADAPTER
from tests.releases import write_files

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "compatibility.md"),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}


def blocks(language):
    return [
        (name, block)
        for name, text in TEXTS.items()
        for block in re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    ]


REQUEST_FILES = blocks("yaml")
COMMANDS = [
    line.split("#")[0] for _, block in blocks("sh") for line in block.splitlines() if line.startswith("mergefleet ")
]


def test_the_readme_is_one_page():
    assert len(TEXTS["README.md"].splitlines()) <= 150


@pytest.mark.parametrize(("name", "text"), REQUEST_FILES)
def test_request_files_are_taken(name, text, tmp_path):
    path = tmp_path / "requests.yaml"
    if not any(each in text for each in ("defaults:", "base:", "bases:")):
        pytest.fail(f"{name}: not a request file, and no test knows what else it is")
    path.write_text(text)
    for step in (500, 1000):
        write_files(tmp_path / "runs" / "support" / f"checkpoint-{step}", ADAPTER)
    reading = read_requests(read_text(path), Origin.of(path), Allowance(), LocalFolders())
    assert reading.requests
    assert "checkpoint-*" not in text or len(reading.requests) == 2


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line):
    words = shlex.split(line)[1:]
    group = typer.main.get_command(app)
    if words == ["--version"]:
        assert "--version" in {option for each in group.params for option in each.opts}
        return
    command = group.commands[words[0]]
    command.make_context(words[0], words[1:]).close()


def test_there_are_examples():
    assert len(REQUEST_FILES) >= 4
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    page = ROOT / name
    targets = re.findall(r"\]\(([^)\s]+)\)", TEXTS[name])
    missing = []
    for target in targets:
        place, _, anchor = target.partition("#")
        if "://" in place:
            continue
        found = page.parent / place if place else page
        if not found.exists() or (anchor and anchor not in anchors(found.read_text())):
            missing.append(target)
    assert missing == []


def anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name):
    places = re.findall(r"`((?:jobs|workers|cluster|tests|benchmarks|examples|docs)/[\w./-]*)`", TEXTS[name])
    assert [place for place in places if not (ROOT / place).exists()] == []
