"""The Kafka that the other suites rely on: that it serves, keeps its data, and never outlives its owner."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from support import kafka_server as support
from support.kafka_server import KafkaServer, KafkaUnavailableError

SCRIPT = Path(support.__file__)


async def create_topic(bootstrap: str, topic: str) -> None:
    """Make a topic of one partition."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await asyncio.wait_for(admin.start(), 20)
    try:
        response = await asyncio.wait_for(admin.create_topics([NewTopic(topic, 1, 1)]), 20)
        assert [error[1] for error in response.topic_errors] == [0]
    finally:
        await asyncio.wait_for(admin.close(), 20)


async def produce(bootstrap: str, topic: str, value: bytes) -> None:
    """Write one record and wait for the broker's word."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await asyncio.wait_for(producer.start(), 20)
    try:
        await asyncio.wait_for(producer.send_and_wait(topic, value), 20)
    finally:
        await asyncio.wait_for(producer.stop(), 20)


async def consume(bootstrap: str, topic: str, count: int) -> list[bytes | None]:
    """Read the first records of a topic."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await asyncio.wait_for(consumer.start(), 20)
    try:
        return [(await asyncio.wait_for(consumer.getone(), 20)).value for _ in range(count)]
    finally:
        await asyncio.wait_for(consumer.stop(), 20)


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Return as soon as a condition holds; fail after a deadline."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {holds}"
        time.sleep(0.05)


async def test_the_shared_node_takes_and_gives_a_record(kafka: str) -> None:
    """A bare client can create a topic, write a record and read it back."""
    topic = f"roundtrip-{os.getpid()}-{time.time_ns()}"
    await create_topic(kafka, topic)
    await produce(kafka, topic, b"one")
    assert await consume(kafka, topic, 1) == [b"one"]


async def test_data_and_address_survive_restart_and_crash(kafka_server: Callable[..., KafkaServer]) -> None:
    """A restart keeps port and records, also after SIGKILL and when a thread that has ended asked for it."""
    server = kafka_server()
    bootstrap = server.bootstrap
    await create_topic(bootstrap, "kept")
    await produce(bootstrap, "kept", b"one")
    thread = threading.Thread(target=server.restart)
    thread.start()
    await asyncio.to_thread(thread.join, 60)
    await produce(bootstrap, "kept", b"two")
    await asyncio.to_thread(server.restart, crash=True)
    assert server.bootstrap == bootstrap
    assert await consume(bootstrap, "kept", 2) == [b"one", b"two"]


def test_a_suspended_node_is_silent_until_resumed(kafka_server: Callable[..., KafkaServer]) -> None:
    """SIGSTOP silences the node without ending it, SIGCONT brings it back, and stop works on a suspended one."""
    server = kafka_server()
    server.suspend()
    assert server.alive
    assert not support.broker_answers(server.port, timeout=0.5)
    server.resume()
    wait_until(lambda: support.broker_answers(server.port), 20)
    server.suspend()
    server.stop()
    assert not server.alive


def test_properties_and_folder_are_the_callers(kafka_server: Callable[..., KafkaServer], tmp_path: Path) -> None:
    """Broker settings can be overridden, and a folder that the caller gave is used and kept."""
    server = kafka_server(folder=tmp_path / "node", properties={"message.max.bytes": "4321"})
    described = support.kafka_tool(
        *("configs", "--bootstrap-server", server.bootstrap, "--describe", "--all"),
        *("--entity-type", "brokers", "--entity-name", "1"),
    )
    assert "message.max.bytes=4321 " in described
    server.close()
    assert (tmp_path / "node" / "data" / "meta.properties").exists()
    assert "Kafka Server started" in server.log_file.read_text()


def test_close_leaves_nothing_behind(kafka_server: Callable[..., KafkaServer]) -> None:
    """After close the process, the port and the temporary folder are gone, and a second close does no harm."""
    server = kafka_server()
    server.close()
    server.close()
    assert not server.alive
    assert support.port_is_free(server.port)
    assert not server.folder.exists()


def test_a_node_that_cannot_start_says_why(kafka_server: Callable[..., KafkaServer]) -> None:
    """A setting that Kafka refuses ends in an error that quotes Kafka's log, and in no process."""
    with pytest.raises(support.KafkaStartError, match=r"num\.network\.threads"):
        kafka_server(properties={"num.network.threads": "0"})


@pytest.fixture
def owner(kafka_server: Callable[..., KafkaServer], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Another process that runs a node (``kafka_server`` only for its skip), and the node's port."""
    port = support.free_port()
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, SCRIPT, "--port", str(port)], env=environment)
    try:
        wait_until(lambda: support.broker_answers(port), 60)
        yield process, port
    finally:
        process.kill()
        process.wait(10)


def test_the_node_dies_with_its_killed_owner(owner: tuple[subprocess.Popen[bytes], int], tmp_path: Path) -> None:
    """SIGKILL of the owning process ends the node too, and the folder it left is swept up later."""
    process, port = owner
    process.kill()
    wait_until(lambda: support.port_is_free(port), 10)
    assert list(tmp_path.iterdir())

    def swept() -> bool:
        support.sweep_abandoned(tmp_path, min_age=0)  # the node may still write, for a moment after its port is closed
        return not list(tmp_path.iterdir())

    wait_until(swept, 10)


def test_a_terminated_script_cleans_up(owner: tuple[subprocess.Popen[bytes], int], tmp_path: Path) -> None:
    """SIGTERM ends the script, its node and its folder."""
    process, port = owner
    process.terminate()
    process.wait(20)
    assert support.port_is_free(port)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (None, "no java on the PATH: install a JDK"),
        ('openjdk version "11.0.2"', "Java 17 or newer and .* set JAVA_HOME"),
    ],
)
def test_a_missing_java_is_named_with_its_remedy(
    said: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No Java, or one that is too old, ends in a message that says what to install."""
    if said is not None:
        (tmp_path / "java").write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    support.java.cache_clear()
    try:
        with pytest.raises(KafkaUnavailableError, match=problem):
            support.find_source()
    finally:
        support.java.cache_clear()


def test_a_missing_maven_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fetched jars and without Maven the message says to install Maven."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(KafkaUnavailableError, match=r"no Maven \(mvn\): install Maven"):
        support.resolve_jars()


def test_a_failed_fetch_leaves_no_half_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When Maven fails, its words are in the message and the cache stays without jars."""
    (tmp_path / "mvn").write_text("#!/bin/sh\necho '[ERROR] no route'\nexit 1\n")
    (tmp_path / "mvn").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(KafkaUnavailableError, match="no route"):
        support.resolve_jars()
    assert not list((tmp_path / "cache").rglob("*.jar"))
