"""``python -m tests.simulation --seeds 2000 --jobs 2``: run many seeds, or one, or show that the mutants are caught."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulation.mutants import MUTANTS, first_caught
from simulation.runner import run_all


def main() -> int:
    """Parse, run, and tell by the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many (default 300)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default 0)")
    parser.add_argument("--seed", type=int, default=os.environ.get("ROWMILL_SIM_SEED"), help="only this one")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--mutants", action="store_true", help="put bugs in, and show which seed finds each")
    chosen = parser.parse_args()
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    if chosen.mutants:
        return _mutants(seeds)
    if chosen.seed is not None:
        seeds = range(chosen.seed, chosen.seed + 1)
    return 1 if run_all(seeds, chosen.jobs).failures else 0


def _mutants(seeds: range) -> int:
    missed = 0
    for mutant in MUTANTS:
        caught = first_caught(mutant, seeds)
        missed += caught is None
        found = f"seed {caught.seed}: {caught.__cause__}"[:160] if caught else f"NOT CAUGHT in {len(seeds)} seeds"
        print(f"{mutant.name} ({mutant.what}): {found}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
