"""The console on a secured Kafka: its page and its history, with each way to log in, and with the wrong one."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from rowmill import BrokerUnreachableError, open_broker
from rowmill.state.clock import SystemClock
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.console import faust_app
from rowmill.streams.console.console import Console
from rowmill.streams.console.faust_app import CONSOLE_TOPICS
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.events import events_topic
from support.certificates import certificate
from support.kafka_server import HOST, KafkaServer, free_port, kafka_tool
from support.live_console import live_console

pytestmark = pytest.mark.timeout(180)

ROWMILL = str(Path(sys.executable).with_name("rowmill"))
SECRET, WRONG = "wonderland", "looking-glass"


class Secured(NamedTuple):
    """Where a secured Kafka listens, and the certificate it is to be trusted by."""

    password: str
    tls: str
    both: str
    certificate: Path
    folder: Path
    plain: str

    def url(self, way: str, user: str = "alice") -> str:
        """A broker's URL for one way to log in; the password comes from the environment."""
        tls = f"tls=true&ca={self.certificate}"
        return {
            "TLS": f"kafka://{self.tls}?{tls}&cert={self.certificate}&key={self.folder / 'key.pem'}",
            "TLS and PLAIN": f"kafka://{self.both}?{tls}&sasl=PLAIN&user={user}",
            "TLS and SCRAM-SHA-512": f"kafka://{self.both}?{tls}&sasl=SCRAM-SHA-512&user={user}",
        }.get(way, f"kafka://{self.password}?sasl={way}&user={user}")


@pytest.fixture(scope="module")
def secured(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A Kafka with a listener for passwords, one for certificates of both sides, and one for TLS with passwords."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = certificate(folder)
    pem = folder / "both.pem"
    pem.write_text(key.read_text() + cert.read_text())
    listeners = {name: f"{HOST}:{free_port()}" for name in ("PASSWORD", "TLS", "BOTH")}
    shown = ",".join(f"{name}://{address}" for name, address in listeners.items())
    server = KafkaServer()
    plain = server._settings(HOST)
    properties = {
        "listeners": f"{plain['listeners']},{shown}",
        "advertised.listeners": f"{plain['advertised.listeners']},{shown}",
        "listener.security.protocol.map": (
            "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT,PASSWORD:SASL_PLAINTEXT,TLS:SSL,BOTH:SASL_SSL"
        ),
        "listener.name.tls.ssl.client.auth": "required",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS;User:alice;User:CN=localhost",
    }
    login = "org.apache.kafka.common.security"
    users = f'user_alice="{SECRET}" user_bob="{SECRET}"'
    for name in ("password", "both"):
        jaas = f"listener.name.{name}"
        properties |= {
            f"{jaas}.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            f"{jaas}.plain.sasl.jaas.config": f"{login}.plain.PlainLoginModule required {users};",
            f"{jaas}.scram-sha-256.sasl.jaas.config": f"{login}.scram.ScramLoginModule required;",
            f"{jaas}.scram-sha-512.sasl.jaas.config": f"{login}.scram.ScramLoginModule required;",
        }
    for name in ("tls", "both"):
        properties |= {
            f"listener.name.{name}.ssl.keystore.type": "PEM",
            f"listener.name.{name}.ssl.keystore.location": str(pem),
            f"listener.name.{name}.ssl.truststore.type": "PEM",
            f"listener.name.{name}.ssl.truststore.location": str(cert),
        }
    server._properties = {**server._properties, **properties}
    with server:
        who = ("--bootstrap-server", server.bootstrap, "--alter", "--entity-type", "users", "--entity-name", "alice")
        for size in (256, 512):  # Kafka takes one of a user at a time
            kafka_tool("configs", *who, "--add-config", f"SCRAM-SHA-{size}=[iterations=4096,password={SECRET}]")
        yield Secured(listeners["PASSWORD"], listeners["TLS"], listeners["BOTH"], cert, folder, server.bootstrap)


async def tell(url: str, group: str, rows: int) -> None:
    """What a worker tells after so many rows."""
    clock, broker = SystemClock(), open_broker(url)
    await broker.start()
    producer = broker.producer()
    try:
        await broker.create_topics([events_topic(broker)])
        await producer.start()
        now_ms = clock.now_ms()
        event = EventRecord(
            kind="progress", at_ms=now_ms, pipeline=group.removeprefix("rowmill."), session="live", group=group,
            worker="w", data={"started_ms": now_ms - 1_000, "totals": {"rows": rows}, "state": "running"},
        )  # fmt: skip
        tp = TopicPartition(EVENTS_TOPIC, 0)
        await (await producer.send(tp, [Outgoing(group.encode(), event.encode(), now_ms)]))
    finally:
        await producer.close()
        await broker.close()


async def until_rows(console: Console, group: str, rows: int) -> None:
    """Until the charts have so many."""
    async with asyncio.timeout(30):
        while sum(point.rows for point in console.board.points(group, "1h", 0, 2**53)) != rows:
            await asyncio.sleep(0.05)


WAYS = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "TLS", "TLS and PLAIN", "TLS and SCRAM-SHA-512"]


