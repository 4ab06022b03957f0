"""One Apache Kafka node (KRaft) with ports, a folder and a fate of its own, for tests and for people.

Tests use it through the fixtures of ``tests/conftest.py``; people through ``make kafka``, which runs this file
as a script. Only the standard library is imported here, so that the script needs no environment.

The node runs on the machine's Java from jars that Maven fetched once (:func:`resolve_jars`), or else in Docker.
It dies with the process that started it, however that one ends, and its folder goes too: at once when
``close()`` or the interpreter's exit could see to it, else when the next node starts.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import functools
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Self

POM = Path(__file__).with_name("pom.xml")
FOLDER_PREFIX = "rowmill-kafka-"
HOST = "127.0.0.1"
WORKERS = 8
"""Of pytest-xdist, at most, that take care not to choose each other's ports."""

TOOLS = {
    "acls": "org.apache.kafka.tools.AclCommand",
    "configs": "kafka.admin.ConfigCommand",
    "console-consumer": "org.apache.kafka.tools.consumer.ConsoleConsumer",
    "console-producer": "org.apache.kafka.tools.ConsoleProducer",
    "consumer-groups": "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
    "get-offsets": "org.apache.kafka.tools.GetOffsetShell",
    "topics": "org.apache.kafka.tools.TopicCommand",
    "transactions": "org.apache.kafka.tools.TransactionsCommand",
}
"""Kafka's own tools by the names of their shell scripts (``kafka-NAME.sh``)."""

# C1 only, the serial collector and no perf data: a node that lives for seconds starts in half the time.
JVM_OPTIONS = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-Djava.awt.headless=true")

NODE_PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "CLIENT",
    "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "auto.create.topics.enable": "false",
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
    # Tests write records of fixed, old times: by default those are deleted at the next round of retention.
    "log.retention.ms": "-1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    # After a SIGKILL the controller refuses the returning node until the session of its former life has run
    # out: 9 s by default. Much shorter, and a busy machine would fence a healthy node.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "initial.broker.registration.timeout.ms": "30000",
    "num.network.threads": "2",
    "num.io.threads": "4",
    "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),  # 128 MiB by default, taken at start
}

LOGGING = """
appenders = file
appender.file.type = File
appender.file.name = file
appender.file.fileName = {log_file}
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{{ISO8601}} %-5p [%t] %c{{1}} %m%n
rootLogger.level = {level}
rootLogger.appenderRefs = file
rootLogger.appenderRef.file.ref = file
"""

# Runs a command that the kernel kills when the thread that started it ends (prctl 1 is PR_SET_PDEATHSIG, 9 is
# SIGKILL; Linux only). Not a preexec_fn: that runs Python between fork and exec of a process with threads.
DIE_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

# The signal above follows the starting *thread*, and a test may start a node in a short-lived one
# (asyncio.to_thread). This one lives until the interpreter ends.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kafka-spawner")


class KafkaUnavailableError(RuntimeError):
    """No Kafka can be run here; the message says what is missing and what to do about it."""


class KafkaStartError(RuntimeError):
    """The node did not become ready; the message ends with its log."""


