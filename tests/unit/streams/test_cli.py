"""The command line on the embedded broker, called in this process: what it prints, writes and returns."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rowmill.streams.cli.main import main

PIPELINE = """
from rowmill import Pipeline

reviews = Pipeline("reviews", sink="reviews.scored")

@reviews.stage
def score(row, ctx):
    if row["text"] == "bad":
        raise ValueError("cannot score \\x1b[31mthis\\nrow")
    if row["text"] == "drop":
        return None
    if row["text"] == "side":
        ctx.emit("reviews.side", row)
    return {"id": row["id"], "length": len(row["text"])}
"""
CSV = "id,text\n1,good\n2,bad\n3,drop\n4,side\n"
RESULTS = [{"id": 1, "length": 4}, {"id": 4, "length": 4}]


class Ran(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Ran]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a pipeline and its input; what the pipeline's import changed is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ROWMILL_BROKER", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "reviews.py").write_text(PIPELINE)
    (tmp_path / "reviews.csv").write_text(CSV)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call ``rowmill`` with these words."""

    def call(*words: str) -> Ran:
        code = main(words)
        return Ran(code, *capsys.readouterr())

    return call


# --- run -------------------------------------------------------------------------------------------------------


def test_run_writes_the_results_and_a_summary(run: Run, here: Path) -> None:
    """A run writes its results in the order of the input, and says on standard error what became of the rows."""
    ran = run("run", "reviews.py", "--input", "reviews.csv", "--output", "out.jsonl", "--session", "s1")
    assert ran.code == 0
    assert [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()] == RESULTS
    assert ran.out == ""
    words = " ".join(ran.err.split())
    assert "rows in 4 results 2 dropped 1 dead letters 1" in words
    assert "output out.jsonl session s1 source topic reviews.s1 sink topic reviews.scored.s1" in words
    assert "side topic reviews.side.s1" in words
    assert re.search(r"1 score ValueError \w+\.py:\d+: cannot score �\[31mthis row", words)
    assert "rowmill dlq list reviews.dlq.s1 --limit 5" in ran.err


def test_the_summary_fits_eighty_columns(run: Run, here: Path) -> None:
    """However long an error's message is, no line of the summary's tables is longer than the terminal."""
    (here / "reviews.py").write_text(PIPELINE.replace("cannot score", "cannot score " * 30))
    ran = run("run", "reviews.py", "--input", "reviews.csv", "--session", "s1")
    assert ran.code == 0
    assert max(map(len, ran.err.splitlines())) <= 80


def test_a_new_session_is_named_and_can_be_run_again(run: Run) -> None:
    """Without --session the new one's name is printed, and running it again does no row twice."""
    first = run("run", "reviews.py", "--input", "reviews.csv")
    session = first.err.split()[1]
    assert session.startswith("run-")
    again = run("run", "reviews.py", "--input", "reviews.csv", "--session", session, "--json")
    assert again.code == 0
    summary = json.loads(again.out)
    assert (summary["rows"], summary["rows_here"], summary["results"]) == (4, 0, 2)


def test_run_json_is_one_object_on_standard_output(run: Run) -> None:
    """--json gives programs the counts, topics and errors, and nothing else on standard output."""
    ran = run("run", "reviews.py", "--input", "reviews.csv", "--session", "s1", "--json", "-q")
    summary = json.loads(ran.out)
    assert ran.err == ""
    assert summary["status"] == "done"
    assert summary["topics"] == {"source": "reviews.s1", "sink": "reviews.scored.s1", "dead_letters": "reviews.dlq.s1"}
    assert (summary["processed"], summary["dropped"], summary["dead_letters"]) == (2, 1, 1)
    assert summary["errors"][0]["row"] == 1
    assert summary["broker"] == "local://.rowmill"


def test_results_on_standard_output_leave_it_to_them(run: Run) -> None:
    """With --output - the results are JSON lines there, and a JSON summary goes to standard error."""
    ran = run("run", "reviews.py", "--input", "reviews.csv", "--output", "-", "--json", "-q")
    assert ran.lines == RESULTS
    assert json.loads(ran.err)["results"] == 2


@pytest.mark.parametrize(("allowed", "code"), [("0", 1), ("1", 0)])
def test_max_errors_decides_the_exit_code(run: Run, here: Path, allowed: str, code: int) -> None:
    """More dead letters than --max-errors give exit code 1; the results are written all the same."""
    ran = run("run", "reviews.py", "--input", "reviews.csv", "--output", "out.jsonl", "--max-errors", allowed)
    assert ran.code == code
    assert ("--max-errors allows 0" in ran.err) == (code == 1)
    assert (here / "out.jsonl").exists()


