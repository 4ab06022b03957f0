"""TLS and SASL against Apache Kafka: the settings of a broker's URL let the right one in and keep others out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rowmill import BrokerUnreachableError, Pipeline, open_broker, publish, read
from support.certificates import certificate
from support.kafka_server import HOST, KafkaServer, free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the certificates are."""
    return tmp_path_factory.mktemp("tls")


@pytest.fixture
def secured(kafka_server: Callable[..., KafkaServer], folder: Path) -> Iterator[str]:
    """``host:port`` of a listener that wants TLS and a password (alice, with "wonderland")."""
    key, cert = certificate(folder)
    pem = folder / "both.pem"
    pem.write_text(key.read_text() + cert.read_text())
    server, port = KafkaServer(), free_port()
    login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    plain = server._settings(HOST)
    server._properties = {
        **server._properties,
        "listeners": f"{plain['listeners']},SECURE://{HOST}:{port}",
        "advertised.listeners": f"{plain['advertised.listeners']},SECURE://{HOST}:{port}",
        "listener.security.protocol.map": "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL",
        "listener.name.secure.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.secure.plain.sasl.jaas.config": f'{login} user_alice="wonderland";',
        "listener.name.secure.ssl.keystore.type": "PEM",
        "listener.name.secure.ssl.keystore.location": str(pem),
    }
    with server:
        yield f"{HOST}:{port}"


def test_tls_and_password(secured: str, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With certificate and password a pipeline runs; with a wrong password, or without trust, nothing is reached."""
    password = folder / "password"
    password.write_text("wonderland\n")
    settings = f"tls=true&ca={folder / 'cert.pem'}&sasl=PLAIN&user=alice"
    url = f"kafka://{secured}?{settings}&password_file={password}"
    pipeline = Pipeline(name, sink=f"{name}.out").add(lambda row: row, name="same")
    assert list(pipeline.run([{"n": 1}, {"n": 2}], broker=url).data["n"]) == [1, 2]
    monkeypatch.setenv("ROWMILL_KAFKA_PASSWORD", "wonderland")
    publish(name, [{"n": 3}], broker=f"kafka://{secured}?{settings}")
    assert [message.row for message in read(name, broker=url)] == [{"n": 3}]
    assert "wonderland" not in repr(open_broker(url).url)

    monkeypatch.setenv("ROWMILL_KAFKA_PASSWORD", "looking-glass")
    for wrong in (settings, settings.replace(f"ca={folder / 'cert.pem'}&", "")):
        with pytest.raises(BrokerUnreachableError) as caught:
            publish(name, [{"n": 4}], broker=f"kafka://{secured}?{wrong}")
        assert "looking-glass" not in str(caught.value)
