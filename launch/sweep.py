"""Runs a sweep of configs/sweeps/ and writes its table; ``python launch/sweep.py --help``."""

import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the package is found without being installed
    # before the imports, among which is one whose own warning would set up logging otherwise
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from gae_jax.sweep import main

    sys.exit(main(sys.argv[1:]))