class KafkaServer:
    """A Kafka node on ``127.0.0.1:port``, run from jars.

    ``with KafkaServer() as kafka: kafka.bootstrap``, or ``start`` and ``close``. Its port and data stay the same
    over ``stop``, ``kill`` and the ``start`` after them. Not for use from two threads at once.

    Args:
        port: where clients connect; a free one by default.
        folder: holds settings, data and logs, and is kept; by default a temporary one, which ``close`` removes.
        properties: broker settings on top of ``NODE_PROPERTIES``.
        heap: the JVM's ``-Xmx``.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        folder: Path | None = None,
        properties: Mapping[str, str] | None = None,
        heap: str = "512m",
    ) -> None:
        self.port = port or free_port()
        self.folder = folder or Path(tempfile.gettempdir()) / f"{FOLDER_PREFIX}{uuid.uuid4().hex[:12]}"
        self._keep_folder = folder is not None
        self._folder_lock: int | None = None
        self._controller_port = free_port()
        self._properties = dict(properties or {})
        self._heap = heap
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    @property
    def bootstrap(self) -> str:
        """The address that clients take."""
        return f"{HOST}:{self.port}"

    @property
    def log_file(self) -> Path:
        """The node's own log. What the JVM itself has to say is in ``console.log`` beside it."""
        return self.folder / "broker.log"

    @property
    def alive(self) -> bool:
        """Whether the process runs; also true while it is suspended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The node's process."""
        if self._process is None:
            raise RuntimeError("the Kafka node was not started: call start() first")
        return self._process.pid

    def start(self, timeout: float = 60) -> Self:
        """Start the node, on the data it had before if any, and wait until it serves clients.

        Raises:
            KafkaUnavailableError: Java or the jars are missing.
            KafkaStartError: it died, or was not ready in time; nothing is left running.
        """
        if self.alive:
            return self
        deadline = time.monotonic() + timeout
        atexit.register(self.close)
        self._claim_folder()
        try:
            self._prepare(timeout)
            self._process = self._spawn()
            self._await_ready(deadline)
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self, timeout: float = 15) -> None:
        """End the node in an orderly way, or by force after ``timeout`` seconds. Its data stays."""
        if self.alive:
            self._signal(signal.SIGCONT)  # a suspended process would not hear the next one
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._wait(timeout)
        self.kill()

    def kill(self) -> None:
        """SIGKILL: a crash. Its data stays as it was at this moment."""
        if self.alive:
            self._signal(signal.SIGKILL)
            self._wait(10)

    def restart(self, *, crash: bool = False, timeout: float = 60) -> None:
        """Stop the node (or ``crash`` it) and start it on the same port and data.

        After a crash this takes some seconds more: see ``broker.session.timeout.ms`` above.
        """
        if crash:
            self.kill()
        else:
            self.stop()
        self.start(timeout)

    def suspend(self) -> None:
        """SIGSTOP: the node stands still and its connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: the node goes on as if no time had passed."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the node and remove its folder, unless the caller gave one. Safe to call twice."""
        if os.getpid() != self._owner:
            return  # a forked child that runs our exit handlers
        atexit.unregister(self.close)
        if self._keep_folder:
            self.stop()
        else:
            self.kill()  # nobody will miss the data: no reason to wait for an orderly end
        self._release_folder()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # What differs between jars and Docker

    def _prepare(self, timeout: float) -> None:
        """Write settings and format the data folder, once."""
        data, settings, logging = (self.folder / name for name in ("data", "server.properties", "log4j2.properties"))
        properties = self._settings(HOST) | {"log.dirs": str(data)} | self._properties
        settings.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        logging.write_text(LOGGING.format(log_file=self.log_file, level="INFO"))
        if not (data / "meta.properties").exists():
            format_ = ("kafka.tools.StorageTool", "format", "-t", cluster_id(), "-c", str(settings))
            done = run(java_command(*format_), timeout)
            if done.returncode:
                raise KafkaStartError(f"Kafka's storage could not be formatted:\n{done.stdout}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        options = (f"-Xmx{self._heap}", f"-Dlog4j2.configurationFile={self.folder / 'log4j2.properties'}")
        command = java_command("kafka.Kafka", str(self.folder / "server.properties"), options=options)
        trampoline = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid())]
        return self._popen([*trampoline, *command])

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    # Shared by both

    def _settings(self, bind: str) -> dict[str, str]:
        """The properties that follow from the ports, with the common ones."""
        return NODE_PROPERTIES | {
            "listeners": f"CLIENT://{bind}:{self.port},CONTROLLER://{HOST}:{self._controller_port}",
            "advertised.listeners": f"CLIENT://{HOST}:{self.port}",
            "controller.quorum.voters": f"1@{HOST}:{self._controller_port}",
        }

    def _popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own, so that the terminal's Ctrl-C does not reach it."""
        with (self.folder / "console.log").open("ab") as console:

            def start() -> subprocess.Popen[bytes]:
                return subprocess.Popen(command, stdout=console, stderr=console, start_new_session=True, **options)

            return _spawner.submit(start).result(timeout=30)

    def _wait(self, timeout: float) -> None:
        if self._process is not None:
            self._process.wait(timeout)

    def _await_ready(self, deadline: float) -> None:
        while not broker_answers(self.port):
            if not self.alive:
                raise KafkaStartError(f"Kafka ended while starting on {self.bootstrap}; its log:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise KafkaStartError(f"Kafka on {self.bootstrap} was not ready in time; its log:\n{self._log_tail()}")
            time.sleep(0.05)

    def _log_tail(self, lines: int = 30) -> str:
        files = [file for file in (self.folder / "console.log", self.log_file) if file.exists()]
        text = "".join(file.read_text(errors="replace") for file in files)
        return "\n".join(text.splitlines()[-lines:])

    def _claim_folder(self) -> None:
        """Make the folder and hold a lock on it that ends with this process, whichever way that ends."""
        if not self._keep_folder:
            sweep_abandoned()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder_lock is None:
            self._folder_lock = try_lock(self.folder / "owner.lock")
        if self._folder_lock is None:
            raise KafkaStartError(f"{self.folder} belongs to a running Kafka: stop that one or give another folder")

    def _release_folder(self) -> None:
        if self._folder_lock is not None:
            if not self._keep_folder:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._folder_lock)
            self._folder_lock = None


