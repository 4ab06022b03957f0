"""The fault matrix: one scenario per fault type."""

from __future__ import annotations

from . import faults
from .failpoints import POINTS, STORE_POINTS
from .proxy import APIS
from .run import Scenario

_AT = {
    "after-sends": "SIGKILL after the sends, before the offsets",
    "after-offsets": "SIGKILL after the offsets are in the transaction",
    "before-end": "SIGKILL just before the end of the transaction",
    "amid-end": "SIGKILL while the transaction ends",
    "after-end": "SIGKILL after the end of the transaction",
    "before-store": "SIGKILL before the local store's write",
    "after-store": "SIGKILL after the local store's write",
}


def matrix() -> list[Scenario]:
    """All scenarios, in the order in which they run."""
    return [*_kills(), *_groups(), *_brokers(), *_replies(), *_disks(), _refusal(), _retention()]


def short() -> list[Scenario]:
    """A selection for CI: a kill at each failpoint, a worker stopped in the middle of a transaction, lost replies."""
    kills = Scenario(
        "kill-each", "SIGKILL at each failpoint in turn", faults.strikes, times=7, seconds=20, session=3,
        failpoints=(*POINTS, *STORE_POINTS), passages=12,
    )  # fmt: skip
    zombie = Scenario("zombie", "", faults.zombies, times=1, seconds=8, session=3)
    lost = Scenario("swallow-EndTxn", "", faults.swallowed_replies("EndTxn", "close"), times=3, seconds=5, proxied=True)
    return [kills, zombie, lost]


def _kills() -> list[Scenario]:
    points = [*POINTS, *STORE_POINTS]
    found = [
        Scenario(
            f"kill-{point}", _AT[point], faults.strikes, times=15, seconds=35, session=3, share=0.5,
            failpoints=(point,),
        )
        for point in points
    ]  # fmt: skip
    hundred = Scenario(
        "kill-100", "SIGKILL at random times, one to all of three workers", faults.random_kills, times=110,
        seconds=150, workers=3, session=3,
    )  # fmt: skip
    deadly = Scenario(
        "deadly-rows", "rows that SIGKILL the process that runs them (a dead letter each after 3 watched deaths)",
        faults.deadly_rows, times=9, seconds=40, session=3, share=0.25, deadly=3,
    )  # fmt: skip
    return [*found, hundred, deadly]


def _groups() -> list[Scenario]:
    return [
        Scenario(
            "zombie", "SIGSTOP until others took over, then SIGCONT; every other time in the middle of a transaction",
            faults.zombies, times=6, seconds=70,
        ),
        Scenario(
            "storm", "a worker added, killed or stopped every two to four seconds", faults.comings_and_goings,
            times=25, seconds=75,
        ),
    ]  # fmt: skip


def _brokers() -> list[Scenario]:
    bounces = [
        Scenario("broker-kill", "broker SIGKILL and restart", faults.broker_kills, 4, 70, owns_kafka=True),
        Scenario("broker-term", "broker SIGTERM and restart", faults.broker_stops, 4, 60, owns_kafka=True),
    ]
    freezes = [
        Scenario(
            f"broker-freeze-{seconds}", f"broker SIGSTOP for {seconds} s", faults.broker_freezes(seconds), times,
            times * (seconds + 6), owns_kafka=True,
        )
        for seconds, times in ((5, 4), (20, 2), (70, 1))
    ]  # fmt: skip
    return [*bounces, *freezes]


def _replies() -> list[Scenario]:
    return [
        Scenario(
            f"swallow-{api}-{then}", f"reply to {api} swallowed, connection {_THEN[then]}",
            faults.swallowed_replies(api, then), times, seconds, share=0.5, proxied=True,
        )
        for then, times, seconds in (("close", 12, 25), ("stall", 3, 40))
        for api in APIS
    ]  # fmt: skip


_THEN = {"close": "closed", "stall": "left silent"}


def _disks() -> list[Scenario]:
    return [
        Scenario(
            "stores-damaged", "files of the local tables cut, flipped or removed between runs", faults.damaged_stores,
            times=8, seconds=70, session=3,
        ),
        Scenario(
            "disk-full", "the disk of the local tables full for 8 s", faults.full_disk, times=3, seconds=45,
            small_disk=48, share=0.5,
        ),
    ]  # fmt: skip


def _refusal() -> Scenario:
    return Scenario(
        "sink-refuses", "the sink's max.message.bytes cut to 300 and restored (expected: workers end with TopicError)",
        faults.sink_refuses, times=2, seconds=30, share=0.25, may_give_up=True,
    )  # fmt: skip


def _retention() -> Scenario:
    return Scenario(
        "retention", "rows removed past the committed offset (expected: OffsetOutOfRangeError, then a reset by hand)",
        faults.retention, times=2, seconds=40, share=0.25, may_give_up=True,
    )  # fmt: skip
