"""Several processes that run one program, on JAX's own runtime.

Every process runs the same commands in the same order; arrays are global (see `parallel`). What a
directory holds is looked up by the first process, which tells the others (`agree`), and files of a
run are written by the first process (`files`): so all of them take the same way.
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

# How long a file that the first process wrote may stay unseen by others: network file systems
# remember for some seconds that a file was not there.
SEEN_WITHIN = 120.0


class FailedAttempt(Exception):
    """What `attempt` was to do has failed; nothing waits for anything."""


_process = {"index": 0, "count": 1}
# (machine, its cores that a process may use) of every process; empty: this process is alone.
_cores: list[tuple[str, list[int]]] = []


def start(*, heartbeat_seconds: int = 100) -> None:
    """Joins the other processes; before anything asks for devices.

    The peers are found by JAX itself on TPU pods, GKE, Slurm and Open MPI, or by the environment
    variables JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID.

    Args:
      heartbeat_seconds: silence after which a process counts as lost and all stop.

    Raises:
      UserError: if the peers cannot be found or do not come.
    """
    import jax

    given = {
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
    """Of this process; 0 without `start`. Asks for no device."""
    return _process["index"]


def count() -> int:
    """Of processes; 1 without `start`."""
    return _process["count"]


def cores() -> int:
    """Number of cores that this process may use; of cores that several processes may use, its part.

    So that what every process starts "one for each core" of is one for each core of the machine.
    """
    machine, mine = _cores[index()] if _cores else ("", _allowed())
    shared = [theirs for where, theirs in _cores if where == machine] or [mine]
    users = collections.Counter(core for theirs in shared for core in theirs)
    return max(1, int(sum(1 / users[core] for core in mine) + 1e-6))


def cores_of_machine() -> int:
    """Number of cores that there are, whoever may use them."""
    return os.cpu_count() or 1


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(cores_of_machine()))


def _boot() -> str:
    """What tells machines apart, also where containers of one have names of their own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def is_first() -> bool:
    """Whether this is the process that writes the files of a run."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON value that every process gave, in the order of the processes, on all of them."""
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
    """What the function gives on the first process, which alone calls it, on all processes.

    Args:
      function: gives a JSON value.

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
    """What the function gives here; if it raises a UserError on any process, all raise it."""
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
    """What the function gives here, where it may fail without an end to the program.

    Args:
      function: computes together with the other processes.
      name: of this attempt, the same on all processes and never used again.
      within: seconds that a process waits for the others after its own.

    Raises:
      FailedAttempt: on all processes, if it failed on one of them.
      Exception: the function's own, or that of the barrier, if the others do not come: they wait
        for this process inside of the function, and the program must end.
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


def barrier(name: str) -> None:
    """Returns when all processes are here."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def await_file(path: Path, within: float = SEEN_WITHIN) -> None:
    """Returns when a file that another process has written is seen here.

    Raises:
      UserError: if it is not within so many seconds.
    """
    end = time.monotonic() + within
    while not path.exists():
        if time.monotonic() > end:
            raise UserError(
                f"process {index()} does not see {path}, which another process wrote; the run "
                "directory (--workdir) must lie on a file system that all hosts mount"
            )
        time.sleep(0.05)
