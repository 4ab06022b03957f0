"""docs/cli.md against the parsers: every command and option is described, none that is not there, examples parse."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from rowmill.streams.cli.main import build_parser

DOCS = Path(__file__).parents[3] / "docs"
TEXT = (DOCS / "cli.md").read_text(encoding="utf-8")
SECTIONS = {
    found[1]: part
    for part in re.split(r"^(?=## )", TEXT, flags=re.MULTILINE)
    if (found := re.match(r"## rowmill (\w+)", part))
}
COMMON = {"--help", "--broker", "--verbose", "--quiet", "--log-format"}


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parsers by command."""
    (choices,) = [a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(choices)


def options(parser: argparse.ArgumentParser) -> set[str]:
    """A command's long options, those of its actions (``dlq list``) included."""
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(options, action.choices.values()))
        found |= {name for name in action.option_strings if name.startswith("--")}
    return found


def section(command: str) -> str:
    """What the page says of a command; ``pause``, ``resume`` and ``cancel`` share theirs."""
    for title, text in SECTIONS.items():
        if title == command or f"rowmill {command}" in text.partition("\n")[0]:
            return text
    raise AssertionError(f"docs/cli.md has no section '## rowmill {command}'")


@pytest.mark.parametrize("command", commands())
def test_every_option_is_described(command: str) -> None:
    """Each option of a command stands in its section, or among those that are common to all."""
    named = set(re.findall(r"--[a-z][a-z-]*", section(command)))
    assert options(commands()[command]) - COMMON <= named


@pytest.mark.parametrize("command", commands())
def test_no_option_is_made_up(command: str) -> None:
    """What the tables of a section name exists."""
    rows = [line.split("|")[1] for line in section(command).splitlines() if line.startswith("| `-")]
    named = {name for row in rows for name in re.findall(r"--[a-z][a-z-]*", row)}
    assert named <= options(commands()[command])


def examples() -> Iterator[str]:
    """The command lines that the pages show."""
    for page in sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]):
        blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for line in "\n".join(blocks).splitlines():
            found = re.match(r"(?:\$ |  )?(rowmill [a-z].*)", line)
            if found and "…" not in found[1]:
                yield found[1]


@pytest.mark.parametrize("line", sorted(set(examples())))
def test_examples_parse(line: str) -> None:
    """Every command line in the docs is one that the parsers take."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>&")
    lexer.whitespace_split = True
    words = list(itertools.takewhile(lambda word: not set(word) & set("|>&"), lexer))
    build_parser().parse(words[1:])


def test_every_command_has_an_example_that_was_run() -> None:
    """Each section shows at least one command line with what it printed."""
    missing = [
        command
        for command in commands()
        if not re.search(rf"^\$ (?:[A-Z_]+=\S+ )?rowmill {command}\b", section(command), flags=re.MULTILINE)
    ]
    assert missing == []
