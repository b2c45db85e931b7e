"""``python -m gae_jax``: the command line, which is `gae_jax.commands.cli`."""

import sys

from gae_jax.commands.cli import main
from gae_jax.runtime.outlet import Outlet

if __name__ == "__main__":
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    sys.exit(main(sys.argv))
