"""``export-torch``: a folder with the run's weights for the released PyTorch code."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from gae_jax.porting.exporting import FILES, why_not, write_folder
from gae_jax.run.session import Session
from gae_jax.runtime.errors import UserError


def run(session: Session) -> None:
    """Write the folder completely, or not at all.

    Raises:
      UserError: if it exists and ``--fresh`` is not given, or the run has nothing to export.
    """
    config = session.config.export_torch
    folders = {name: session.run.stage(name) for name in config.networks}
    known = [*FILES, "latents"]
    if unknown := folders.keys() - set(known):
        raise UserError(f"export_torch.networks: {sorted(unknown)} unknown; use {known}")
    folders = {name: folder for name, folder in folders.items() if folder.done}
    left_out = {name: why_not(folder) for name, folder in folders.items()}
    left_out = {name: why for name, why in left_out.items() if why}
    for name, why in left_out.items():
        print(f"\n{name}: left out; {why}")
        del folders[name]
    if not config.networks:
        raise UserError(f"export_torch.networks is empty; name some of {known}")
    if not folders:
        raise UserError(
            f"{session.run.path} has no finished {' or '.join(config.networks)} to export"
            + "".join(f"; {name}: {why}" for name, why in left_out.items())
            + "; train or import one first"
        )
    target = Path(config.folder) if config.folder else session.run.path / "export"
    if target.exists() and not session.fresh:
        raise UserError(
            f"{target} exists; pass --fresh to replace it, or --config.export_torch.folder=DIR"
        )
    if target.exists() and not (target / "config.json").exists():
        raise UserError(f"--fresh: {target} was not made by gae_jax; remove it yourself")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        write_folder(session, folders, draft)
        if target.exists():
            shutil.rmtree(target)
        os.chmod(draft, 0o755)  # mkdtemp makes folders that only their owner may read
        os.replace(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    logging.info("export-torch: %s", target)
