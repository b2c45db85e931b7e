"""Golden files: weights, inputs and outputs of released PyTorch modules in fp32.

A file holds weights (`state.NAME`, torch layout), inputs and outputs (`io.NAME`, channels first),
of a second network too where it has one (`weak_state.NAME`), and the module's arguments.
"""

import inspect
import json
from functools import cache
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"


@cache
def golden(*names):
    """(config, {group: {name: array}}) of a file, or of several that hold one network's parts."""
    with safe_open(GOLDEN / f"{names[0]}.safetensors", "numpy") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
    groups = {}
    for name in names:
        for key, value in load_file(GOLDEN / f"{name}.safetensors").items():
            group, _, rest = key.partition(".")
            groups.setdefault(group, {})[rest] = value
    return config, groups


def arguments_of(module, config):
    """Those entries of a config that the module's constructor takes."""
    taken = inspect.signature(module.__init__).parameters
    return {key: value for key, value in config.items() if key in taken}


def channels_last(arrays):
    """{name: array} with the images and maps among them channels last."""
    return {key: np.moveaxis(x, 1, -1) if x.ndim == 4 else x for key, x in arrays.items()}


def check(name, got, want, tolerance=1e-5):
    """Largest difference over largest expected value."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    difference = np.max(np.abs(got - want)) / np.max(np.abs(want))
    assert difference <= tolerance, f"{name}: relative difference {difference:.2e}"
