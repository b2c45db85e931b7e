"""Damaged inputs for every reader of files: nothing but a UserError that names the file may come.

    python tests/fuzz.py --count=10000 --seed=0 [--only=KIND]

Each input is one file of a sound sample (`fuzz_readers`) that is damaged (`fuzz_damage`), read in
a child process under limits of time and memory. Exit status 1 if a reader raised anything else,
named no file, hung, took too much memory or died; all are printed with what makes them again.
"""

import argparse
import collections
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fuzz_damage
import fuzz_run_readers  # noqa: F401, adds its kinds
from fuzz_readers import KINDS

LIMIT = 20.0  # seconds of one input
MEMORY = 1 << 30  # bytes beyond what a process has after all sound samples were read


def _names_folder(folder: Path, text: str) -> bool:
    """Whether a text names the folder itself, and not another file in it."""
    return bool(re.search(re.escape(str(folder)) + r"(?![\w/.-])", text))


def _try(kind: str, seed: int, samples: Path, scratch: Path) -> tuple[str, str]:
    """("read", "refused" or what was wrong, and the details) of one input."""
    from gae_jax.runtime.errors import UserError

    rng = random.Random(f"{kind} {seed}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(samples / kind, scratch)
    files = [
        path
        for path in sorted(scratch.rglob("*"))
        if path.is_file()
        and not any(x in str(path.relative_to(scratch)) for x in KINDS[kind].spared)
    ]
    victim = rng.choice(files)
    how = rng.random()
    if how < 0.01:
        victim.unlink()
    elif how < 0.02:
        victim.unlink()
        victim.mkdir()
    else:
        victim.write_bytes(fuzz_damage.damage(rng, victim.suffix, victim.read_bytes()))
    name = victim.relative_to(scratch)
    try:
        KINDS[kind].read(scratch)
    except UserError as error:
        named = [victim.parent, *scratch.glob(KINDS[kind].whole or "none")]
        inside = [folder for folder in named if victim.is_relative_to(folder)]
        if victim.name in str(error) or any(_names_folder(x, str(error)) for x in inside):
            return "refused", ""
        return "names no file", f"{name}: {error}"
    except MemoryError:
        return "memory", f"{name}: {traceback.format_exc(limit=-3)}"
    except BaseException:
        return "raised", f"{name}: {traceback.format_exc(limit=-3)}"
    return "read", ""


def _read_sound(kind: str, folder: Path) -> None:
    from gae_jax.runtime.errors import UserError

    try:
        KINDS[kind].read(folder)
    except UserError as error:
        if "torch is not installed" not in str(error):
            raise


def _work(pipe, kinds: list[str], folder: str) -> None:
    """A child: makes the samples, then reads damaged copies, told by seed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not os.environ.get("FUZZ_STDERR"):
        os.dup2(1, 2)
    logging.disable(logging.CRITICAL)
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    samples, scratch = Path(folder) / "samples", Path(folder) / "damaged"
    for kind in kinds:
        if not (samples / kind).exists():
            (samples / kind).mkdir(parents=True)
            KINDS[kind].make(samples / kind)
        shutil.copytree(samples / kind, scratch, dirs_exist_ok=True)
        _read_sound(kind, scratch)
        shutil.rmtree(scratch)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        pipe.send(_try(*task, samples, scratch))


class _Child:
    """The process that reads; another one takes its place when it hung or died."""

    def __init__(self, kinds: list[str], folder: str):
        self._arguments = (kinds, folder)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            ready = self._pipe.poll(120) and self._pipe.recv()
        except EOFError:
            ready = None
        if ready != "ready":
            raise RuntimeError("the sound samples cannot be made or read: set FUZZ_STDERR=1")

    def read(self, kind: str, seed: int) -> tuple[str, str]:
        self._pipe.send((kind, seed))
        try:
            if self._pipe.poll(LIMIT):
                return self._pipe.recv()
            result = ("hung", f"more than {LIMIT} s")
        except EOFError:
            self._process.join()
            result = ("died", f"exit status {self._process.exitcode}")
        self._process.kill()
        self._start()
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def fuzz(count: int, seed: int, kinds: list[str]) -> tuple[dict, list[tuple[str, int, str, str]]]:
    """Reads ``count`` damaged inputs, of the kinds by turns.

    Returns:
      (kind -> result -> number, the failures: kind, seed, what, details).
    """
    tally: dict[str, collections.Counter] = {kind: collections.Counter() for kind in kinds}
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        child = _Child(kinds, folder)
        try:
            for number in range(count):
                kind = kinds[number % len(kinds)]
                what, details = child.read(kind, seed + number // len(kinds))
                tally[kind][what] += 1
                if what not in ("read", "refused"):
                    failures.append((kind, seed + number // len(kinds), what, details))
        finally:
            child.close()
    return tally, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*KINDS])
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    kinds = [options.only] if options.only else [*KINDS]
    start = time.monotonic()
    tally, failures = fuzz(options.count, options.seed, kinds)
    groups: dict[tuple, list] = {}
    for kind, seed, what, details in failures:
        place = details.splitlines()[-1] if what != "names no file" else details
        groups.setdefault((kind, what, zlib.crc32(place[:60].encode())), []).append((seed, details))
    for (kind, what, _), cases in groups.items():
        seeds = ", ".join(str(seed) for seed, _ in cases[:5])
        print(f"\n{kind}: {what}, {len(cases)} times, --only={kind} --count=1 --seed={seeds}")
        print(cases[0][1])
    print()
    for kind, results in tally.items():
        print(f"{kind:<20}", ", ".join(f"{n} {what}" for what, n in sorted(results.items())))
    print(f"{options.count} inputs, {len(failures)} failures, {time.monotonic() - start:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
