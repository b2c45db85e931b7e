"""Several processes that run one program, on JAX's distributed runtime.

Every process runs the same commands in the same order; arrays are global (see `mesh`). Only the
first process looks at the files of a run and tells the others what it found (`agree`), and only it
writes them (`files`), so that all processes take the same decisions.
"""

import collections
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gae_jax.runtime.errors import UserError

# Seconds until a file that the first process wrote must be visible to the others: network file
# systems cache for some time that a file does not exist.
SEEN_WITHIN = 120.0


class FailedAttempt(Exception):
    """The function of an `attempt` has failed, on one process or more; all have returned."""


_process = {"index": 0, "count": 1}
# (machine, cores that the process may use) of every process; empty: there is one process only.
_cores: list[tuple[str, list[int]]] = []


def start(*, heartbeat_seconds: int = 100) -> None:
    """Connect to the other processes; to be called before anything asks for devices.

    JAX finds the processes itself on TPU pods, GKE, Slurm and Open MPI, else by the environment
    variables JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID.

    Args:
      heartbeat_seconds: without a heartbeat for so long a process counts as lost and all stop.

    Raises:
      UserError: if the other processes cannot be found or do not connect.
    """
    import jax

    given: dict[str, Any] = {
        name: int(os.environ[variable])
        for name, variable in (
            ("num_processes", "JAX_NUM_PROCESSES"),
            ("process_id", "JAX_PROCESS_ID"),
        )
        if variable in os.environ
    }
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=heartbeat_seconds)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: the processes did not come together: {error}\n"
            "start the same command on all hosts; where JAX does not know the cluster, set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    _process.update(index=jax.process_index(), count=jax.process_count())
    _cores[:] = [(machine, cores) for machine, cores in gather([_boot(), _allowed()])]


def index() -> int:
    """Return the index of this process; 0 without `start`. Initializes no device."""
    return _process["index"]


def count() -> int:
    """Return the number of processes; 1 without `start`."""
    return _process["count"]


def cores() -> int:
    """Return the number of cores for this process; cores are shared evenly among processes.

    If every process starts one worker for each of its cores, a machine has one for each core.
    """
    machine, mine = _cores[index()] if _cores else ("", _allowed())
    shared = [theirs for where, theirs in _cores if where == machine] or [mine]
    users = collections.Counter(core for theirs in shared for core in theirs)
    return max(1, int(sum(1 / users[core] for core in mine) + 1e-6))


def cores_of_machine() -> int:
    """Return the number of cores of the machine, usable by this process or not."""
    return os.cpu_count() or 1


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(cores_of_machine()))


def _boot() -> str:
    """Identify the machine; containers on one machine share it, whatever their host names."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def is_first() -> bool:
    """Whether this is the process that writes the files of a run."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """Gather a JSON value of every process, in the order of the processes, on all of them."""
    if count() == 1:
        return [json.loads(json.dumps(value))]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def agree(function: Callable[[], Any]) -> Any:
    """Call the function on the first process only; return its result on all processes.

    Args:
      function: returns a JSON value.

    Raises:
      UserError: on every process, if the function raised one on the first.
    """
    if count() == 1:
        return function()
    answer = None
    if is_first():
        try:
            answer = {"value": function()}
        except UserError as error:
            answer = {"error": str(error)}
            failure = error
    answer = gather(answer)[0]
    if "error" in answer:
        raise failure if is_first() else UserError(answer["error"])
    return answer["value"]


def all_well(function: Callable[[], Any]) -> Any:
    """Call the function on every process; if it raises a UserError on any of them, all raise it."""
    result = failed = None
    try:
        result = function()
    except UserError as error:
        failed = error
    messages = gather(str(failed) if failed else None)
    if failed:
        raise failed
    for process, text in enumerate(messages):
        if text is not None:
            raise UserError(f"process {process}: {text}")
    return result


def attempt(function: Callable[[], Any], name: str, within: float = SEEN_WITHIN) -> Any:
    """Call a function whose failure must not end the program, on every process.

    Args:
      function: may compute together with the other processes.
      name: of this attempt, the same on all processes and used only once.
      within: seconds that a process waits for the others after its own call.

    Raises:
      FailedAttempt: on all processes, if the function failed on one of them.
      Exception: the function's, or the barrier's, if the other processes do not arrive: they wait
        for this one inside the function, and the program must end.
    """
    result = failed = None
    try:
        result = function()
    except Exception as error:
        failed = error
    texts = [failed and f"{type(failed).__name__}: {failed}"]
    if count() > 1:
        from orbax.checkpoint import multihost

        try:
            multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(1000 * within))
        except Exception as error:
            raise failed or error from None
        texts = gather(texts[0])
    if any(texts):
        raise FailedAttempt(next(text for text in texts if text)) from failed
    return result


LEAVE_WITHIN = 3.0  # seconds that a process waits for the others before it ends


def leave_together() -> None:
    """Wait shortly for the others before this process ends, and let the first one end last.

    JAX's coordinator lives in the first process: where it ends sooner, JAX aborts the others
    instead of letting them return their exit status. Others that do not end are not waited for.
    """
    if count() == 1:
        return
    from orbax.checkpoint import multihost

    try:
        multihost.get_barrier_sync_fn()(key="leaving", timeout_ms=int(1000 * LEAVE_WITHIN))
    except Exception:  # they are gone or busy, and this process ends in any case
        return
    if is_first():
        time.sleep(0.5)  # until the others have ended


def barrier(name: str) -> None:
    """Wait until all processes have called this."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def await_file(path: Path, within: float = SEEN_WITHIN) -> None:
    """Wait until a file that another process has written is visible here.

    Raises:
      UserError: if it is not visible within ``within`` seconds.
    """
    end = time.monotonic() + within
    while not path.exists():
        if time.monotonic() > end:
            raise UserError(
                f"process {index()} does not see {path}, which another process wrote; the run "
                "directory (--workdir) must lie on a file system that all hosts mount"
            )
        time.sleep(0.05)
