"""From PIPELINE to a Pipeline: whose folder is imported from, and how the user's own errors are shown."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rowmill.state.errors import ConfigError
from rowmill.streams.cli.load import UserCodeError, load_pipeline
from rowmill.streams.cli.main import main

SOURCE = "from rowmill import Pipeline\np = Pipeline('p').add(dict)\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_file_a_name_and_a_module(here: Path) -> None:
    """The three forms find the same pipeline."""
    (here / "jobs").mkdir()
    (here / "jobs" / "scoring.py").write_text(SOURCE + "q = Pipeline('q')\n")
    assert load_pipeline("jobs/scoring.py:p").name == "p"
    assert load_pipeline(f"{here}/jobs/scoring.py:q").name == "q"
    assert load_pipeline("jobs.scoring:q").name == "q"


def test_two_names_of_one_pipeline_are_one(here: Path) -> None:
    """An alias does not make the choice unclear."""
    (here / "alias.py").write_text(SOURCE + "main = p\n")
    assert load_pipeline("alias.py").name == "p"


@pytest.mark.parametrize("name", ["rowmill.py", "logging.py", "queue.py", "my-job.py", "pytest.py"])
def test_a_file_may_be_called_like_a_library(here: Path, name: str) -> None:
    """A pipeline's file never replaces a module that is there already, nor one of the standard library's."""
    (here / name).write_text(SOURCE)
    assert load_pipeline(name).name == "p"
    import logging
    import queue

    assert callable(logging.getLogger)
    assert callable(queue.Queue)


def test_the_folder_is_first_while_loading_and_last_afterwards(here: Path) -> None:
    """Neighbours win while the file runs; later they are still found, behind everything that is installed."""
    (here / "first.py").write_text("import sys\nplace = sys.path[0]\n" + SOURCE)
    load_pipeline("first.py")
    assert sys.modules["first"].place == str(here)
    assert sys.path[0] != str(here)
    assert sys.path[-1] == str(here)


def test_the_users_packages_do_not_collide_with_ours(here: Path) -> None:
    """A project with its own handlers, state and streams packages runs, in a process of its own, from elsewhere."""
    project = here / "project"
    for package in ("handlers", "state", "streams"):
        (project / package).mkdir(parents=True)
        (project / package / "__init__.py").write_text(f"NAME = 'my {package}'\n")
        (project / package / "errors.py").write_text("class RowmillError(Exception): pass\n")
    (project / "job.py").write_text(
        "import handlers, state, streams\n"
        "from handlers.errors import RowmillError\n"
        "from rowmill import Pipeline\n"
        "p = Pipeline('p')\n"
        "@p.stage\n"
        "def tell(row):\n"
        "    from state import NAME\n"
        "    return {'names': [handlers.NAME, NAME, streams.NAME], 'where': RowmillError.__module__}\n"
    )
    (here / "in.jsonl").write_text("{}\n")
    words = ["run", "project/job.py", "--input", "in.jsonl", "--output", "-", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; from rowmill.streams.cli.main import main; sys.exit(main({words!r}))"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=here,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == '{"names":["my handlers","my state","my streams"],"where":"handlers.errors"}\n'


def test_an_exception_in_the_users_file_shows_the_way_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """File, line, type and message, and the user's own frames only: neither ours nor the libraries'."""
    (here / "helper.py").write_text("import json\ndef parse(text):\n    return json.loads(text)\n")
    (here / "job.py").write_text("import helper\n\nhelper.parse('{')\n")
    assert main(["run", "job.py"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"rowmill: error: cannot load job.py: {here}/helper.py:3: JSONDecodeError: ")
    assert f'File "{here}/job.py", line 3, in <module>\n    helper.parse' in err
    assert f'File "{here}/helper.py", line 3, in parse' in err
    assert "json/decoder" not in err
    assert "importlib" not in err
    assert "load.py" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = (1,\n", "job.py:1: SyntaxError: '(' was never closed"),
        ("import sys\nsys.exit('no way')\n", "job.py:2: SystemExit: no way"),
        ("import not_there_at_all\n", "job.py:1: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("from rowmill import Pipeline\nPipeline('a b')\n", "job.py:2: ConfigError: Pipeline(name): got 'a b'"),
    ],
)
def test_kinds_of_exceptions(here: Path, source: str, said: str) -> None:
    """Whatever the file raises, the place in it is named."""
    (here / "job.py").write_text(source)
    with pytest.raises(UserCodeError) as caught:
        load_pipeline("job.py")
    assert said in str(caught.value)
    assert "job" not in sys.modules


def test_a_module_with_an_error_of_its_own(here: Path) -> None:
    """A module that is there but imports one that is not is the user's error, not a missing PIPELINE."""
    (here / "job.py").write_text("import not_there_at_all\n")
    with pytest.raises(UserCodeError, match="not_there_at_all"):
        load_pipeline("job:p")
    with pytest.raises(ConfigError, match="no module 'jop'"):
        load_pipeline("jop:p")
