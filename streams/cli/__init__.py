"""The command line: one file per command, each with ``add_parser`` and ``main(args) -> int``.

Only ``argparse`` and what it needs is imported to show a help text; each command imports the rest when it runs.
"""
