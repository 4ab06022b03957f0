"""Real worker processes on a real Apache Kafka, faults injected on purpose, and a verdict on each invariant."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]

if str(TESTS) not in sys.path:  # `python -m tests.chaos` does not put it there; support/ lies in it
    sys.path.insert(0, str(TESTS))
