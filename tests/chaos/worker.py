"""A worker process for chaos: what ``rowmill worker`` does, with a session timeout, failpoints and a log of calls."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import os
import sys
from pathlib import Path

from rowmill import Worker, WorkerOptions
from rowmill.state.clock import SystemClock
from rowmill.state.rocksdb import RocksStores
from rowmill.streams.brokers.kafka import KafkaBroker
from rowmill.streams.cli.signals import orderly_stop

from .failpoints import FailingStores, Failpoints, failing_broker
from .pipeline import calls, pipeline

BROKER_TIMEOUT = 8.0
DRAIN_TIMEOUT = 10.0


def main() -> int:
    """Work until SIGTERM, an error, or a failpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--broker", required=True)
    parser.add_argument("--session-timeout", type=float, required=True)
    parser.add_argument("--failpoint", default="")
    parser.add_argument("--max-deaths", type=int, required=True)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    _die_with(args.parent)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(_serve(args))
    return 0


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
        if os.getppid() != parent:
            os._exit(1)


async def _serve(args: argparse.Namespace) -> None:
    broker = KafkaBroker(args.broker, clock=SystemClock(), session_timeout=args.session_timeout)
    await broker.start()
    options = WorkerOptions(
        broker_timeout=BROKER_TIMEOUT,
        drain_timeout=DRAIN_TIMEOUT,
        state_dir=str(args.state_dir),
        max_deaths=args.max_deaths,
    )
    points = Failpoints(args.failpoint, calls)
    stores = FailingStores(RocksStores(args.state_dir, cache_bytes=options.table_cache_bytes), points)
    try:
        worker = Worker(pipeline, failing_broker(broker, points), options=options, stores=stores)
        with orderly_stop(worker.stop):
            await worker.run()
    finally:
        await broker.close()


if __name__ == "__main__":
    sys.exit(main())
