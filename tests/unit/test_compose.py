"""docker-compose.yml is a valid Compose file, scales, and says what the code says. No Docker engine is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from support.kafka_server import kafka_version

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "Dockerfile"

Service = dict[str, Any]


def services() -> dict[str, Service]:
    """The services by name; YAML's merge keys are resolved as Compose resolves them."""
    return cast("dict[str, Service]", yaml.safe_load(COMPOSE_FILE.read_text())["services"])


def rowmill_services() -> dict[str, Service]:
    """Those that run our own image."""
    return {name: service for name, service in services().items() if "build" in service}


def test_it_fits_the_compose_specification() -> None:
    """The file passes the Compose project's own JSON schema, which check-jsonschema brings along."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_dependency_can_be_met() -> None:
    """Awaited services exist; those awaited for health have a check, those for their end are one-shots."""
    all_services = services()
    for name, service in all_services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in all_services, f"{name} waits for {needed}, which does not exist"
            target = all_services[needed]
            if how["condition"] == "service_healthy":
                assert "healthcheck" in target, f"{name} waits for the health of {needed}, which has no check"
            if how["condition"] == "service_completed_successfully":
                assert target["restart"] == "no", f"{name} waits for the end of {needed}, which starts again"


def test_every_named_volume_is_declared() -> None:
    """A volume that is mounted by name is declared, and each declared one is used."""
    sources = {
        volume.split(":")[0]
        for service in services().values()
        for volume in service.get("volumes", ())
        if ":" in volume and not volume.startswith((".", "/"))
    }
    assert sources == set(yaml.safe_load(COMPOSE_FILE.read_text())["volumes"])


def test_the_worker_scales() -> None:
    """Nothing of a worker is unique to one container: no name, no ports, no volume that two would share."""
    worker = services()["worker"]
    assert not {"container_name", "hostname", "ports"} & worker.keys()
    assert all(":" not in volume for volume in worker["volumes"])


def test_the_worker_has_time_to_stop() -> None:
    """SIGTERM reaches the worker, which then has longer than Docker's ten seconds to finish."""
    worker = services()["worker"]
    assert worker["init"] is True
    assert worker["stop_signal"] == "SIGTERM"
    assert int(worker["stop_grace_period"].removesuffix("s")) >= 30


def test_nothing_listens_beyond_this_machine() -> None:
    """Ports are published on the loopback address only: the node asks for no password."""
    for service in services().values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_the_console_asks_for_a_token() -> None:
    """Inside its container it listens on all addresses, so that it has one; the port in the mapping is its own."""
    console = services()["console"]
    assert console["environment"]["ROWMILL_CONSOLE_TOKEN"]
    assert console["ports"][0].endswith(":8321")


def test_kafka_is_the_version_that_the_tests_run() -> None:
    """Compose and the test suite use the same Kafka."""
    images = {service["image"] for service in services().values() if "build" not in service}
    assert images == {f"apache/kafka:{kafka_version()}"}


@pytest.mark.parametrize("name", sorted(rowmill_services()))
def test_commands_name_files_that_the_image_has(name: str) -> None:
    """A path in a command exists below what Dockerfile copies to /app."""
    paths = [word.removeprefix("/app/") for word in rowmill_services()[name]["command"] if "examples/" in word]
    assert paths or name == "console"
    for path in paths:
        assert (ROOT / path).exists(), f"{name}: {path} does not exist"


@pytest.mark.parametrize("name", sorted(rowmill_services()))
def test_commands_are_commands_of_rowmill(name: str) -> None:
    """The command line knows each subcommand and each option that is used with it."""
    subcommand, *arguments = rowmill_services()[name]["command"]
    program = "import sys; from rowmill.streams.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, subcommand, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for option in (word for word in arguments if word.startswith("--")):
        assert option in done.stdout, f"rowmill {subcommand} has no {option}"


def test_the_image_holds_every_package() -> None:
    """Dockerfile copies, and .dockerignore lets through, everything that pyproject.toml installs."""
    listed = re.findall(r'^    "rowmill\.(\w+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    dockerfile, allowed = DOCKERFILE.read_text(), (ROOT / ".dockerignore").read_text().splitlines()
    assert listed
    for folder in listed:
        assert f"COPY {folder} /src/{folder}\n" in dockerfile
        assert f"!{folder}" in allowed


def test_the_image_does_not_run_as_root() -> None:
    """The last USER before the entry point is an ordinary one, and the entry point is the command line."""
    text = DOCKERFILE.read_text()
    assert re.findall(r"^USER (\w+)$", text, re.MULTILINE)[-1:] == ["rowmill"]
    assert 'ENTRYPOINT ["rowmill"]' in text
