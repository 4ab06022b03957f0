"""The public API as type checkers see it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SNIPPET = Path(__file__).with_name("public_api.py")


@pytest.mark.timeout(180)
def test_mypy_agrees(tmp_path: Path) -> None:
    """mypy in strict mode accepts every line, and finds the mistakes that are marked as such."""
    snippet = tmp_path / SNIPPET.name  # away from the repository's settings, as in a user's project
    snippet.write_bytes(SNIPPET.read_bytes())
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    done = subprocess.run([*command, snippet.name], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