@pytest.mark.parametrize("way", WAYS)
async def test_the_history_lives(
    secured: Secured, way: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each way to log in it becomes live, fills its windows, writes them to its topics, and begins with them."""
    monkeypatch.setenv("ROWMILL_KAFKA_PASSWORD", SECRET)
    url, group = secured.url(way), f"rowmill.{name}"

    async with live_console(url, tmp_path) as console:
        await tell(url, group, 42)
        await until_rows(console, group, 42)
        assert SECRET not in console.shown_broker
        assert not console.data.overview()["refresh_error"]
    broker = open_broker(url)
    await broker.start()
    try:
        ends = await broker.offsets([TopicPartition(topic, 0) for topic in CONSOLE_TOPICS], "end")
    finally:
        await broker.close()
    assert ends[TopicPartition("rowmill.console.1h", 0)] > 0
    async with live_console(url, tmp_path) as console:
        await until_rows(console, group, 42)


GRANTS = [
    ("--topic rowmill.console. --resource-pattern-type prefixed", "Read Write Describe Create"),
    ("--topic rowmill.events --topic rowmill.control", "Read Describe Create"),
    ("--group rowmill.console", "Read Describe"),
    ("--transactional-id rowmill.console.start", "Write Describe"),
]
"""What docs/operations.md says that the console's history needs."""


def grant(secured: Secured, resource: str, operations: str) -> None:
    """Allow bob something."""
    who = ["--bootstrap-server", secured.plain, "--add", "--allow-principal", "User:bob"]
    kafka_tool(
        "acls", *who, *resource.split(), *(word for each in operations.split() for word in ("--operation", each))
    )


async def test_access_lists(secured: Secured, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the documentation lists, and nothing else, the history lives; without, it is told what was refused."""
    monkeypatch.setenv("ROWMILL_KAFKA_PASSWORD", SECRET)
    await tell(secured.url("PLAIN"), f"rowmill.{name}", 1)
    url = secured.url("PLAIN", user="bob")
    for grants in GRANTS[:3]:
        await asyncio.to_thread(grant, secured, *grants)
    console, stop = Console(url, port=0, state_dir=tmp_path / "a"), asyncio.Event()
    task = asyncio.create_task(console.run(stop))
    try:
        async with asyncio.timeout(60):
            while console.board.standing.state != "stopped":
                assert not task.done(), task.result()
                await asyncio.sleep(0.05)
        assert "not allowed" in console.board.standing.message
        assert "docs/operations.md" in console.board.standing.message
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)
    await asyncio.to_thread(grant, secured, *GRANTS[3])
    async with live_console(url, tmp_path / "b") as console:
        await tell(secured.url("PLAIN"), f"rowmill.{name}", 42)
        await until_rows(console, f"rowmill.{name}", 42)


@pytest.mark.parametrize("way", ["PLAIN", "SCRAM-SHA-256", "TLS and SCRAM-SHA-512"])
def test_a_wrong_password(secured: Secured, way: str, tmp_path: Path) -> None:
    """One line says what may be wrong; no traceback, and the password nowhere."""
    words = [ROWMILL, "-v", "console", "--port", "0", "--broker", secured.url(way)]
    environment = {**os.environ, "ROWMILL_KAFKA_PASSWORD": WRONG}
    ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 1, said
    assert "rowmill: error: kafka://127.0.0.1:" in said
    assert "TLS and SASL settings" in said
    for bad in ("Traceback", WRONG, SECRET):
        assert bad not in said


@pytest.mark.parametrize("part", ["cert=", "ca="])
async def test_certificates_that_are_missing(secured: Secured, part: str, tmp_path: Path) -> None:
    """Without trust in the broker's certificate, or without one of its own, the console reaches nothing and says so."""
    address, _, settings = secured.url("TLS").partition("?")
    left = [each for each in settings.split("&") if not each.startswith((part, "key=" if part == "cert=" else part))]
    with pytest.raises(BrokerUnreachableError, match="TLS and SASL settings"):
        await Console(f"{address}?{'&'.join(left)}", port=0, state_dir=tmp_path).run(asyncio.Event())


async def test_a_password_that_is_changed_meanwhile(
    secured: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The history stands still and says why, without the password; with the right one it goes on by itself."""
    file = tmp_path / "password"
    file.write_text(SECRET)
    looks = faust_app._Life._look_at_ends

    async def fail(*_: object) -> None:
        raise RuntimeError("by a test")

    async with live_console(f"{secured.url('PLAIN')}&password_file={file}", tmp_path / "state") as console:
        file.write_text(WRONG)
        monkeypatch.setattr(faust_app._Life, "_look_at_ends", fail)
        async with asyncio.timeout(60):
            while "SASL" not in console.board.standing.message:
                await asyncio.sleep(0.05)
            message = console.board.standing.message
            monkeypatch.setattr(faust_app._Life, "_look_at_ends", looks)
            assert console.data.overview()["history"]["state"] in {"stopped", "starting"}
            file.write_text(SECRET)
            while console.board.standing.state != "live":
                await asyncio.sleep(0.05)
    assert "tried again in" in message
    for bad in ("Traceback", WRONG, SECRET):
        assert bad not in message
        assert bad not in caplog.text


@pytest.mark.parametrize("way", ["PLAIN", "TLS and PLAIN"])
async def test_an_app_that_may_not_log_in(
    secured: Secured, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where only Faust's client is refused its log (-v shows it) says so; no secret is there, nothing is left open."""
    caplog.set_level(logging.INFO, logger="aiokafka")  # whatever a command of an earlier test has set
    monkeypatch.setenv("ROWMILL_KAFKA_PASSWORD", SECRET)
    credentials = faust_app._credentials
    monkeypatch.setattr(faust_app, "_credentials", lambda right: credentials(replace(right, password=WRONG)))
    console, stop = Console(secured.url(way), port=0, state_dir=tmp_path), asyncio.Event()
    task = asyncio.create_task(console.run(stop))
    try:
        async with asyncio.timeout(60):
            while console.board.standing.state != "stopped":
                assert not task.done(), task.result()
                await asyncio.sleep(0.05)
        message = console.board.standing.message
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)
    assert "Authentication failed" in caplog.text
    for bad in ("Traceback", WRONG, SECRET):
        assert bad not in message
        assert bad not in caplog.text
