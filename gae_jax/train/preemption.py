"""Notices that this machine is about to be taken away.

The notice is SIGTERM: Slurm, Kubernetes and a spot machine that shuts down send it by themselves,
`launch/tpu_worker.sh` on a notice of maintenance.
"""

import itertools
import signal
import threading

from jax.experimental import multihost_utils

from gae_jax import distributed

_calls, _told = itertools.count(1), threading.Event()  # of the process, in all its stages


class Notice:
    """Within it, SIGTERM is remembered instead of ending the process.

    With several processes JAX's own service catches it and tells the others, so that all stop at
    the same step.
    """

    def __init__(self):
        self._came, self._before = False, None

    def __enter__(self):
        # a signal can only be caught by the main thread
        if distributed.count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._catch)
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _catch(self, number, frame):
        self._came = True

    def due(self) -> bool:
        """Whether to save and stop after this step; every process calls it at every step."""
        if distributed.count() == 1:
            return self._came
        # The service stops all at the largest number that one of them had reached when the notice
        # came, and says so at that number alone; numbers must not begin again with the next stage.
        if multihost_utils.reached_preemption_sync_point(next(_calls)):
            _told.set()
        return _told.is_set()
