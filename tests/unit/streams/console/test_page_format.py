"""How the console's pages write figures."""

from __future__ import annotations

from typing import Any

import pytest
from rowmill.streams.console import page_format as form


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (form.count(None), form.UNKNOWN),
        (form.count(12_345), "12,345"),
        (form.count(12.0), "12"),
        (form.rate(None), form.UNKNOWN),
        (form.rate(0), "0"),
        (form.rate(0.254), "0.25"),
        (form.rate(8.44), "8.4"),
        (form.rate(1_204.4), "1,204"),
        (form.seconds(None), form.UNKNOWN),
        (form.seconds(0), "0 ms"),
        (form.seconds(0.00002), "20 µs"),
        (form.seconds(0.0000021), "2.1 µs"),
        (form.seconds(0.0021), "2.1 ms"),
        (form.seconds(0.182), "182 ms"),
        (form.seconds(0.9996), "1.00 s"),
        (form.seconds(48.1), "48 s"),
        (form.seconds(185), "3 min 05 s"),
        (form.seconds(7_620), "2 h 07 min"),
        (form.seconds(356_400), "4 d 3 h"),
        (form.size(812), "812 B"),
        (form.size(3_200), "3.1 KiB"),
        (form.size(5 * 2**30), "5.0 GiB"),
        (form.money(None), form.UNKNOWN),
        (form.money("0.000"), "0"),
        (form.money("1234.5"), "1,234.50"),
        (form.money("0.01230"), "0.0123"),
        (form.money("0.0000001"), "1.00E-7"),
        (form.money("much"), "much"),
        (form.percent(0), "0 %"),
        (form.percent(0.001), "< 1 %"),
        (form.percent(0.9999), "> 99 %"),
        (form.percent(1.2), "120 %"),
        (form.plural(1, "row"), "1 row"),
        (form.plural(1_200, "dead letter"), "1,200 dead letters"),
        (form.utc(0), "1970-01-01 00:00:00 UTC"),
        (form.machine_time(1_795_312_800_123), "2026-11-22T02:00:00.123Z"),
        (form.machine_time(None), ""),
    ],
)
def test_figures_have_their_units(shown: str, expected: str) -> None:
    """Numbers are grouped, small and large ones readable, and what nobody knows is a dash."""
    assert shown == expected


@pytest.mark.parametrize("moment", [-1, 10**18, 253_402_300_800_000])
def test_any_moment_can_be_shown(moment: int) -> None:
    """Producers date their records as they like; a page shows them all the same."""
    assert form.utc(moment).endswith("UTC")
    assert form.machine_time(moment).endswith("Z")


@pytest.mark.parametrize(
    ("text", "expected"), [("2026-11-22T02:00:00Z", 1_795_312_800_000), (None, None), ("soon", None)]
)
def test_texts_become_moments(text: str | None, expected: int | None) -> None:
    """Times of ``rowmill status --json`` are texts."""
    assert form.milliseconds_of(text) == expected


def test_a_line_breaks_where_nothing_is_known() -> None:
    """Two pieces around the gap; a lonely figure is a dash that can be seen."""
    drawn = form.spark([0, 10, None, 5, None], width=100, height=22)
    assert drawn.lines == ("0,21 25,1", "75,11 87.5,11")
    assert drawn.areas[0] == "0,22 0,21 25,1 25,22"
    assert (drawn.highest, drawn.last) == (10, 5)


@pytest.mark.parametrize("figures", [[], [None] * 5, [0.0] * 5])
def test_lines_of_nothing(figures: list[float | None]) -> None:
    """No figures, no line; only zeros, a flat one."""
    drawn = form.spark(figures)
    assert drawn.highest == 0
    assert len(drawn.lines) == (1 if 0.0 in figures else 0)


@pytest.mark.parametrize(
    ("part", "whole", "expected"), [(1, 3, 33.3), (5, 0, 0), (None, 3, 0), (9, 3, 100), (-1, 3, 0)]
)
def test_bars_stay_in_their_frame(part: Any, whole: Any, expected: float) -> None:
    """A part of a whole is between 0 and 100, whatever the figures are."""
    assert form.share(part, whole) == expected


def test_every_state_has_a_shape_of_its_own_word() -> None:
    """A state is told by word and shape, never by its colour alone; an unknown one is shown as it is."""
    assert form.look("half_open").word == "half open"
    assert form.look("brand-new").word == "brand-new"
    assert form.look(None).word == "unknown"
    assert (
        len({form.look(state).icon for state in ("executing", "paused", "idle", "failed", "completed", "cancelled")})
        == 6
    )


def test_events_in_a_line() -> None:
    """Messages come first, long lists are cut, nested values are left out."""
    data = {"attempts": 4, "message": "no luck", "partitions": list(range(9)), "totals": {"rows": 1}, "note": None}
    assert form.event_line({"data": data}) == "no luck · attempts 4 · partitions 0, 1, 2, 3, 4, 5 …"
    assert form.event_line({"data": "odd"}) == ""


def test_policies_in_a_line() -> None:
    """Only what happened is told."""
    assert form.stage_line({"calls": 9, "retries": 1_200, "timeouts": 0, "hits": 3}) == "1,200 retried · 3 cached"
    assert form.stage_line({}) == ""


def test_a_call_takes_some_time() -> None:
    """What is below a microsecond is not shown as nothing; the rest as any span of time."""
    assert [form.latency(each) for each in (None, 0.0, 4e-6)] == [form.UNKNOWN, "< 1 µs", "4.0 µs"]
