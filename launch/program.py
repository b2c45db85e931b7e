"""Runs a gae_jax command, or a script, so that its exit status tells a crash from bad input.

    python launch/program.py COMMAND [ARGUMENT ...]     as python -m gae_jax COMMAND ...
    python launch/program.py FILE.py [ARGUMENT ...]     as python FILE.py ...

Python ends with status 1 after an exception that nobody caught, and gae_jax ends with status 1
for input that a person has to mend. The launch scripts run the first again and not the second,
so the first ends with status 70 here (EX_SOFTWARE of sysexits.h). All other statuses stay.
"""

import runpy
import sys
import traceback
from pathlib import Path

CRASHED = 70


def run(argv: list[str]) -> int | str | None:
    """Runs what the arguments name; returns what is to be given to `sys.exit`."""
    if argv[0].endswith(".py"):
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        return 0
    from gae_jax.commands.cli import main

    return main(["gae_jax", *argv])


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the package is found without being installed
    if len(sys.argv) < 2 or sys.argv[1] in ("--help", "-h"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 1)
    try:
        status = run(sys.argv[1:])
    except Exception:  # whatever it was, the launcher is to know it from an error of use
        traceback.print_exc()
        status = CRASHED
    sys.exit(status)
