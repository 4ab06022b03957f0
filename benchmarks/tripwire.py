"""Has rowmill become much slower? P1's small rows against the floor, few and in turn: what a test can afford.

    python -m benchmarks.tripwire            # a line of JSON: the best of three runs of each, and their ratio

Only the ratio means anything: both have the same machine, the same broker and the same minute.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys

from .bench import Bench
from .cluster import Cluster, apache_kafka
from .measure import Job
from .peers.known import FLOOR, ROWMILL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--runs", type=int, default=3, help="of each; the best counts (default: %(default)s)")
    args = parser.parse_args()
    logging.getLogger("aiokafka.cluster").setLevel(logging.CRITICAL)  # it complains of every topic that is gone
    with apache_kafka(heap="512m") as (bootstrap, pid):
        told = asyncio.run(measure(args, bootstrap, pid))
    print(json.dumps(told))
    return 1 if told["complaints"] else 0


async def measure(args: argparse.Namespace, bootstrap: str, pid: int | None) -> dict[str, object]:
    """Seconds of both, and what was wrong with their results."""
    async with Cluster(bootstrap, pid) as cluster:
        bench = Bench(cluster, args.runs, args.rows, small=True)
        with contextlib.redirect_stdout(sys.stderr):
            seen = await bench.compare([ROWMILL, FLOOR], Job(rows=args.rows))
    complaints = [run.complaint for runs in seen.values() for run in runs if run.complaint]
    if complaints:
        return {"complaints": complaints}
    ours, floor = (min(run.seconds for run in seen[peer.name]) for peer in (ROWMILL, FLOOR))
    return {"rowmill": ours, "floor": floor, "ratio": floor / ours, "complaints": []}


if __name__ == "__main__":
    sys.exit(main())
