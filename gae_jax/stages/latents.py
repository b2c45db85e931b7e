"""``latents``: encode every training image once, with exact statistics."""

import collections
import contextlib
import hashlib
import itertools
import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from gae_jax.config import bind
from gae_jax.config.precision import settings
from gae_jax.data.latent_files import DTYPES
from gae_jax.data.latent_shards import ShardFile, finish_set, finished_shards
from gae_jax.nn.pixels import to_float
from gae_jax.nn.quantized import with_matmuls
from gae_jax.run.load import load
from gae_jax.run.run import StageFolder
from gae_jax.run.session import Session
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import DataError, Preempted
from gae_jax.runtime.mesh import BATCH, check_batch, jit_on, local_part, local_rows, put_rows
from gae_jax.runtime.progress import Progress, Stopwatch, duration
from gae_jax.tokenizers import tokenizer_network
from gae_jax.train.preemption import Notice

AHEAD = 2  # batches on the device while one is fetched, so that it does not wait for the copy
UNWRITTEN = 32  # batches in memory that wait for the disk


class ShardWriter:
    """Writes the latents of images that come in order, shard by shard.

    A thread writes while the device works; its errors are raised by `add` or `close`. Incomplete
    shards are removed.

    Args:
      images: number of images in the source.
      shard_size: number of images in a shard; the last one may have fewer.
      writes: whether this process writes; of those that hold the same rows, one does.
      elements: as of `data.latent_shards.ShardFile`.
    """

    def __init__(
        self, folder, *, images: int, shard_size: int, writes: bool, tokenizer: str, elements: bool
    ):
        self._folder, self._images, self._shard_size = folder, images, shard_size
        self._writes, self._tokenizer, self._elements = writes, tokenizer, elements
        self._shard: ShardFile | None = None
        self._seen = self._kept = 0  # images of this shard
        self._failed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._unwritten: collections.deque[Future] = collections.deque()

    def add(self, batch: dict[str, np.ndarray], latents: np.ndarray) -> None:
        """Take a batch in the order of the source; images that could not be read are left out.

        Args:
          batch: "index" of the images in the source, "label" and "valid", [n].
          latents: [n, views, h, w, d].
        """
        if not self._writes:
            return
        while len(self._unwritten) >= UNWRITTEN:
            self._unwritten.popleft().result()
        self._unwritten.append(self._thread.submit(self._write, batch, latents))

    def _write(self, batch: dict[str, np.ndarray], latents: np.ndarray) -> None:
        if self._failed:  # a shard without some rows would seem complete
            return
        try:
            self._append(batch, latents)
        except BaseException:
            self._failed = True
            raise

    def _append(self, batch: dict[str, np.ndarray], latents: np.ndarray) -> None:
        shards = batch["index"] // self._shard_size
        ends = np.flatnonzero(np.diff(shards)) + 1
        for first, end in itertools.pairwise([0, *ends, len(shards)]):
            self._append_to(int(shards[first]), batch, latents, slice(first, end))

    def _append_to(self, index: int, batch: dict, latents: np.ndarray, rows: slice) -> None:
        if self._shard is None:
            shape = latents.shape[1:]
            made = ShardFile(self._folder, index, shape, latents.dtype, elements=self._elements)
            self._shard, self._seen, self._kept = made, 0, 0
        valid = batch["valid"][rows].astype(bool)
        self._shard.add(latents[rows][valid], batch["label"][rows][valid].astype(np.int32))
        self._seen += len(valid)
        self._kept += int(valid.sum())
        if self._seen == min(self._shard_size, self._images - index * self._shard_size):
            self._shard.finish(skipped=self._seen - self._kept, tokenizer=self._tokenizer)
            self._shard = None

    def close(self) -> None:
        """Wait until all complete shards are written."""
        self._thread.shutdown()
        if self._shard:
            self._shard.discard()
        while self._unwritten:
            self._unwritten.popleft().result()


