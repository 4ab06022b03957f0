"""``rowmill console``: what it refuses before it connects to anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from rowmill.streams.cli import cmd_console
from rowmill.streams.cli.main import main


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder, and nothing of the console in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cmd_console.TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv("ROWMILL_BROKER", raising=False)


@pytest.mark.parametrize(
    ("words", "names", "remedy"),
    [
        ("--port 70000", "--port", "from 0 to 65535"),
        ("--port x", "--port", "from 0 to 65535"),
        ("--host 0.0.0.0", "--host", "set a token"),
        ("--host nowhere.invalid --token-file long", "--host", "no such address"),
        ("--token-file nowhere", "--token-file", "cannot be read"),
        ("--token-file empty", "--token-file", "write the token into it"),
        ("--token-file short", "token", "16 to 1,024 characters"),
        ("--broker redis://x", "broker", "local://DIR or kafka://"),
        ("--alerts nowhere.toml", "alerts", "nowhere.toml"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, names: str, remedy: str) -> None:
    """Each is a line with the setting and the remedy, and exit code 2."""
    for name, text in {"empty": "\n", "short": "0123456789abcde", "long": "0123456789abcdef"}.items():
        (tmp_path / name).write_text(text)
    assert main(["console", *words.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rowmill: error:")
    assert names in said
    assert remedy in said


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """It says who may have it, and what to give instead."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["console", "--port", str(taken.getsockname()[1])]) == 2
    assert "another process listens there" in capsys.readouterr().err


def test_the_token_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken where no file is given; an empty one is none."""
    monkeypatch.setenv(cmd_console.TOKEN_VARIABLE, "from the environment")
    assert cmd_console._token(None) == "from the environment"
    monkeypatch.setenv(cmd_console.TOKEN_VARIABLE, "")
    assert cmd_console._token(None) is None
