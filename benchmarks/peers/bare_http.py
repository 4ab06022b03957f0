"""P3's measure: so many tasks that ask the server one thing after the other, and read and write nothing else."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time

from benchmarks.peers.asking import answer_of, make_client


async def main() -> None:
    server, count, concurrency = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    coming = iter(range(count))
    right = 0

    async def ask() -> None:
        nonlocal right
        for number in coming:
            answer = await answer_of(client, server, number)
            right += answer == 2 * number + 1

    client = make_client()
    began, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*(ask() for _ in range(concurrency)))
    told = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu, "right": right}
    await client.close()
    print(json.dumps(told | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    asyncio.run(main())
