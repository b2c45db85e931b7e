"""``import-torch``: released checkpoints become the stages of a run directory."""

import logging
from pathlib import Path

from gae_jax.porting import torch_latents
from gae_jax.porting.importing import Incoming, convert, shape_of_latents, write_stage
from gae_jax.porting.sources import read_sources
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError


def run(session: Session) -> None:
    """Import all files that the config names, or none of them.

    Raises:
      UserError: if a file cannot be imported, or the run has other weights and ``--fresh`` is not
        given.
    """
    incoming: list[Incoming] = []
    for stage, source in read_sources(session).items():
        incoming.append(convert(session, stage, source, incoming))
    prints = {network.stage: network.fingerprint for network in incoming}
    present = {stage: session.run.stage(stage).done for stage in prints}
    for stage, done in present.items():
        if done and not session.fresh and done["fingerprint"] != prints[stage]:
            raise UserError(
                f"{session.run.path} already has a {stage} ({done['fingerprint']}, the file's is "
                f"{prints[stage]}); give another --workdir, or --fresh to replace it"
            )
    latents = None
    if path := session.config.import_torch.latents:
        what = "a set of latents, which does not say who made it,"
        latents = torch_latents.survey(Path(path), shape_of_latents(session, what))
    if (latents or "diffusion" in prints) and "tokenizer" not in prints:
        prints["tokenizer"] = session.fingerprint_of("tokenizer")
    if latents and torch_latents.is_imported(session, latents, prints["tokenizer"]):
        logging.info("import-torch: %s already has these", session.run.stage("latents").path)
        latents = None
    for network in incoming:
        folder = session.run.stage(network.stage)
        if present[network.stage] and not session.fresh:
            logging.info("import-torch: %s already has these weights", folder.path)
            continue
        write_stage(session, network, prints.get("tokenizer"))
        logging.info("import-torch: %s, %s", network.stage, folder.path)
    if latents:
        torch_latents.write_stage(session, latents, prints["tokenizer"])
        logging.info("import-torch: latents, %s", session.run.stage("latents").path)
