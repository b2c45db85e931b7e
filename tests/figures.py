"""The rows of metrics.csv that a run is to have again, whatever the machine does."""

from pathlib import Path

from gae_jax.train.log import read_metrics


def figures_of(folder: Path) -> list[dict[str, float]]:
    """The rows without the time that steps waited for data."""
    return [
        {name: value for name, value in row.items() if name != "data_wait"}
        for row in read_metrics(folder)
    ]
