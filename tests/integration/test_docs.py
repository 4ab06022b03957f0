"""The documentation's Python runs as it stands, and prints what it says it does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE_NAME = re.compile(r"# (\w+\.py)\n")
PRINTED = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)


def programs_of(page: str) -> dict[str, str]:
    """A page's Python by file: a block that begins with ``# name.py`` is that file, all others together one program."""
    programs: dict[str, str] = {"page.py": ""}
    for block in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        named = FILE_NAME.match(block)
        programs[named[1] if named else "page.py"] = programs.get(named[1] if named else "page.py", "") + block
    return programs


def output_of(program: str, name: str, folder: Path) -> str:
    """What a program prints when it runs in that folder."""
    path = folder / name
    path.write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(path)], cwd=folder, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_page(tmp_path: Path) -> None:
    """All Python blocks of docs/python.md, one after the other, in an empty folder."""
    program = programs_of("docs/python.md")["page.py"].replace("call_later(5,", "call_later(1,")
    printed = output_of(program, "page.py", tmp_path)
    assert "total_rows=10000" in printed
    assert "total_rows=2, processed_rows=2" in printed
    assert "\n100 100\n100\n" in printed


@pytest.mark.parametrize("name", programs_of("docs/handlers.md"))
def test_the_page_of_handlers(name: str, tmp_path: Path) -> None:
    """Each program of docs/handlers.md prints line by line what stands behind its calls of print."""
    program = programs_of("docs/handlers.md")[name]
    said = PRINTED.findall(program)
    assert program.count("print(") == len(said)
    assert output_of(program, name, tmp_path).splitlines() == said


def test_the_page_of_sessions(tmp_path: Path) -> None:
    """docs/sessions.md prints line by line what stands behind its calls of print."""
    program = programs_of("docs/sessions.md")["page.py"]
    said = PRINTED.findall(program)
    assert program.count("print(") == len(said)
    assert output_of(program, "page.py", tmp_path).splitlines() == said