def test_run_without_input_reads_the_source_topic(run: Run) -> None:
    """Without --input a run takes the live session to the present end; the next one begins there."""
    run("publish", "reviews", "reviews.csv")
    ran = run("run", "reviews.py", "--json")
    assert (ran.code, json.loads(ran.out)["rows"]) == (0, 4)
    assert json.loads(ran.out)["session"] == "live"
    again = run("run", "reviews.py", "--json")
    assert json.loads(again.out)["rows"] == 0
    assert "next:" in run("run", "reviews.py").err


def test_a_session_of_its_own_reads_the_live_source(run: Run) -> None:
    """--session without --input reads the shared source and writes to topics of its own."""
    run("publish", "reviews", "reviews.csv")
    ran = run("run", "reviews.py", "--session", "trial", "--output", "-", "--json", "-q")
    assert sorted(row["id"] for row in ran.lines) == [1, 4]
    assert json.loads(ran.err)["topics"]["sink"] == "reviews.scored.trial"


def test_a_result_file_that_fails_keeps_the_work(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When only writing the file fails, the exit code is 1 and the command to write it again is shown."""
    from rowmill.streams import outputs
    from rowmill.streams.errors import InputError

    def full(*_: object) -> int:
        raise InputError("cannot write out.csv: No space left on device")

    monkeypatch.setattr(outputs, "write_results", full)
    ran = run("run", "reviews.py", "--input", "reviews.csv", "--output", "out.csv")
    assert ran.code == 1
    assert "No space left" in ran.err
    assert "rowmill run reviews.py --input reviews.csv --output out.csv --session run-" in ran.err


def test_another_input_for_a_session_is_refused(run: Run, here: Path) -> None:
    """A session remembers its input: another one is an error that says what to do, with exit code 1."""
    run("run", "reviews.py", "--input", "reviews.csv", "--session", "s1")
    (here / "other.csv").write_text("id,text\n9,other\n")
    ran = run("run", "reviews.py", "--input", "other.csv", "--session", "s1")
    assert ran.code == 1
    assert "another session name" in ran.err


# --- publish and consume ---------------------------------------------------------------------------------------


def test_publish_says_what_it_did_and_consume_prints_it(run: Run) -> None:
    """Rows published with a key come back with it, value by value."""
    ran = run("publish", "t", "reviews.csv", "--key", "id", "--partitions", "2")
    assert ran.code == 0
    assert "4 rows published to t" in ran.err
    assert "rowmill consume t --limit 5" in ran.err
    values = run("consume", "t").lines
    assert min(values, key=lambda row: row["id"]) == {"id": 1, "text": "good"}
    records = run("consume", "t", "--with-meta").lines
    assert {record["key"] for record in records} == {"1", "2", "3", "4"}
    assert set(records[0]) == {"topic", "partition", "offset", "timestamp", "key", "headers", "value"}


def test_publish_json(run: Run, here: Path) -> None:
    """--json gives the counts, broken lines included, which are sent as they stand."""
    (here / "broken.csv").write_text("a,b\n1,2\n3\n")
    ran = run("publish", "t", "broken.csv", "--json")
    summary = json.loads(ran.out)
    assert (summary["rows"], summary["broken"]) == (2, 1)
    assert "line 3" in summary["first_error"]
    assert set(run("consume", "t").out.splitlines()) == {"3", '{"a":1,"b":2}'}
    assert "dead letters" in run("publish", "t", "broken.csv").err


def test_publish_reads_json_lines_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """FILE - takes JSON lines as they stand, with a key from a field, and a last line without its line break."""
    read, write = os.pipe()
    os.write(write, b'{"id": "a"}\n\n{"id": 2}\r\nnot json\n' + b'{"id": null, "x": "' + b"y" * 9000 + b'"}')
    os.close(write)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        ran = run("publish", "t", "-", "--key", "id", "--partitions", "1")
    assert "4 rows published" in ran.err
    records = run("consume", "t", "--with-meta").lines
    assert [record["key"] for record in records] == ["a", "2", None, None]
    assert [record["value"] for record in records][2] == "not json"


def test_no_create_topics_refuses_a_missing_one(run: Run) -> None:
    """--no-create-topics makes a missing topic an error."""
    ran = run("publish", "t", "reviews.csv", "--no-create-topics")
    assert ran.code == 1
    assert "does not exist" in ran.err


def test_consume_limit_and_from(run: Run) -> None:
    """--limit stops early; --from takes an offset, the end, and a time."""
    run("publish", "t", "reviews.csv", "--partitions", "1")
    assert [row["id"] for row in run("consume", "t", "--limit", "2").lines] == [1, 2]
    assert [row["id"] for row in run("consume", "t", "--from", "3").lines] == [4]
    assert run("consume", "t", "--from", "end").out == ""
    assert len(run("consume", "t", "--from", "2020-01-01T00:00").lines) == 4
    assert run("consume", "t", "--from", "2999-01-01T00:00Z").out == ""


def test_consume_one_partition(run: Run) -> None:
    """--partition shows that partition's records only, and --limit counts only them."""
    run("publish", "t", "reviews.csv", "--partitions", "2")
    assert {record["partition"] for record in run("consume", "t", "--with-meta").lines} == {0, 1}
    only = run("consume", "t", "--with-meta", "--partition", "1", "--limit", "1").lines
    assert [(record["partition"], record["offset"]) for record in only] == [(1, 0)]


@pytest.mark.parametrize("name", ["o.jsonl", "o.csv", "o.parquet", "o.jsonl.gz"])
def test_consume_writes_files(run: Run, here: Path, name: str) -> None:
    """-o writes the values by the file's ending."""
    import pandas as pd

    run("publish", "t", "reviews.csv", "--partitions", "1")
    ran = run("consume", "t", "-o", name)
    assert (ran.code, ran.out) == (0, "")
    assert "4 rows of t written" in ran.err
    path = here / name
    frame = (
        pd.read_parquet(path) if "parquet" in name
        else pd.read_csv(path) if "csv" in name
        else pd.read_json(path, lines=True)
    )  # fmt: skip
    assert frame["id"].tolist() == [1, 2, 3, 4]


def test_consume_refuses_a_table_of_what_is_no_row(run: Run, here: Path) -> None:
    """A value that is no JSON object does not fit a table: the record is named, and no file is left."""
    (here / "in.jsonl").write_text("[1]\n")
    run("publish", "t", "in.jsonl")
    ran = run("consume", "t", "-o", "o.csv")
    assert ran.code == 2
    assert "t/0/0 is no JSON object" in ran.err
    assert not (here / "o.csv").exists()
    assert run("consume", "t", "-o", "o.jsonl").code == 0
    assert (here / "o.jsonl").read_text() == "[1]\n"


def test_consume_shows_why_a_row_failed(run: Run) -> None:
    """--with-meta shows a dead letter's headers by name, and the value as it came."""
    run("run", "reviews.py", "--input", "reviews.csv", "--session", "s1")
    (letter,) = run("consume", "reviews.dlq.s1", "--with-meta").lines
    assert letter["headers"]["rowmill.error.type"] == "ValueError"
    assert letter["value"] == {"id": 2, "text": "bad"}


# --- topics and doctor -----------------------------------------------------------------------------------------


def test_topics_are_made_listed_and_deleted(run: Run) -> None:
    """The three uses of topics, with the counts in the list."""
    assert run("topics").err == "no topics on local://.rowmill\n"
    assert "made t with 3 partitions" in run("topics", "--create", "t", "--partitions", "3").err
    assert "exists, with 3 partitions" in run("topics", "--create", "t").err
    run("publish", "t", "reviews.csv")
    assert [line.split() for line in run("topics").out.splitlines()] == [
        ["topic", "partitions", "records"],
        ["t", "3", "4"],
    ]
    assert run("topics", "--json").lines == [{"topic": "t", "partitions": 3, "records": 4}]
    refused = run("topics", "--delete", "t")
    assert refused.code == 2
    assert "4 records" in refused.err
    assert "add --yes" in refused.err
    assert run("topics", "--delete", "t", "--yes").code == 0
    assert run("topics", "--json").out == ""
    assert run("topics", "--delete", "t", "--yes").code == 1


def test_doctor_changes_nothing_by_itself(run: Run, here: Path) -> None:
    """Without --write, doctor does not even make the embedded broker's folder."""
    ran = run("doctor")
    assert ran.code == 0
    assert "✓ broker            local://.rowmill (not made yet" in ran.out
    assert not (here / ".rowmill").exists()


def test_doctor_writes_and_cleans_up(run: Run) -> None:
    """With --write a record goes there and back, and the temporary topic is gone afterwards."""
    ran = run("doctor", "--write", "--json")
    checks = {check["name"]: check for check in json.loads(ran.out)["checks"]}
    assert ran.code == 0
    assert checks["write"]["ok"]
    assert {"python", "rowmill", "aiokafka", "pandas", "state", "disk", "broker", "topics"} <= set(checks)
    assert run("topics", "--json").out == ""


def test_doctor_tells_versions_of_what_it_does_not_import(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console's libraries are named with their versions, from what is installed; one that is missing is a ✗."""
    names = {"aiohttp": "aiohttp", "ddsketch": "ddsketch", "faust-streaming": "faust", "jinja2": "jinja2"}
    names["prometheus-client"] = "prometheus_client"
    for module in names.values():
        monkeypatch.setitem(sys.modules, module, None)  # an import would fail
    ran = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(ran.out)["checks"]}
    assert ran.code == 0
    assert {name: checks[name]["found"] for name in names} == {name: metadata.version(name) for name in names}

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    missing = run("doctor")
    assert missing.code == 1
    assert "✗ ddsketch          it is not installed" in missing.out


def test_doctor_names_a_remedy(run: Run) -> None:
    """An unreachable broker is a ✗ with what to do about it, and exit code 1."""
    ran = run("doctor", "--broker", "kafka://127.0.0.1:1")
    assert ran.code == 1
    assert "✗ broker            kafka://127.0.0.1:1" in ran.out
    assert "-> start Kafka there" in ran.out
    assert ran.err == ""


@pytest.mark.parametrize("broker", ["local://.rowmill", "kafka://127.0.0.1:1"])
def test_doctor_looks_at_the_state_folder(run: Run, here: Path, broker: str) -> None:
    """Whatever the broker is, a folder for tables that cannot be made is a ✗ with the option that names another."""
    (here / "taken").write_text("a file")
    ran = run("doctor", "--broker", broker, "--state-dir", "taken/state")
    assert ran.code == 1
    assert f"✗ state             {here / 'taken'}: no folder that you may write to" in ran.out
    assert "-> choose another: --state-dir DIR" in ran.out
    fine = run("doctor", "--broker", broker)
    assert f"✓ state             {here / '.rowmill' / 'state'}: " in fine.out


# --- everything ------------------------------------------------------------------------------------------------


def test_version_and_help(run: Run) -> None:
    """--version, --help and no command at all."""
    from rowmill import __version__

    assert run("--version") == Ran(0, f"rowmill {__version__}\n", "")
    assert run("--help").code == 0
    nothing = run()
    assert nothing.code == 2
    assert "commands:" in nothing.err


@pytest.mark.parametrize("name", ["run", "worker", "publish", "consume", "topics", "doctor"])
def test_every_command_has_help_with_an_example(run: Run, name: str) -> None:
    """Each command's help fits 80 columns and ends in an example that its own parser accepts."""
    from rowmill.streams.cli.main import build_parser

    ran = run(name, "--help")
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    example = ran.out.rpartition("example:\n")[2].split()
    assert example[:2] == ["rowmill", name]
    assert build_parser().parse(example[1:]).command == name


def test_the_broker_comes_from_the_environment(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROWMILL_BROKER is used when --broker is not given."""
    monkeypatch.setenv("ROWMILL_BROKER", "local://elsewhere")
    run("topics", "--create", "t")
    assert (here / "elsewhere").is_dir()


def test_verbosity_may_stand_before_or_behind_the_command(run: Run) -> None:
    """-v works in both places; log lines go to standard error."""
    run("publish", "reviews", "reviews.csv")
    for words in (["-v", "run", "reviews.py"], ["run", "reviews.py", "-v"]):
        ran = run(*words)
        assert "INFO" in ran.err
        assert "assigned" in ran.err
    assert "INFO" not in run("run", "reviews.py").err


def test_a_bug_asks_to_be_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is nobody's mistake shows its traceback and asks for a report; exit code 1."""
    from rowmill.streams import client

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr(client, "consume", broken)
    run("topics", "--create", "t")
    ran = run("consume", "t")
    assert ran.code == 1
    assert "RuntimeError: surprise" in ran.err
    assert "please report it" in ran.err


def test_a_terminal_without_check_marks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ✓ cannot be shown, doctor writes words instead of failing."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["doctor"]) == 0
    out.seek(0)
    assert out.read().startswith("ok python")


HEAVY = ("asyncio", "aiokafka", "pandas", "pyarrow", "tqdm", "sqlite3", "orjson", "ssl")


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["wrong"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """Start-up time: to show a help text or an error, no client and no frame library is imported."""
    code = (
        "import sys\nfrom rowmill.streams.cli.main import main\n"
        f"main({words!r})\nprint([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr.endswith("[]\n")