class DockerKafka(KafkaServer):
    """The same node in a container, for machines with Docker and without Java.

    The container reads its standard input and ends with it, so that it cannot outlive the process that started
    it; what remains after a SIGKILL is a stopped container named ``rowmill-kafka-…``.
    """

    SCRIPT = (
        "exec 3<&0; /etc/kafka/docker/run & node=$!; (cat <&3 >/dev/null; kill $node) & "
        "trap 'kill $node' TERM; wait $node; wait $node"
    )

    _created = False

    @property
    def _name(self) -> str:
        return f"{FOLDER_PREFIX}{self.port}-{self._owner}"

    def close(self) -> None:
        """End the node and remove its container and folder."""
        super().close()
        if self._created and os.getpid() == self._owner:
            self._created = False
            run(["docker", "rm", "--force", "--volumes", self._name], 60)

    def _prepare(self, timeout: float) -> None:
        if self._created:
            return
        properties = self._settings("0.0.0.0") | {"log.dirs": "/var/lib/kafka/data"} | self._properties  # noqa: S104 (inside the container; published on 127.0.0.1)
        variables = {environment_name(key): value for key, value in properties.items()}
        variables |= {"CLUSTER_ID": cluster_id(), "KAFKA_HEAP_OPTS": f"-Xmx{self._heap}"}
        command = ["docker", "create", "--interactive", "--name", self._name]
        command += ["--publish", f"{HOST}:{self.port}:{self.port}"]
        command += [part for item in variables.items() for part in ("--env", "=".join(item))]
        # The first start pulls the image, so it may take as long as Maven may.
        done = run([*command, f"apache/kafka:{kafka_version()}", "bash", "-c", self.SCRIPT], max(timeout, 300))
        if done.returncode:
            raise KafkaUnavailableError(f"docker could not make a Kafka container:\n{done.stdout}")
        self._created = True

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = ["docker", "start", "--attach", "--interactive", self._name]
        return self._popen(command, stdin=subprocess.PIPE)

    def _signal(self, number: signal.Signals) -> None:
        verbs = {
            signal.SIGKILL: ["kill"],
            signal.SIGTERM: ["stop", "--time", "15"],
            signal.SIGSTOP: ["pause"],
            signal.SIGCONT: ["unpause"],
        }
        run(["docker", *verbs[number], self._name], 30)

    def _wait(self, timeout: float) -> None:
        super()._wait(timeout)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


def find_source() -> type[KafkaServer]:
    """The class to run Kafka with on this machine: from jars, which are fetched when they are not here yet, or Docker.

    Raises:
        KafkaUnavailableError: neither is possible.
    """
    try:
        java()
        resolve_jars()
    except KafkaUnavailableError as error:
        if docker_answers():
            return DockerKafka
        raise KafkaUnavailableError(
            f"{error} Or start Docker, or set ROWMILL_TEST_BOOTSTRAP=host:port to use a Kafka that runs already."
        ) from None
    return KafkaServer


