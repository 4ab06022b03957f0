"""rowmill beside what a user would pick instead: the same work, the same rows, the same broker, in turn.

    python -m benchmarks                     # all works, five runs of each; takes more than an hour
    python -m benchmarks P1 P5 --runs 7      # some
    python -m benchmarks --small             # only shows that everything works: a few minutes, no figures to rely on

It starts an Apache Kafka (or uses the one in ROWMILL_TEST_BOOTSTRAP), installs each peer into a virtual environment of
its own when first needed, runs everybody alternately, each run in fresh processes, checks every result, and writes
what it found as JSON below .rowmill/bench and as a table; ``--write`` puts each work's figures, in place of its former
ones, into benchmarks/RESULTS.md (and into benchmarks/results.json, from which that is written).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import signal
import sys
from types import FrameType

from .bench import Bench
from .cluster import ROOT, Cluster, apache_kafka
from .peers.known import ALL
from .report import Part, facts, markdown, remembered, write_json, write_section

_LEAST_RUNS = 5
WORKS = {
    "P1": "p01_rows",
    "P2": "p02_stages",
    "P3": "p03_http",
    "P4": "p04_tasks",
    "P5": "p05_counts",
    "P6": "p06_latency",
    "P7": "p07_memory",
    "P8": "p08_restore",
    "P9": "p09_workers",
    "P10": "p10_embedded",
    "P11": "p11_startup",
}


def main() -> int:
    """Measure, write, and tell by the exit code whether every check was passed and every goal met."""
    args = parse()
    logging.getLogger("aiokafka.cluster").setLevel(logging.CRITICAL)  # it complains of every topic that is gone
    signal.signal(signal.SIGTERM, _leave)
    is_judged = not args.small and args.rows is None
    with apache_kafka() as (bootstrap, pid):
        found = asyncio.run(measure(args, bootstrap, pid, is_judged=is_judged))
    parts = list(found.values())
    print(f"\n{markdown(parts, is_judged=is_judged)}\neverything that was measured: {write_json(parts)}")
    results = [result for part in parts for result in part.results]
    wrong = [run["complaint"] for result in results for run in result.runs if run.get("complaint")]
    missed = is_judged and any(not goal.is_met for result in results for goal in result.goals)
    return 1 if wrong or missed else 0


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End as Ctrl-C does, for which asyncio has an orderly way: processes are stopped, folders swept away."""
    signal.raise_signal(signal.SIGINT)


def parse() -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=summary, epilog=details, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("works", nargs="*", metavar="P1", help="default: all, P1 to P11")
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="instead of each work's own number")
    parser.add_argument("--small", action="store_true", help="a few rows: shows that it works, figures mean nothing")
    parser.add_argument("--peers", metavar="NAME,…", help=f"only these: {', '.join(peer.name for peer in ALL)}")
    parser.add_argument("--write", action="store_true", help="update the section of benchmarks/RESULTS.md")
    args = parser.parse_args()
    if unknown := set(args.works) - set(WORKS):
        parser.error(f"no such work: {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    if args.runs < 1 or (args.rows is not None and args.rows < 1):
        parser.error("--runs and --rows are whole numbers from 1")
    if args.write and (args.small or args.rows or args.peers or args.runs < _LEAST_RUNS):
        parser.error(f"--write is for whole works at full size, with all peers and at least {_LEAST_RUNS} runs")
    return args


async def measure(args: argparse.Namespace, bootstrap: str, pid: int | None, *, is_judged: bool) -> dict[str, Part]:
    """Each work in turn; with ``--write``, its figures are written as soon as it is done."""
    found: dict[str, Part] = {}
    only = None if args.peers is None else frozenset(name.strip() for name in args.peers.split(","))
    async with Cluster(bootstrap, pid) as cluster:
        bench = Bench(cluster, args.runs, args.rows, args.small, only)
        for work in args.works or WORKS:
            load_before = os.getloadavg()[0]
            results = await importlib.import_module(f".works.{WORKS[work]}", __package__).run(bench)
            found[work] = Part(facts(args.runs, small=not is_judged, load_before=load_before), results)
            if args.write:
                known = remembered(ROOT / "benchmarks" / "results.json", {work: found[work]}, list(WORKS))
                write_section(ROOT / "benchmarks" / "RESULTS.md", markdown(known, is_judged=True))
    return found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing is written")
