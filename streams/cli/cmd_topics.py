"""``rowmill topics``: list, make and delete topics."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import TYPE_CHECKING

from ...state.errors import ConfigError
from .connect import CALL_SECONDS, on_broker, shown_broker
from .output import plural, say, table
from .parser import Commands, add_broker, add_command, add_partitions, did_you_mean

if TYPE_CHECKING:
    from ...state.model import TopicPartition
    from ..brokers.base import Broker


_ALL_SECONDS = 5.0
_TOPIC_SECONDS = 1.0


def add_parser(commands: Commands) -> None:
    """``topics``'s options."""
    parser = add_command(
        commands,
        "topics",
        main,
        summary="list, make and delete topics",
        about=(
            "List topics with their partitions and records. The number of records is that of the offsets from the "
            "first to the end: on Kafka an upper bound, because transaction markers and compacted records count. "
            "Topics of rowmill's own say what they hold; those of the web console (rowmill.console.*) hold what it "
            "shows of the past, and may be deleted while it does not run."
        ),
        example="rowmill topics --create reviews --partitions 6",
    )
    parser.add_argument("--create", metavar="NAME", help="make a topic instead")
    add_partitions(parser)
    parser.add_argument("--delete", metavar="NAME", help="delete a topic with all its records instead; needs --yes")
    parser.add_argument("--yes", action="store_true", help="really delete")
    parser.add_argument("--json", action="store_true", help="a JSON object per topic and line")
    add_broker(parser)


def main(args: argparse.Namespace) -> int:
    """List, make or delete."""
    if args.create is not None and args.delete is not None:
        raise ConfigError("--create", args.create, "not together with --delete; use two commands")
    if args.partitions is not None and args.create is None:
        raise ConfigError("--partitions", args.partitions, "it goes with --create NAME")
    if args.yes and args.delete is None:
        raise ConfigError("--yes", True, "it goes with --delete NAME")
    if args.create is not None:
        return on_broker(args.broker, lambda broker: _create(args, broker))
    if args.delete is not None:
        return on_broker(args.broker, lambda broker: _delete(args, broker))
    return on_broker(args.broker, lambda broker: _list(args, broker))


async def _create(args: argparse.Namespace, broker: Broker) -> int:
    from ..brokers.base import TopicSpec
    from ..deadlines import deadline
    from ..errors import TopicError
    from ..session import check_topic

    name = check_topic("--create", args.create)
    async with deadline(CALL_SECONDS, f"make {name}"):
        present = (await broker.topics()).get(name)
        if present is not None:
            partitions = plural(present.partitions, "partition")
            raise TopicError(f"topic {name!r} exists, with {partitions}; it was not changed")
        await broker.create_topics([TopicSpec(name, args.partitions)])
    partitions = plural(args.partitions or broker.default_partitions, "partition")
    say(f"made {name} with {partitions} on {shown_broker(args)}", quiet=args.quiet)
    return 0


async def _delete(args: argparse.Namespace, broker: Broker) -> int:
    from ..deadlines import deadline
    from ..errors import TopicError

    async with deadline(CALL_SECONDS, f"delete {args.delete}"):
        names = list(await broker.topics())
        if args.delete not in names:
            hint = did_you_mean(args.delete, names) or "; `rowmill topics` lists what there is"
            raise TopicError(f"no topic {args.delete!r} on {shown_broker(args)}{hint}")
        if not args.yes:
            count = (await _counts(broker, {args.delete: (await broker.topics())[args.delete].partitions}))[args.delete]
            raise ConfigError("--delete", args.delete, f"this removes {plural(count, 'record')} for good; add --yes")
        await broker.delete_topics([args.delete])
    say(f"deleted {args.delete} on {shown_broker(args)}", quiet=args.quiet)
    return 0


async def _list(args: argparse.Namespace, broker: Broker) -> int:
    from ...state.codec import dumps
    from ..deadlines import deadline
    from ..own_topics import purpose_of

    async with deadline(CALL_SECONDS, "list topics"):
        partitions = {name: info.partitions for name, info in sorted((await broker.topics()).items())}
        counts = await _known_counts(broker, partitions)
    if args.json:
        for name, number in partitions.items():
            purpose = {"holds": purpose_of(name)} if purpose_of(name) else {}
            line = {"topic": name, "partitions": number, "records": counts[name], **purpose}
            print(dumps(line).decode())
        return 0
    if not partitions:
        say(f"no topics on {shown_broker(args)}", quiet=args.quiet)
        return 0
    lines = [
        (name, f"{number:,}", "?" if (count := counts[name]) is None else f"{count:,}", purpose_of(name))
        for name, number in partitions.items()
    ]
    print(table([("topic", "partitions", "records", ""), *lines], right=[1, 2]))
    if not broker.url.startswith("local://"):
        say("records: at most; transaction markers and compacted records are counted too", quiet=args.quiet)
    return 0


async def _known_counts(broker: Broker, partitions: dict[str, int]) -> dict[str, int | None]:
    """The counts; None for topics that vanish while they are asked for, which the Kafka client waits for at length."""
    from ..deadlines import deadline
    from ..errors import BrokerError, TopicError

    with suppress(BrokerError, TopicError):
        async with deadline(_ALL_SECONDS, "count records"):
            return {**await _counts(broker, partitions)}
    counts: dict[str, int | None] = dict.fromkeys(partitions)
    for name, number in partitions.items():
        with suppress(BrokerError, TopicError):
            async with deadline(_TOPIC_SECONDS, f"count the records of {name}"):
                counts |= await _counts(broker, {name: number})
    return counts


async def _counts(broker: Broker, partitions: dict[str, int]) -> dict[str, int]:
    """Offsets from the first to the end, by topic."""
    from ...state.model import TopicPartition

    every: list[TopicPartition] = [TopicPartition(t, p) for t, number in partitions.items() for p in range(number)]
    earliest = await broker.offsets(every, "earliest")
    ends = await broker.offsets(every, "end")
    counts = dict.fromkeys(partitions, 0)
    for tp in every:
        counts[tp.topic] += ends[tp] - earliest[tp]
    return counts
