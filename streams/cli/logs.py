"""Logging of the command line: on standard error, warnings and worse unless more is asked for."""

from __future__ import annotations

import logging

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
_CLIENTS = ("aiokafka", "kafka")
_NAME = "rowmill-cli"


def set_up_logging(verbose: int, *, quiet: bool) -> None:
    """Send logs to standard error.

    Args:
        verbose: 0 for warnings, 1 for what happens, 2 for details.
        quiet: errors only.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == _NAME]:
        root.removeHandler(handler)  # main() may be called more than once in a process
    handler = logging.StreamHandler()
    handler.set_name(_NAME)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.ERROR if quiet else _LEVELS[min(verbose, 2)])
    for name in _CLIENTS:
        # The client logs every failed connection at ERROR; what matters of it comes as our own error. At DEBUG it
        # logs every request.
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL)