def extract(
    session: Session,
    folder: StageFolder,
    *,
    batch_size: int,
    shard_size: int,
    dtype: str,
    statistics: str,
    variance_only: bool,
) -> dict:
    """Write the latents of the training split; returns their manifest.

    Processes have different shards but encode together: a batch's rows on a process are of its
    shards. Complete shards of an interrupted session, with any number of processes, are kept.

    Args:
      dtype: that latents are kept in, of `data.latent_files.DTYPES`.
      statistics, variance_only: as `data.latent_shards.finish_set` has them.

    Raises:
      Preempted: after a notice; complete shards are kept.
      ConfigError: for matmuls that this machine lacks.
      DataError: if none of the images can be read, or there are shards of another tokenizer.
    """
    check_batch(batch_size, session.mesh, "latents.batch_size")
    source, mesh = session.source("train"), session.mesh
    how = settings(session.config, "encoder")
    network, arrays = load(session.run.stage("tokenizer"), mesh, **how)
    mirror, tokenizer = session.data.mirror, session.fingerprint_of("tokenizer")
    count = -(-len(source) // shard_size)

    def complete_shards():
        for unfinished in folder.path.glob(".latents-*"):  # of a session that was killed
            unfinished.unlink()
        return finished_shards(folder.path, count, tokenizer=tokenizer)

    done = distributed.agree(complete_shards)

    @jit_on(mesh, out_shardings=NamedSharding(mesh, BATCH))
    def encode(arrays, images):
        images = to_float(images)
        model = network(*arrays)
        views = [model.encode(images)]
        if mirror:
            views.append(model.encode(images[:, :, ::-1]))
        return jnp.stack(views, axis=1).astype(DTYPES[dtype])

    rows = local_rows(mesh, batch_size)
    # processes that hold the same rows (of an axis tensor across them) read the same shards
    held = distributed.gather([int(rows[0]), len(rows)])
    firsts = sorted({first for first, _ in held})
    missing = [index for index in range(count) if index not in set(done)]
    taken = {first: missing[at :: len(firsts)] for at, first in enumerate(firsts)}
    indices = {
        first: np.concatenate([np.arange(len(source))[s * shard_size : (s + 1) * shard_size]
                               for s in shards] or [np.zeros(0, int)])
        for first, shards in taken.items()
    }  # fmt: skip
    steps = max(-(-len(indices[first]) // size) for first, size in held)
    mine = indices[int(rows[0])]
    writer = ShardWriter(
        folder.path,
        images=len(source),
        shard_size=shard_size,
        writes=held.index([int(rows[0]), len(rows)]) == distributed.index(),
        tokenizer=tokenizer,
        elements=statistics == "element",
    )
    ready = sum(min(shard_size, len(source) - s * shard_size) for s in done)
    waiting: collections.deque = collections.deque()

    def inside_of(first: int, step: int) -> int:
        """Number of images, without padding, in the rows of a batch from ``first`` on."""
        return min(max(len(indices[first]) - step * len(rows), 0), len(rows))

    def fetch():
        batch, inside, output = waiting.popleft()
        if inside:
            rows = {name: batch[name][:inside] for name in ("index", "label", "valid")}
            writer.add(rows, local_part(output)[:inside])

    with contextlib.ExitStack() as contexts:
        progress = contexts.enter_context(
            Progress("latents", len(source), done=ready, unit="image")
        )
        notice = contexts.enter_context(Notice())
        contexts.callback(writer.close)  # also if the loop fails: complete shards are kept
        batches = session.data.ordered(source, len(rows), indices=mine, batches=steps)
        for step, batch in enumerate(batches):
            inside = inside_of(int(rows[0]), step)
            images = put_rows(batch["image"], mesh, batch_size)
            waiting.append((batch, inside, encode(arrays, images)))
            if len(waiting) > AHEAD:  # the device works while a batch is fetched
                fetch()
            progress.update(sum(inside_of(first, step) for first in firsts))
            if notice.due() and step + 1 < steps:
                while waiting:
                    fetch()
                raise Preempted(
                    f"latents: asked to stop ({notice.name}); complete shards are kept, the same "
                    "command resumes from there",
                    notice.number,
                )
        while waiting:
            fetch()
    distributed.barrier(f"latents {folder.path}")

    def finish():
        manifest = finish_set(
            folder.path,
            count,
            dtype=dtype,
            statistics_of=statistics,
            variance_only=variance_only,
            tokenizer=tokenizer,
            source=repr(source),
            views=["image", "mirror"] if mirror else ["image"],
        )
        if not manifest["count"]:
            raise DataError(f"none of the {len(source)} images of {source!r} can be read")
        return manifest

    return distributed.agree(finish)


def run(session: Session) -> StageFolder:
    """Encode the training images, unless the run has their latents."""
    folder = session.open("latents", sections=("seed", "data", "latents"), inputs=("tokenizer",))
    if not folder.done:
        watch = Stopwatch()
        section = bind(extract, session.config.latents, "latents")
        manifest = extract(session, folder, **section)
        folder.finish(
            seconds=watch.seconds,
            fingerprint=hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:16],
            count=manifest["count"],
            skipped=manifest["skipped"],
        )
        logging.info(
            "latents: %d images in %s, %d skipped",
            *(manifest["count"], duration(watch.seconds), manifest["skipped"]),
        )
    return folder


def check(session: Session) -> None:
    """Raises ConfigError if latents are to be made with matmuls that this machine lacks."""
    if session.fresh or not session.run.stage("latents").done:
        matmuls = settings(session.config, "encoder")["matmuls"]
        with_matmuls(tokenizer_network(session.config), matmuls)
