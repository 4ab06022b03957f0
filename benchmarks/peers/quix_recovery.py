"""P8's peer: Quix Streams fills its state, and restores it into an empty folder.

State is a JSON object of about 100 bytes for each key, as rowmill's in benchmarks/restore.py. How long the recovery
takes is what its own log says: from "Beginning recovery check" to "Recovery process complete". Settings are those of
with_quix.py. Rows after the recovery prove that the state is there: their results tell what was found under their keys.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from benchmarks.child import RECOVERED, begin_once, settings
from benchmarks.peers.with_quix import make_application
from benchmarks.rows import Row


class Recovery(logging.Handler):
    """Hears from the library's log when a recovery begins and ends."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("Beginning recovery"):
            self._began = time.monotonic(), time.process_time()
        elif text.startswith("Recovery process complete"):
            wall, cpu = self._began
            told = {"seconds": time.monotonic() - wall, "cpu": time.process_time() - cpu}
            Path(settings().folder, RECOVERED).write_text(json.dumps(told))


def keep(row: Row, state: Any) -> Row:
    """Keep the row's content, and tell what was there before."""
    begin_once()
    before = state.get("kept")
    state.set("kept", row["kept"])
    return {"id": row["id"], "before": before}


def main() -> None:
    said = settings()
    logger = logging.getLogger("quixstreams")
    application = make_application(said)
    logger.setLevel(logging.INFO)
    logger.addHandler(Recovery())
    frame = application.dataframe(application.topic(said.source)).apply(keep, stateful=True)
    frame.to_topic(application.topic(said.sink))
    application.run()


if __name__ == "__main__":
    main()
