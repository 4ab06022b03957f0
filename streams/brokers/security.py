"""How to prove who one is to Kafka, and who Kafka is: an allow-list of settings, with secrets kept out of sight."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...state.errors import ConfigError

MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")


@dataclass(frozen=True, slots=True)
class KafkaSecurity:
    """TLS and SASL. Given in the broker's URL and the environment; README lists the settings.

    Attributes:
        tls: encrypt, and check the broker's certificate and host name.
        ca_file: certificates to trust instead of the system's.
        cert_file, key_file: a client certificate and its key, for mutual TLS.
        sasl: one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, or None.
        user, password: for SASL; the password never stands in a URL, a log or a repr.
    """

    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    sasl: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.sasl is not None and self.sasl not in MECHANISMS:
            raise ConfigError("sasl", self.sasl, f"use one of {', '.join(MECHANISMS)}")
        if self.sasl and not (self.user and self.password):
            raise ConfigError(
                "sasl", self.sasl, "give user= in the URL, and the password in ROWMILL_KAFKA_PASSWORD or password_file="
            )
        if not self.tls and (self.ca_file or self.cert_file or self.key_file):
            raise ConfigError("tls", self.tls, "certificates need tls=true")
        if bool(self.cert_file) != bool(self.key_file):
            raise ConfigError("cert", self.cert_file, "a client certificate needs both cert= and key=")

    def client_options(self) -> dict[str, Any]:
        """The options of the Kafka client that these settings mean.

        Raises:
            ConfigError: a certificate or key cannot be read.
        """
        options: dict[str, Any] = {
            "security_protocol": ("SASL_" if self.sasl else "") + ("SSL" if self.tls else "PLAINTEXT")
        }
        if self.sasl:
            options |= {
                "sasl_mechanism": self.sasl,
                "sasl_plain_username": self.user,
                "sasl_plain_password": self.password,
            }
        if self.tls:
            options["ssl_context"] = self._tls_context()
        return options

    def _tls_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                "tls files", [str(f) for f in (self.ca_file, self.cert_file, self.key_file) if f], f"{error}"
            ) from error
        return context