def kafka_tool(name: str, *arguments: str, timeout: float = 60) -> str:
    """Run one of Kafka's own command-line tools (``TOOLS``) and return what it printed.

    Raises:
        subprocess.CalledProcessError: it failed; ``output`` has what it said.
    """
    done = run(java_command(TOOLS[name], *arguments), timeout)
    done.check_returncode()
    return done.stdout


def broker_answers(port: int, timeout: float = 2) -> bool:
    """Whether a node on this port serves clients: whether its metadata list a broker.

    Asked with the bytes of a Metadata request (version 1, no topics). The port being open, or ApiVersions
    being answered, comes too early: the node is still fenced then.
    """
    request = struct.pack(">ihhihi", 14, 3, 1, 1, -1, 0)  # size, api key, version, correlation, no client id, no topics
    try:
        with socket.create_connection((HOST, port), timeout) as connection:
            connection.sendall(request)
            answer = connection.recv(12, socket.MSG_WAITALL)
    except OSError:
        return False
    return len(answer) == 12 and struct.unpack(">iii", answer)[2] > 0


def resolve_jars(timeout: float = 600) -> Path:
    """The folder with the jars of Kafka and its tools; Maven fetches them when it is not there yet.

    Safe when several processes do it at once (one fetches, the others wait), and when one is killed midway: the
    folder appears whole or not at all. Its name follows the pom, so that a changed pom is fetched anew.

    Raises:
        KafkaUnavailableError: no Maven, or it failed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rowmill" / f"kafka-{kafka_version()}"
    jars = cache / hashlib.sha256(POM.read_bytes()).hexdigest()[:8]
    if jars.is_dir():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise KafkaUnavailableError("Kafka's jars are not fetched yet and there is no Maven (mvn): install Maven.")
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "fetch.lock", timeout):
        if not jars.is_dir():
            _fetch_jars(maven, jars, timeout)
    return jars


def _fetch_jars(maven: str, jars: Path, timeout: float) -> None:
    with tempfile.TemporaryDirectory(dir=jars.parent, prefix="fetching-") as work:
        pom, target = Path(work) / "pom.xml", Path(work) / "jars"
        shutil.copy(POM, pom)  # Maven may write beside the pom it reads
        goal = ["dependency:copy-dependencies", f"-DoutputDirectory={target}"]
        try:
            done = run([maven, "--batch-mode", "--quiet", "--no-transfer-progress", "--file", str(pom), *goal], timeout)
        except subprocess.TimeoutExpired:
            raise KafkaUnavailableError(f"Maven did not fetch Kafka's jars in {timeout:.0f} s: try again.") from None
        if done.returncode:
            errors = "\n".join(done.stdout.splitlines()[:10])
            raise KafkaUnavailableError(f"Maven could not fetch Kafka's jars: check the network. It said:\n{errors}\n")
        target.rename(jars)


@functools.cache
def java() -> str:
    """The path of a Java that can run Kafka 4 (17 or newer).

    Raises:
        KafkaUnavailableError: there is none.
    """
    home = os.environ.get("JAVA_HOME")
    path = shutil.which("java", path=str(Path(home) / "bin")) if home else shutil.which("java")
    if path is None:
        where = f"JAVA_HOME={home} has no bin/java" if home else "there is no java on the PATH"
        raise KafkaUnavailableError(f"Kafka needs Java 17 or newer and {where}: install a JDK or set JAVA_HOME.")
    said = run([path, "-version"], 30).stdout
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < 17:
        first = said.partition("\n")[0]
        raise KafkaUnavailableError(
            f"Kafka needs Java 17 or newer and {path} is {first!r}: set JAVA_HOME to a newer one."
        )
    return path


def java_command(main: str, *arguments: str, options: Sequence[str] = ()) -> list[str]:
    """The command line that runs a class of Kafka's."""
    return [java(), *JVM_OPTIONS, *options, "-cp", f"{resolve_jars()}/*", main, *arguments]


