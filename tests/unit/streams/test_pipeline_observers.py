"""Pipelines and those who watch them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from rowmill import ConfigError, Pipeline
from rowmill.handlers.observers import ExecutionObserver, LoggingObserver


def test_adding_observers() -> None:
    """They are kept in order, and the calls chain."""
    first, second = ExecutionObserver(), LoggingObserver()
    pipeline = Pipeline("p")
    assert not pipeline.observers
    assert pipeline.add_observer(first).add_observer(second) is pipeline
    assert pipeline.observers == (first, second)
    assert copy.copy(pipeline).observers == (first, second)


@pytest.mark.parametrize("given", [None, "LoggingObserver", LoggingObserver, object()])
def test_what_is_no_observer(given: Any) -> None:
    """It is refused at once, and nothing is added."""
    pipeline = Pipeline("p")
    with pytest.raises(ConfigError, match=r"^add_observer\(observer\): "):
        pipeline.add_observer(given)
    assert pipeline.observers == ()
