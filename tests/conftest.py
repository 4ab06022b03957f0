"""What every suite shares: Apache Kafka on demand, turns for tests that must run alone, no process left over."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest
from rowmill.state.errors import RowmillError
from rowmill.streams.brokers.open import open_broker

# Test files are imported one by one (--import-mode=importlib), so nothing else puts tests/ on the path.
sys.path.insert(0, str(Path(__file__).parent))

from support.kafka_server import KafkaServer, KafkaUnavailableError, find_source

# What a shell starts in the background ignores SIGINT, and so do its children: tests of Ctrl-C would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The machine is shared: how long one example takes says nothing.
hypothesis.settings.register_profile("rowmill", deadline=None)
hypothesis.settings.load_profile("rowmill")

SOURCE = pytest.StashKey[type[KafkaServer] | str]()
"""The class that runs Kafka here, or why there is none."""

NODE = pytest.StashKey[KafkaServer]()
"""The node that this session started for all its tests."""

GATE, ROOM = Path(__file__), Path(__file__).parent / "support" / "kafka_server.py"
"""Two files to lock. Which ones does not matter: these are there for every worker, and nothing is left behind."""

SESSION_VARIABLE = "ROWMILL_TEST_SESSION"
PYTHONS_OWN_HELPERS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses Kafka, also through another fixture."""
    for item in items:
        if {"kafka", "kafka_server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("kafka")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch Kafka's jars before the first test, whose timeout a slow network must not use up."""
    if not session.config.option.collectonly and any(item.get_closest_marker("kafka") for item in session.items):
        _find_source(session.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip here what cannot have Kafka: pytest folds such skips into one line, those from a fixture it lists."""
    names = set(getattr(item, "fixturenames", ()))
    if "kafka_server" in names or ("kafka" in names and not os.environ.get("ROWMILL_TEST_BOOTSTRAP")):
        _source_or_skip(item.config)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout: waiting for a turn takes none of a test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """With several workers, a test marked ``alone`` runs while the others stand still."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with _turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextlib.contextmanager
def _turn(*, alone: bool) -> Iterator[None]:
    """Be in the room with others, or alone: who wants that shuts the gate, so that nobody new comes in meanwhile."""
    if alone:
        with _locked(GATE, fcntl.LOCK_EX), _locked(ROOM, fcntl.LOCK_EX):
            yield
        return
    with _locked(GATE, fcntl.LOCK_SH):
        pass
    with _locked(ROOM, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # to close it would not do where a forked child has it open too
        os.close(descriptor)


def _find_source(config: pytest.Config) -> type[KafkaServer] | str:
    if SOURCE not in config.stash:
        try:
            config.stash[SOURCE] = find_source()
        except KafkaUnavailableError as error:
            config.stash[SOURCE] = str(error)
    return config.stash[SOURCE]


def _source_or_skip(config: pytest.Config) -> type[KafkaServer]:
    source = _find_source(config)
    if isinstance(source, str):
        if os.environ.get("CI", "").lower() in {"1", "true"}:
            pytest.fail(f"CI must not skip the tests that need Apache Kafka. {source}", pytrace=False)
        pytest.skip(f"NOT TESTED ON APACHE KAFKA. {source}")
    return source


@pytest.fixture(scope="session")
def kafka(pytestconfig: pytest.Config) -> Iterator[str]:
    """``host:port`` of an Apache Kafka that the whole session shares; topics and groups need names of their own."""
    given = os.environ.get("ROWMILL_TEST_BOOTSTRAP")
    if given:
        yield given
        return
    with _source_or_skip(pytestconfig)() as server:
        pytestconfig.stash[NODE] = server
        yield server.bootstrap
        del pytestconfig.stash[NODE]


@pytest.fixture(scope="module", autouse=True)
def no_topic_left_over(pytestconfig: pytest.Config) -> Iterator[None]:
    """Remove a file's topics from the session's node: whatever looks sessions up reads all that were left there.

    This only saves time, so that where it does not work the topics stay.
    """
    yield
    if NODE in pytestconfig.stash:
        with ThreadPoolExecutor(1) as thread, contextlib.suppress(RowmillError, TimeoutError):
            # A thread, because here may be an event loop of a test's.
            thread.submit(asyncio.run, _remove_topics(pytestconfig.stash[NODE])).result()


async def _remove_topics(node: KafkaServer) -> None:
    broker = open_broker(f"kafka://{node.bootstrap}", environment={})
    try:
        async with asyncio.timeout(30):
            await broker.start()
            await broker.delete_topics(list(await broker.topics()))
    finally:
        await broker.close()


@pytest.fixture
def kafka_server(pytestconfig: pytest.Config) -> Iterator[Callable[..., KafkaServer]]:
    """Start private nodes, for tests that kill them: ``kafka_server(properties={...})``, as ``KafkaServer`` takes."""
    source = _source_or_skip(pytestconfig)
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(source(**options))


@pytest.fixture(scope="session", autouse=True)
def no_process_left_over() -> Iterator[None]:
    """Fail the session when a process that a test started, or a child of one, is still there at its end."""
    session = f"{SESSION_VARIABLE}={uuid.uuid4()}"
    os.environ[SESSION_VARIABLE] = session.partition("=")[2]
    yield
    left = _left_over(session.encode())
    deadline = time.monotonic() + 5
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = _left_over(session.encode())
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left:
        lines = "\n".join(f"  {pid}: {command}" for pid, command in left.items())
        pytest.fail(f"PROCESSES LEFT OVER by this test session (killed now):\n{lines}", pytrace=False)


def _left_over(session: bytes) -> dict[int, str]:
    """Live processes that inherited this session's mark (orphans too) or are our children (forks show no mark)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes()
            ours = int(parent) == os.getpid() or session in (folder / "environ").read_bytes().split(b"\0")
            if ours and state != "Z" and not any(helper in command for helper in PYTHONS_OWN_HELPERS):
                found[int(folder.name)] = command.replace(b"\0", b" ").decode(errors="replace")[:200]
    found.pop(os.getpid(), None)
    return found


@pytest.fixture(params=["local", pytest.param("kafka", marks=pytest.mark.kafka)])
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of each kind of broker in turn: a fresh embedded one, and the session's Apache Kafka."""
    if request.param == "local":
        return f"local://{tmp_path / 'broker'}"
    return f"kafka://{request.getfixturevalue('kafka')}"


@pytest.fixture
def name() -> str:
    """A name nobody else uses, for pipelines, topics and groups on a shared broker."""
    return f"t{uuid.uuid4().hex[:12]}"