def kafka_version() -> str:
    """The version that the pom asks for."""
    found = re.search(r"<kafka\.version>([\d.]+)<", POM.read_text())
    if found is None:
        raise KafkaUnavailableError(f"{POM} names no kafka.version: restore it.")
    return found[1]


def cluster_id() -> str:
    """A new id in Kafka's form: a UUID in URL-safe base64, which must not begin with a dash."""
    encoded = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    return "A" + encoded[1:]


def environment_name(prop: str) -> str:
    """How the Docker image wants a broker property called (its documentation's rule)."""
    return "KAFKA_" + prop.replace("_", "__").replace("-", "___").replace(".", "_").upper()


def docker_answers() -> bool:
    """Whether a Docker engine can be used."""
    try:
        return shutil.which("docker") is not None and run(["docker", "info"], 20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


_given: set[int] = set()
"""Ports that this process was told of: nobody may listen on one yet who soon will."""


def free_port(first: int = 20_000, last: int = 32_000) -> int:
    """A port that nobody listens on, another one each time.

    Below the range from which the kernel takes ports for outgoing connections, or one of those could sit on it
    while the node is down. Each worker of pytest-xdist (``gw0``, ``gw1``, …) has numbers of its own, or two could
    take the same one before either listens.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    for _ in range(200):
        port = random.randint(first, last) // WORKERS * WORKERS + worker
        if port not in _given and port_is_free(port):
            _given.add(port)
            return port
    raise KafkaStartError(f"no free port found from {first} to {last}: is something holding them all?")


def port_is_free(port: int) -> bool:
    """Whether the port can be bound now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def sweep_abandoned(parent: Path | None = None, min_age: float = 60) -> None:
    """Remove the temporary folders of nodes whose owners were killed.

    Younger ones than ``min_age`` seconds stay: their owner may be about to take the lock.
    """
    for folder in (parent or Path(tempfile.gettempdir())).glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock_file = folder / "owner.lock"
            if time.time() - lock_file.stat().st_mtime < min_age:
                continue
            lock = try_lock(lock_file)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock until it is closed or its process ends; None when somebody else does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold a lock between processes."""
    deadline = time.monotonic() + timeout
    while (lock := try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise KafkaUnavailableError(f"another process has held {path} for {timeout:.0f} s: end that process.")
        time.sleep(0.1)
    try:
        yield
    finally:
        os.close(lock)


def run(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its errors come with its output."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def main() -> int:
    """Run a node in the foreground until Ctrl-C: what ``make kafka`` does."""
    parser = argparse.ArgumentParser(description="Run one Apache Kafka node until Ctrl-C.")
    parser.add_argument("--port", type=int, help="default: 9092, or the next free one after it")
    parser.add_argument("--folder", type=Path, help="keep the data there; default: a temporary folder")
    parser.add_argument("--fetch", action="store_true", help="only fetch Kafka's jars, for a later start")
    options = parser.parse_args()
    try:
        source = find_source()
        if options.fetch:
            return 0
        port = options.port or next(port for port in range(9092, 9192) if port_is_free(port))
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _leave)
        print("starting Apache Kafka …", flush=True)
        with source(port=port, folder=options.folder and options.folder.resolve()) as kafka:
            _say_what_next(kafka)
            _stay(kafka)
    except (KafkaUnavailableError, KafkaStartError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _say_what_next(kafka: KafkaServer) -> None:
    address = f"kafka://{kafka.bootstrap}"
    print(f"Apache Kafka {kafka_version()} is ready at {address} (log: {kafka.log_file})")
    print(f"""Ctrl-C stops it. In another terminal, try:
  export ROWMILL_BROKER={address}
  .venv/bin/rowmill publish reviews examples/data/reviews.csv
  .venv/bin/rowmill worker examples/reviews.py""")
    sys.stdout.flush()


def _stay(kafka: KafkaServer) -> None:
    idle = threading.Event()
    while kafka.alive:
        idle.wait(1)
    raise KafkaStartError(f"Kafka ended by itself; see {kafka.log_file}")


if __name__ == "__main__":
    sys.exit(main())
