"""Notices to stop: the machine is about to be taken away, or someone presses Ctrl-C.

The former is SIGTERM: Slurm, Kubernetes and preemptible machines send it before they stop a
process, `launch/tpu_worker.sh` when maintenance is announced. Ctrl-C is SIGINT.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading

from jax.experimental import multihost_utils

from gae_jax.runtime import distributed, lock
from gae_jax.runtime.signals import listening

_calls, _notified = itertools.count(1), threading.Event()  # of this process, over all its stages


class Notice:
    """A context in which SIGTERM and Ctrl-C are recorded instead of ending the process.

    With several processes, JAX's preemption service catches SIGTERM and notifies the others, so
    that all stop at the same step; Ctrl-C in one of them is passed on to that service.

    A second Ctrl-C ends the process at once, by a thread, since the main thread may be in a long
    computation. A checkpoint that is being written is then lost.
    """

    def __init__(self):
        self.number = signal.SIGTERM
        self._came, self._pressed, self._contexts = False, 0, contextlib.ExitStack()

    @property
    def name(self) -> str:
        """Name of the signal that came."""
        return "Ctrl-C" if self.number == signal.SIGINT else "SIGTERM"

    def __enter__(self):
        # a signal can only be caught by the main thread
        if threading.current_thread() is not threading.main_thread():
            return self
        numbers = [signal.SIGTERM] if distributed.count() == 1 else []
        if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):  # as under nohup
            numbers.append(signal.SIGINT)
        for number in numbers:
            self._contexts.callback(signal.signal, number, signal.signal(number, self._catch))
        self._contexts.enter_context(listening(self._hear))
        return self

    def __exit__(self, *_):
        self._contexts.close()

    def _catch(self, number, frame):
        if not self._came:
            self.number = signal.Signals(number)
        self._came = True
        if distributed.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, number: int) -> None:
        """Respond to Ctrl-C while the main thread may be busy."""
        if number != signal.SIGINT:
            return
        self._pressed += 1
        if self._pressed == 1:
            text = "Ctrl-C: saving and stopping; a second one stops at once without saving"
            print(f"\n{text}", file=sys.stderr, flush=True)
        else:
            text = "stopped at once; earlier checkpoints are kept"
            print(f"\n{text}", file=sys.stderr, flush=True)
            lock.release_all()
            os._exit(128 + signal.SIGINT)

    def due(self) -> bool:
        """Return whether to save and stop after this step; every process calls it at every step."""
        if distributed.count() == 1:
            return self._came
        # The service stops all processes at the largest number that any had reached when the notice
        # came, and reports it at that number only; numbers must not restart with the next stage.
        if multihost_utils.reached_preemption_sync_point(next(_calls)):
            _notified.set()
        return _notified.is_set()
