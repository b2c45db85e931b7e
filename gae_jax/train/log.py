"""Metrics of a stage: a CSV file and TensorBoard events."""

import csv
import io
import logging
import math
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from gae_jax.runtime.distributed import is_first
from gae_jax.runtime.errors import refusal
from gae_jax.runtime.files import explained, write_bytes, writing


class Metrics:
    """Writes the scalars of a stage to ``metrics.csv`` and TensorBoard, in the first process.

    Rows beyond ``step``, written by a session that was killed after its last checkpoint, are
    dropped, so a resumed run has one row per step.
    """

    def __init__(self, folder: Path, step: int):
        self._path = folder / "metrics.csv"
        self._rows = [row for row in read_metrics(folder) if row["step"] <= step]
        self._writes = is_first()
        self._events: SummaryWriter | None = None  # None too if writing them has failed
        if self._writes:
            after = step + 1 if step else None
            with writing(folder / "events"):
                self._events = SummaryWriter(str(folder / "events"), purge_step=after)
        self._columns = list(dict.fromkeys(key for row in self._rows for key in row))
        self._rewrite()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write the row of a step."""
        if not self._writes:
            return
        row = {"step": step, **values}
        self._rows.append(row)
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            self._rewrite()
        else:
            with writing(self._path), self._path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        self._show(step, values)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add values to the row of a step; they are on disk when this returns."""
        if not self._writes or not values:
            return
        if not (self._rows and self._rows[-1]["step"] == step):
            self._rows.append({"step": step})
        self._rows[-1] |= values
        self._columns += [key for key in self._rows[-1] if key not in self._columns]
        self._rewrite()
        self._show(step, values)

    def _show(self, step: int, values: dict[str, float]) -> None:
        if events := self._live_events():
            for name, value in values.items():
                events.add_scalar(name, value, step)

    def _live_events(self) -> SummaryWriter | None:
        """Return what writes events; None if nothing does.

        A thread of the library writes them and ends at an error, such as a full disk; giving it
        more events would then block for ever.
        """
        if self._events is None or self._events.file_writer is None:
            return None
        writer = self._events.file_writer.event_writer
        if writer._worker.is_alive():
            return self._events
        logging.warning("%s could not be written; there are no more of them", writer.get_logdir())
        writer._event_queue.cancel_join_thread()
        self._events = None
        return None

    def column(self, name: str) -> dict[int, float]:
        """Return step -> a metric, where it was measured, earlier sessions included."""
        return {int(row["step"]): row[name] for row in self._rows if name in row}

    def evaluated(self, step: int) -> bool:
        """Return whether the step has metrics of an evaluation."""
        rows = [row for row in self._rows if row["step"] == step]
        return any(name.startswith("eval/") for row in rows for name in row)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write an image, uint8 [H, W, 3], to TensorBoard only."""
        if events := self._live_events():
            events.add_image(name, pixels, step, dataformats="HWC")

    def _rewrite(self) -> None:
        text = io.StringIO()
        if self._columns:
            writer = csv.DictWriter(text, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)
        write_bytes(self._path, text.getvalue().encode())

    def close(self) -> None:
        """Write the last events and end their thread."""
        if events := self._live_events():
            try:
                events.close()
            except OSError as error:
                logging.warning("events: %s", refusal(error, self._path.parent) or error)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the rows of a stage's ``metrics.csv``; a row without a metric lacks its key.

    Raises:
      UserError: if the file was not written by `Metrics`.
    """
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with explained(path, "move it away and run again"), path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames and "step" not in reader.fieldnames:
            raise ValueError("it has no column step")
        rows = map(_numbers, reader)
        return [{**row, "step": int(row["step"])} for row in rows if row]


def _numbers(row: dict) -> dict[str, float]:
    """Return a row's numbers; {} for an incomplete row, which a killed process may leave."""
    try:
        numbers = {key: float(value) for key, value in row.items() if value}
    except (ValueError, TypeError):  # of a line that is too long the rest is a list
        return {}
    return numbers if math.isfinite(numbers.get("step", math.nan)) else {}
