"""Drivers: they parse flags, run the library and write files."""

import sys

if sys.argv[:1] == ["-m"]:  # so it is before `python -m` has found, and imported, the driver
    from experiments import interrupt

    interrupt.from_the_start(sys.orig_argv)
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show must not end a run
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
