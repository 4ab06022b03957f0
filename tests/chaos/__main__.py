"""``python -m tests.chaos``: the fault matrix, or a part of it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from support.kafka_server import KafkaServer, KafkaUnavailableError, find_source

from .cluster import ProxiedKafka, ProxyProcess
from .report import summary, write
from .run import Environment, Outcome, Run, Scenario, can_mount, forget
from .scenarios import matrix


def main() -> int:
    """Run, print the verdicts, and after a full run write the table; 1 when an invariant did not hold."""
    args = _arguments()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # our own clients suffer with the workers
    scenarios = [s for s in matrix() if not args.only or any(s.name.startswith(name) for name in args.only)]
    if not scenarios:
        print(f"no scenario begins with {args.only}; there are: {', '.join(s.name for s in matrix())}")
        return 2
    print(f"seed {args.seed}, {args.rows:,} rows, {len(scenarios)} scenarios", flush=True)
    try:
        outcomes = asyncio.run(_run_all(scenarios, args))
    except KafkaUnavailableError as error:
        print(error, file=sys.stderr)
        return 2
    failed = [outcome.scenario.name for outcome in outcomes if not outcome.holds]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} scenarios hold" + (f"; not {failed}" if failed else ""))
    if args.write or not args.only:
        write(outcomes)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="scenarios whose names begin so; repeatable")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of a full scenario (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--jobs", type=int, default=1, help="scenarios at once, each with its Kafka (default: 1)")
    parser.add_argument("--kafka", metavar="HOST:PORT", help="use this one; faults of the broker are left out then")
    parser.add_argument("--package", metavar="DIR", help="workers import rowmill from here (a broken copy, say)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep all workers' logs here")
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md after a partial run too")
    return parser.parse_args()


async def _run_all(scenarios: Sequence[Scenario], args: argparse.Namespace) -> list[Outcome]:
    """All of them, in ``--jobs`` queues side by side, each with its own Kafka; outcomes in the matrix' order."""
    queues = [scenarios[number :: args.jobs] for number in range(args.jobs)]
    done = await asyncio.gather(*(_run_queue(queue, args) for queue in queues if queue))
    order = {scenario.name: place for place, scenario in enumerate(scenarios)}
    return sorted((outcome for outcomes in done for outcome in outcomes), key=lambda o: order[o.scenario.name])


async def _run_queue(scenarios: Sequence[Scenario], args: argparse.Namespace) -> list[Outcome]:
    outcomes = []
    async with environment(args.kafka, package=args.package, keep=args.keep) as where:
        for scenario in scenarios:
            if (scenario.owns_kafka or scenario.proxied) and where.server is None:
                print(f"left out: {scenario.name} needs a Kafka of its own", flush=True)
                continue
            if scenario.small_disk and not can_mount():
                print(f"left out: {scenario.name} needs root, to mount a small disk", flush=True)
                continue
            outcomes.append(await run_scenario(scenario, where, args.rows, args.seed))
            print(summary(outcomes[-1]), flush=True)
    return outcomes


@contextlib.asynccontextmanager
async def environment(
    kafka: str | None = None, *, package: str | None = None, keep: Path | None = None
) -> AsyncIterator[Environment]:
    """A Kafka of our own with a proxy before it, or the one given."""
    if kafka is not None:
        yield Environment(kafka, package=package, keep=keep)
        return
    if find_source() is not KafkaServer:
        raise KafkaUnavailableError("chaos needs Kafka from jars (Java and Maven), not from Docker: it kills processes")
    server = ProxiedKafka()
    proxy = ProxyProcess(server.proxy_port, server.behind_port)
    try:
        await asyncio.to_thread(server.start)
        await proxy.start()
        yield Environment(server.bootstrap, server, proxy, package, keep)
    finally:
        await proxy.close()
        await asyncio.to_thread(server.close)


async def run_scenario(scenario: Scenario, where: Environment, rows: int, seed: int) -> Outcome:
    """One scenario; its topics are removed afterwards."""
    run = Run(scenario, where, rows, seed)
    began = time.monotonic()
    try:
        return await run.run()
    finally:
        if time.monotonic() - began > 1:
            await forget(where, run.name)


if __name__ == "__main__":
    sys.exit(main())
