"""``latents``: every training image through the encoder, once, with exact statistics."""

import hashlib
import logging

import jax
import numpy as np

from gae_jax.config import bind
from gae_jax.data.images import to_float
from gae_jax.data.latents import LatentWriter
from gae_jax.parallel import check_batch, put_batch
from gae_jax.run import StageFolder, Stopwatch
from gae_jax.stages.load import load
from gae_jax.stages.session import Session
from gae_jax.train.log import Progress, duration


def extract(session: Session, folder: StageFolder, *, batch_size: int, shard_size: int) -> dict:
    """Writes the latents of the training split and returns their manifest."""
    check_batch(batch_size, session.mesh, "latents.batch_size")
    source = session.source("train")
    network, arrays = load(session.run.stage("tokenizer"), session.mesh)
    mirror = session.data.mirror

    @jax.jit
    def encode(arrays, images):
        images = to_float(images)
        model = network(*arrays)
        views = [model.encode(images)]
        if mirror:
            views.append(model.encode(images[:, :, ::-1]))
        return jax.numpy.stack(views, axis=1)

    for stale in folder.path.glob("l*-*.npy"):  # an interrupted extraction starts over
        stale.unlink()
    writer = LatentWriter(
        folder.path, shard_size=shard_size, channels=network(*arrays).latent_shape[-1]
    )
    skipped = 0
    with Progress("latents", len(source), unit="image") as progress:
        for batch in session.data.ordered(source, batch_size):
            latents = jax.device_get(encode(arrays, put_batch(batch["image"], session.mesh)))
            valid = batch["valid"]
            writer.add(latents[valid], batch["label"][valid])
            count = min(batch_size, len(source) - progress.done)
            skipped += count - int(valid.sum())
            progress.update(count)
    return writer.close(
        tokenizer=session.fingerprint_of("tokenizer"),
        source=repr(source),
        views=["image", "mirror"] if mirror else ["image"],
        skipped=skipped,
    )


def run(session: Session) -> StageFolder:
    """Extracts the latents, unless the run has them."""
    folder = session.open("latents", sections=("seed", "data", "latents"), inputs=("tokenizer",))
    if not folder.done:
        watch = Stopwatch()
        section = bind(extract, session.config.latents, "latents")
        manifest = extract(session, folder, **section)
        digest = hashlib.sha256(repr(manifest).encode())
        for path in sorted(folder.path.glob("l*-*.npy")):
            digest.update(np.load(path, mmap_mode="r").tobytes())
        folder.finish(
            seconds=watch.seconds,
            fingerprint=digest.hexdigest()[:16],
            count=manifest["count"],
            skipped=manifest["skipped"],
        )
        logging.info(
            "latents: %d images in %s, %d skipped",
            *(manifest["count"], duration(watch.seconds), manifest["skipped"]),
        )
    return folder
