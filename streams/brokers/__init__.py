"""Where topics live: one port (``base``), two adapters (``kafka``, ``local``), opened by URL (``open``)."""
