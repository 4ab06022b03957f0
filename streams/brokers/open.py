"""A broker from its URL. The client behind it is imported only when its scheme is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from ...state.clock import Clock, SystemClock
from ...state.errors import ConfigError
from .base import Broker
from .security import KafkaSecurity

DEFAULT_URL = "local://.rowmill"
_FORMS = "write local://DIR or kafka://host:port[,host:port…]"
_SETTINGS = ("tls", "ca", "cert", "key", "sasl", "user", "password_file")


def broker_url(url: str | None, environment: Mapping[str, str] | None = None) -> str:
    """The URL given, else ``ROWMILL_BROKER``, else ``local://.rowmill``."""
    environment = os.environ if environment is None else environment
    return url or environment.get("ROWMILL_BROKER") or DEFAULT_URL


def open_broker(
    url: str | None = None, *, clock: Clock | None = None, environment: Mapping[str, str] | None = None
) -> Broker:
    """A broker that is not started yet.

    Args:
        url: ``local://DIR``, or ``kafka://host:port,…?tls=true&ca=FILE&cert=FILE&key=FILE&sasl=SCRAM-SHA-512&
            user=NAME&password_file=FILE``. Default: see :func:`broker_url`.
        clock: default: the machine's.
        environment: default: the process's. ``ROWMILL_KAFKA_PASSWORD`` holds the SASL password.

    Raises:
        ConfigError: the URL or one of its settings is wrong.
    """
    environment = os.environ if environment is None else environment
    if url is not None and not isinstance(url, str):
        raise ConfigError("broker", url, _FORMS)
    url = broker_url(url, environment)
    clock = clock or SystemClock()
    scheme, separator, rest = url.partition("://")
    if not separator or not rest:
        raise ConfigError("broker", shown_url(url), _FORMS)
    if scheme == "local":
        from .local import LocalBroker

        return LocalBroker(rest, clock=clock)
    if scheme == "kafka":
        from .kafka import KafkaBroker

        return KafkaBroker(addresses_of(url), clock=clock, security=security_of(url, environment))
    raise ConfigError("broker", shown_url(url), _FORMS)


def shown_url(url: str) -> str:
    """As much of a URL, right or wrong, as can hold no password: whoever wrote it wrongly may have put one anywhere."""
    scheme, separator, _ = url.partition("://")
    if "@" in url and scheme != "local":
        return f"{scheme}://…@…" if separator else "…@…"
    address, question, _ = url.partition("?")
    return f"{address}?…" if question else address


def addresses_of(url: str) -> str:
    """``host:port,…`` of a ``kafka://`` URL.

    Raises:
        ConfigError: there is none, or something else in its place.
    """
    netloc = urlsplit(url).netloc
    addresses = [address.strip() for address in netloc.split(",") if address.strip()]
    for address in addresses:
        host, _, port = address.rpartition(":")
        # An @ anywhere: a password may hold what ends the address, such as / or ?.
        if "@" in netloc or ("@" in url and not port.isdigit()):
            raise ConfigError("broker", shown_url(url), "no secrets in a URL: use ?user= and ROWMILL_KAFKA_PASSWORD")
        if not host or not port.isdigit():
            raise ConfigError("broker", shown_url(url), f"{address!r} is no host:port; {_FORMS}")
    if not addresses:
        raise ConfigError("broker", shown_url(url), _FORMS)
    return ",".join(addresses)


def security_of(url: str, environment: Mapping[str, str]) -> KafkaSecurity | None:
    """TLS and SASL as a ``kafka://`` URL has them; None for plain text.

    Args:
        url: the broker's.
        environment: ``ROWMILL_KAFKA_PASSWORD`` holds the password, unless the URL names a file.

    Raises:
        ConfigError: a setting is unknown, does not fit the others, or its file cannot be read.
    """
    given = {name: values[-1] for name, values in parse_qs(urlsplit(url).query).items()}
    for name in given:
        if name not in _SETTINGS:
            raise ConfigError("broker setting", name, f"known ones are {', '.join(_SETTINGS)}")
    if not given:
        return None
    tls = given.get("tls", "false").lower()
    if tls not in {"true", "false"}:
        raise ConfigError("broker setting tls", tls, "write true or false")
    return KafkaSecurity(
        tls=tls == "true",
        ca_file=_file(given, "ca"),
        cert_file=_file(given, "cert"),
        key_file=_file(given, "key"),
        sasl=given.get("sasl"),
        user=given.get("user"),
        password=_password(given, environment),
    )


def _file(given: Mapping[str, str], name: str) -> Path | None:
    return Path(given[name]) if name in given else None


def _password(given: Mapping[str, str], environment: Mapping[str, str]) -> str | None:
    path = _file(given, "password_file")
    if path is None:
        return environment.get("ROWMILL_KAFKA_PASSWORD")
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError("broker setting password_file", str(path), f"it cannot be read: {error}") from error
    except UnicodeDecodeError:  # whose message shows some of it
        raise ConfigError("broker setting password_file", str(path), "it is no text in UTF-8") from None
