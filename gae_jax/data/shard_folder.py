"""The output folder of ``prepare-data``: reusing shards, and a manifest that is always correct."""

import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gae_jax.data import shards
from gae_jax.runtime.errors import ConfigError, UserError
from gae_jax.runtime.files import read_json, write_json

Plan = Mapping[str, Mapping[str, list[shards.Example]]]  # split -> name of a shard -> its images
REMEDY = "write the folder again with: prepare-data --fresh"  # of a damaged manifest
_LEFTOVERS = (".manifest.json.*", ".*.array_record*.partial")  # of killed sessions


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Create the folder and lock it against other prepare-data processes.

    Raises:
      UserError: if another one writes there, or the folder cannot be created.
    """
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--out is {str(folder)!r}; ArrayRecord needs a name in UTF-8") from None
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another prepare-data is writing into {folder}; wait for it, or choose another "
                "--out"
            ) from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(handle)


class ShardFolder:
    """The shards of a plan, in a folder.

    Args:
      plan: what the folder will hold.

    Attributes:
      done: name -> entry in the manifest, for the complete shards.
    """

    def __init__(self, path: Path, class_names: list[str], plan: Plan):
        self._path, self._class_names, self._plan = path, class_names, plan
        self.manifest_path = path / "manifest.json"
        self.done: dict[str, dict[str, Any]] = {}
        self._facts: dict[str, Any] = {}

    def add(self, entry: dict[str, Any]) -> None:
        """List a complete shard in the manifest."""
        self.done[entry["name"]] = entry
        self.write_manifest()

    def write_manifest(self) -> dict[str, Any]:
        names = {split: list(parts) for split, parts in self._plan.items()}
        manifest = shards.manifest_of(self._class_names, names, self.done, **self._facts)
        write_json(self.manifest_path, manifest)
        return manifest

    def take_over(self, facts: dict[str, Any], *, fresh: bool) -> None:
        """Reuse the shards of earlier sessions that hold the images of a shard of this plan.

        Their names may differ: removed images, or --on-corrupt=skip, change the other shards only.
        Shards that are not in the plan are removed, after the manifest has stopped listing them.

        Args:
          facts: for the manifest; "made_of" is compared with the existing manifest's.
          fresh: reuse none.

        Raises:
          UserError: if finished shards of other images or made with other options would be lost.
        """
        self._facts = facts
        strays = sorted(self._path.glob("*.array_record"))
        if strays and not self.manifest_path.exists():
            raise UserError(
                f"{self._path} has shards, such as {strays[0].name}, but no manifest.json; choose "
                "another --out, or remove them yourself"
            )
        moved = {} if fresh else self._kept_of_last_session()
        self.write_manifest()
        for old, entry in moved.items():
            os.replace(self._path / old, self._path / entry["name"])
            self.add(entry)
        planned = {name for parts in self._plan.values() for name in parts}
        for path in self._path.glob("*.array_record"):
            listed = path.name in self.done or (path.name in planned and not fresh)
            if re.fullmatch(shards.SHARD_NAME, path.name) and not listed:
                path.unlink()
        for pattern in _LEFTOVERS:
            for leftover in self._path.glob(pattern):
                leftover.unlink()

    def _kept_of_last_session(self) -> dict[str, dict[str, Any]]:
        """Put shards that keep their names into ``done``; return the others by old name.

        Raises:
          UserError: as `take_over`.
        """
        if not self.manifest_path.exists():
            return {}
        manifest = read_json(self.manifest_path, remedy=REMEDY)
        shards.check_manifest(manifest, self.manifest_path, complete=False)
        reusable = {
            (split, entry.get("listing")): entry
            for split, facts in manifest["splits"].items()
            for entry in facts["shards"]
            if (file := self._path / entry["name"]).exists()
            and file.stat().st_size == entry["bytes"]
        }
        moved: dict[str, dict[str, Any]] = {}
        for split, parts in self._plan.items():
            for name, part in parts.items():
                entry = reusable.get((split, shards.listing_of(part)))
                if entry is None or not self._is_as_asked_for(entry, manifest):
                    continue
                if entry["name"] == name:
                    self.done[name] = entry
                elif not (self._path / name).exists():
                    moved[entry["name"]] = {**entry, "name": name}
        lost = len(reusable) - len(self.done) - len(moved)
        if lost:
            self._check_that_loss_is_meant(manifest, lost)
        return moved

    def _is_as_asked_for(self, entry: dict, manifest: dict) -> bool:
        """Return whether the current options would make the same shard of these images."""
        made_of, wanted = manifest.get("made_of", {}), self._facts["made_of"]
        if wanted["check"] and not entry.get("checked"):
            return False
        same = all(made_of.get(key) == wanted[key] for key in ("check", "on_corrupt"))
        return same or not entry.get("skipped")

    def _check_that_loss_is_meant(self, manifest: dict, lost: int) -> None:
        made_of, wanted = manifest.get("made_of", {}), self._facts["made_of"]
        changed = not set(manifest["class_names"]) & set(self._class_names)
        if manifest["complete"] or changed or made_of.get("shard_images") != wanted["shard_images"]:
            differing = [
                f"  {key}: {made_of.get(key)!r} there, {value!r} asked for"
                for key, value in wanted.items()
                if made_of.get(key) != value
            ]
            raise UserError(
                f"{self._path} was made of other images or with other options:\n"
                + "\n".join(differing)
                + "\nchoose another --out, or --fresh to start over"
            )
        logging.warning(
            "prepare-data: %d finished shards are made again, since their images changed", lost
        )
