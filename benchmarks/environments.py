"""Virtual environments of the peers: one each, in ``~/.cache/rowmill/peers``, made when first needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT = 900


@dataclass(frozen=True, slots=True)
class Environment:
    """What to install.

    Attributes:
        name, version: of the peer; they name the folder.
        requirements: for pip.
    """

    name: str
    version: str
    requirements: tuple[str, ...]

    @property
    def folder(self) -> Path:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "rowmill" / "peers" / f"{self.name}-{self.version}"

    def python(self) -> Path:
        """Its interpreter; the environment is made if it is not there."""
        python = self.folder / "bin" / "python"
        complete = self.folder / "complete"
        if not complete.exists():
            print(f"installing {self.name} {self.version} into {self.folder} …", flush=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(self.folder)])
            _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.requirements])
            complete.touch()
        return python

    def versions(self) -> str:
        """What is installed, of what matters for speed."""
        shown = "import importlib.metadata as m; print(', '.join(f'{d.name} {d.version}' for d in m.distributions()))"
        listed = _run([str(self.python()), "-c", shown]).strip().split(", ")
        telling = (self.name, "aiokafka", "confluent-kafka", "orjson", "rocksdict", "mode-streaming")
        return ", ".join(sorted(each for each in listed if each.rpartition(" ")[0].lower() in telling))


QUIX = Environment("quixstreams", "3.28.1", ("quixstreams==3.28.1",))
FAUST = Environment("faust-streaming", "0.15.3", ("faust-streaming[fast,rocksdict]==0.15.3",))
FASTSTREAM = Environment("faststream", "0.7.8", ("faststream[kafka]==0.7.8", "orjson"))


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_TIMEOUT, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout
