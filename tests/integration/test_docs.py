"""The documentation's Python runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["docs/python.md"])
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    """All Python blocks of a page, one after the other, in an empty folder."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks).replace("call_later(5,", "call_later(1,"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "total_rows=10000" in done.stdout
    assert "total_rows=2, processed_rows=2" in done.stdout
