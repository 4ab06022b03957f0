"""How numbers, tables and foreign text look."""

from __future__ import annotations

import pytest
from rowmill.streams.cli import output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4211, "0.42 s"), (12.34, "12.3 s"), (185, "3 min 05 s"), (59.99, "60.0 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    """A duration has the precision that its length deserves."""
    assert output.duration(seconds) == text


def test_sizes_and_plurals() -> None:
    """Bytes in binary units, thousands with separators, one thing without an s."""
    assert [output.size(n) for n in (12, 2048, 3 << 30, 5 << 40)] == ["12 B", "2.0 KiB", "3.0 GiB", "5.0 TiB"]
    assert [output.plural(n, "row") for n in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]


def test_a_table_is_aligned_and_cut_at_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers stand flush right, and only the last column gives way to the terminal's width."""
    monkeypatch.setenv("COLUMNS", "60")
    text = output.table([("a", "n", "x"), ("bbb", "1,000", "y" * 99)], right=[1], indent="  ")
    first, second = text.splitlines()
    assert first == "  a        n  x"
    assert second.startswith("  bbb  1,000  yyy")
    assert second.endswith("y…")
    assert len(second) == 60


def test_foreign_text_cannot_steer_the_terminal() -> None:
    """Escape sequences and line breaks in data do not reach the terminal."""
    assert output.plain("a\x1b[2Jb\nc\td") == "a�[2Jb c d"


def test_commands_can_be_pasted() -> None:
    """A suggested command is quoted for the shell, and leaves out what is not given."""
    assert output.command("rowmill", "run", "my job.py", None, "") == "rowmill run 'my job.py'"
