"""Certificates for brokers that are talked to by TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .kafka_server import HOST


def certificate(folder: Path) -> tuple[Path, Path]:
    """A key and a certificate that it signed itself, for the node's address."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", f"subjectAltName=IP:{HOST}", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return key, cert
