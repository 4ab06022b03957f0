"""Brokers by URL: what is accepted, what is refused, and that secrets stay secret."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
from rowmill.state.errors import ConfigError
from rowmill.streams.brokers import open as opening
from rowmill.streams.brokers.kafka import KafkaBroker
from rowmill.streams.brokers.local import LocalBroker
from rowmill.streams.brokers.open import broker_url, open_broker
from rowmill.streams.brokers.security import KafkaSecurity

SECRET = "hunter2-do-not-show"
PASSWORD = {"ROWMILL_KAFKA_PASSWORD": SECRET}
KAFKA = "kafka://host:9092"


@pytest.mark.parametrize(
    ("url", "environment", "expected"),
    [
        ("kafka://a:1", {"ROWMILL_BROKER": "local://x"}, "kafka://a:1"),
        (None, {"ROWMILL_BROKER": "local://x"}, "local://x"),
        ("", {"ROWMILL_BROKER": "local://x"}, "local://x"),
        (None, {"ROWMILL_BROKER": ""}, "local://.rowmill"),
        (None, {}, "local://.rowmill"),
    ],
)
def test_which_url(url: str | None, environment: dict[str, str], expected: str) -> None:
    """The argument wins over ROWMILL_BROKER, which wins over the folder .rowmill."""
    assert broker_url(url, environment) == expected


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("local://some/folder", LocalBroker),
        ("local:///absolute", LocalBroker),
        ("local://.", LocalBroker),
        ("kafka://host:9092", KafkaBroker),
        ("kafka://a:1,b:2, c:3", KafkaBroker),
        ("kafka://[::1]:9092", KafkaBroker),
        ("kafka://host:9092?tls=false", KafkaBroker),
    ],
)
def test_urls(url: str, kind: type) -> None:
    """Each scheme has its adapter; opening connects to nothing and makes nothing."""
    broker = open_broker(url, environment={})
    assert isinstance(broker, kind)
    assert broker.url.split("://")[0] == url.split("://", maxsplit=1)[0]
    assert not Path("some").exists()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("host:9092", "write local://DIR or kafka://host:port"),
        ("local://", "write local://DIR"),
        ("kafka://", "write local://DIR"),
        ("redis://host:1", "write local://DIR"),
        ("KAFKA//host", "write local://DIR"),
        ("kafka://host", "'host' is no host:port"),
        ("kafka://host:", "'host:' is no host:port"),
        ("kafka://:9092", "':9092' is no host:port"),
        ("kafka://host:port", "'host:port' is no host:port"),
        ("kafka://a:1,b", "'b' is no host:port"),
        ("kafka://,", "write local://DIR"),
        ("kafka://?tls=true", "write local://DIR"),
        (f"kafka://user:{SECRET}@host:9092", "no secrets in a URL"),
        (KAFKA + "?password=" + SECRET, "known ones are tls, ca"),
        (KAFKA + "?tls=maybe", "write true or false"),
        (KAFKA + "?ca=/ca.pem", "certificates need tls=true"),
        (KAFKA + "?tls=true&cert=/c.pem", "both cert= and key="),
        (KAFKA + "?tls=true&key=/k.pem", "both cert= and key="),
        (KAFKA + "?sasl=GSSAPI&user=me", "use one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"),
        (KAFKA + "?sasl=plain&user=me", "use one of PLAIN"),
        (KAFKA + "?sasl=PLAIN", "give user= in the URL"),
        (KAFKA + "?sasl=PLAIN&user=me&password_file=/missing", "cannot be read"),
    ],
)
def test_mistakes(url: str, says: str) -> None:
    """A wrong URL or setting names the remedy, and never shows a password."""
    with pytest.raises(ConfigError) as caught:
        open_broker(url, environment=PASSWORD)
    assert says in str(caught.value)
    assert SECRET not in f"{caught.value}{caught.value!r}{caught.value.value!r}"


def test_password_is_needed() -> None:
    """SASL without a password names the two places for one."""
    with pytest.raises(ConfigError, match="ROWMILL_KAFKA_PASSWORD or password_file="):
        open_broker(KAFKA + "?sasl=PLAIN&user=me", environment={})


@pytest.mark.parametrize("from_file", [False, True])
def test_secrets_stay_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_file: bool) -> None:
    """The password reaches the client and stands in no URL, repr or error; a file wins over the environment."""
    seen: list[KafkaSecurity] = []

    class Noting(KafkaSecurity):
        def __post_init__(self) -> None:
            super().__post_init__()
            seen.append(self)

    monkeypatch.setattr(opening, "KafkaSecurity", Noting)
    file = tmp_path / "password"
    file.write_text(SECRET + "\n")
    url = KAFKA + "?sasl=SCRAM-SHA-512&user=me" + (f"&password_file={file}" if from_file else "")
    broker = open_broker(url, environment={"ROWMILL_KAFKA_PASSWORD": "other"} if from_file else PASSWORD)
    (security,) = seen
    assert security.client_options()["sasl_plain_password"] == SECRET
    assert SECRET not in f"{broker.url} {broker!r} {security!r} {security}"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"security_protocol": "PLAINTEXT"}),
        (
            {"sasl": "PLAIN", "user": "u", "password": "p"},
            {
                "security_protocol": "SASL_PLAINTEXT",
                "sasl_mechanism": "PLAIN",
                "sasl_plain_username": "u",
                "sasl_plain_password": "p",
            },
        ),
    ],
)
def test_client_options(settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Settings become the client's options, and nothing else does."""
    assert KafkaSecurity(**settings).client_options() == options


def test_tls_checks_the_broker() -> None:
    """TLS verifies the certificate and the host name."""
    options = KafkaSecurity(tls=True, sasl="PLAIN", user="u", password="p").client_options()
    context = options["ssl_context"]
    assert options["security_protocol"] == "SASL_SSL"
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_unreadable_certificates(tmp_path: Path, content: str | None) -> None:
    """A missing or broken certificate file is named."""
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        KafkaSecurity(tls=True, ca_file=file).client_options()


@pytest.mark.parametrize("url", [7, b"local://x", Path("x")])
def test_what_is_no_url(url: Any) -> None:
    """Something else than text is refused with the forms there are."""
    with pytest.raises(ConfigError, match="write local://DIR or kafka://host:port"):
        open_broker(url, environment={})
