"""Wrong usage of the command line: exit code 2, one clear message that names the setting and what to do."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from rowmill.streams.cli.cmd_worker import _options
from rowmill.streams.cli.main import build_parser, main

MISTAKES = [
    # words, what the message must name, what the remedy must say
    ("wroker reviews.py", "wroker", "did you mean 'worker'?"),
    ("zzz", "zzz", "commands are run, worker"),
    ("run", "PIPELINE", "run --help"),
    ("run reviews.py --ouput x.csv", "--ouput", "did you mean '--output'?"),
    ("run reviews.py --out x.csv", "--out", "run --help"),
    ("run review.py", "review.py", "did you mean 'reviews.py'?"),
    ("run nowhere/reviews.py", "nowhere", "there is no folder"),
    ("run reviews", "PIPELINE", "did you mean 'reviews.py'?"),
    ("run a-b:c", "PIPELINE", "write file.py, file.py:name or module:name"),
    ("run folder.py", "folder.py", "name the file in it"),
    ("run reviews.py:other", "other", "its pipelines are reviews"),
    ("run reviews.py:review", "review", "did you mean 'reviews'?"),
    ("run reviews.py:Pipeline", "Pipeline", "its pipelines are reviews"),
    ("run none.py", "none.py", 'none = Pipeline("none")'),
    ("run two.py", "a, b", "two.py:a"),
    ("run nosuchmodule:p", "nosuchmodule", "here or installed"),
    ("run empty.py", "stage", "add at least one stage"),
    ("run reviews.py --input missing.csv", "missing.csv", "No such file"),
    ("run reviews.py --input reviews.txt", "reviews.txt", "known endings are"),
    ("run reviews.py --input reviews.csv --key nope", "nope", "id, text"),
    ("run reviews.py --key id", "--key", "give --input"),
    ("run reviews.py --input reviews.csv --output reviews.csv", "--output", "choose another"),
    ("run reviews.py --output x.doc", "x.doc", "known endings are"),
    ("run reviews.py --output nowhere/x.csv", "nowhere", "make it first"),
    ("run reviews.py --session a.b", "--session", "no dots"),
    ("run reviews.py --input reviews.csv --session live", "--session", "choose another"),
    ("run reviews.py --partitions 0", "--partitions", "whole number from 1"),
    ("run reviews.py --partitions many", "--partitions", "whole number from 1"),
    ("run reviews.py --max-errors -1", "--max-errors", "whole number from 0"),
    ("run reviews.py --commit-interval nan", "--commit-interval", "seconds from 0"),
    ("run reviews.py --commit-rows 0", "--commit-rows", "whole number from 1"),
    ("run reviews.py --broker redis://x", "broker", "local://DIR or kafka://"),
    ("run reviews.py --broker kafka://x", "host:port", "kafka://host:port"),
    ("worker reviews.py --stall-timeout 0", "--stall-timeout", "seconds above 0"),
    ("worker reviews.py --max-in-flight 0", "--max-in-flight", "whole number"),
    ("worker reviews.py --session a.b", "session", "no dots"),
    ("publish bad!topic reviews.csv", "TOPIC", "use 1 to 249"),
    ("publish rowmill.x reviews.csv", "TOPIC", "rowmill's own"),
    ("publish t missing.csv", "missing.csv", "No such file"),
    ("consume t --from yesterday", "--from", "2026-01-31T12:00"),
    ("consume t --from=-1", "--from", "an offset"),
    ("consume t --limit 0", "--limit", "whole number from 1"),
    ("consume t --follow -o x.csv", "--follow", "add --limit"),
    ("consume t -o x.doc", "x.doc", "known endings are"),
    ("consume t --partition 9", "--partition", "partitions 0 to 3"),
    ("topics --delete t", "--delete", "add --yes"),
    ("topics --yes", "--yes", "--delete NAME"),
    ("topics --partitions 3", "--partitions", "--create NAME"),
    ("topics --create a --delete b", "--create", "two commands"),
    ("topics --create rowmill.x", "--create", "rowmill's own"),
]

FILES = {
    "reviews.py": "from rowmill import Pipeline\nreviews = Pipeline('reviews').add(dict)\n",
    "none.py": "x = 1\n",
    "two.py": "from rowmill import Pipeline\na = Pipeline('a')\nb = Pipeline('b')\n",
    "empty.py": "from rowmill import Pipeline\np = Pipeline('p')\n",
    "reviews.csv": "id,text\n1,a\n",
    "reviews.txt": "x\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files to make mistakes with; one folder for the whole table, because no mistake may change anything."""
    path = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (path / name).write_text(text)
    (path / "folder.py").mkdir()
    assert main(["-q", "topics", "--create", "t", "--broker", f"local://{path}/.rowmill"]) == 0
    return path


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("ROWMILL_BROKER", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("reviews", "none", "two", "empty"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(("words", "named", "remedy"), MISTAKES, ids=[words for words, *_ in MISTAKES])
def test_a_mistake_is_explained(words: str, named: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, the setting and the remedy on standard error, no traceback, and no work done."""
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rowmill: error: ")
    assert named in err
    assert remedy in err
    assert "Traceback" not in err


FAILURES = [
    ("consume nope", "no topic 'nope'", "rowmill topics"),
    ("topics --delete tt --yes", "no topic 'tt'", "did you mean 't'?"),
    ("topics --create t", "exists", "not changed"),
    ("publish nope reviews.csv --no-create-topics", "nope", "does not exist"),
    ("worker reviews.py --no-create-topics", "reviews", "does not exist"),
    ("topics --broker kafka://127.0.0.1:1", "kafka://127.0.0.1:1", "check the address"),
    ("run reviews.py --broker kafka://127.0.0.1:1", "kafka://127.0.0.1:1", "check the address"),
]


@pytest.mark.parametrize(("words", "named", "remedy"), FAILURES, ids=[words for words, *_ in FAILURES])
def test_what_the_broker_refuses_is_no_usage_error(
    words: str, named: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 for what is right in itself and fails on this broker, with the same kind of message."""
    assert main(words.split()) == 1
    err = capsys.readouterr().err
    assert "rowmill: error: " in err
    assert named in err
    assert remedy in err
    assert "Traceback" not in err


def test_the_clients_own_noise_is_kept_back(capsys: pytest.CaptureFixture[str]) -> None:
    """The Kafka client logs every failed connection; beside our one clear error that is only confusing."""
    main(["topics", "--broker", "kafka://127.0.0.1:1"])
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert logging.getLogger("aiokafka").level == logging.CRITICAL
    main(["-vv", "topics"])
    assert logging.getLogger("aiokafka").level == logging.INFO
    main(["topics"])


def test_what_a_worker_is_told_reaches_it() -> None:
    """Options that only show under load."""
    words = "worker reviews.py --max-in-flight 7 --threads 3 --max-deaths 0 --guarantee at-least-once"
    options = _options(build_parser().parse_args(words.split()))
    told = (options.max_in_flight, options.threads, options.max_deaths, options.guarantee)
    assert told == (7, 3, 0, "at_least_once")
