"""Numbers and names of a run's classes."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from gae_jax.config import bind
from gae_jax.data.pipeline import ImageData
from gae_jax.run.contents import read_contents
from gae_jax.run.run import Run
from gae_jax.runtime.errors import UserError

NO_CLASS = "none"  # asks for images without a class


def recorded_names(run: Run) -> list[str]:
    """Names of the run's classes in the order of their numbers; empty if they are unknown.

    Stages record them; a run of an older version takes them from its images, if those have not
    moved.
    """
    stages = ("diffusion", "latents", "tokenizer", "backbone")
    for name in stages:
        folder = run.stage(name)
        if train := read_contents(folder).get("train"):
            return list(train.class_names)
        if names := (folder.done or {}).get("class_names"):
            return list(names)
    for name in stages:
        try:
            section = run.stage(name).config["data"]
            return list(ImageData(**bind(ImageData, section, "data")).source("train").class_names)
        except (UserError, OSError, KeyError, TypeError):
            continue
    return []


def recorded_root(run: Run) -> str:
    """Folder of the images that the run was trained on; empty if no stage records it."""
    for name in ("diffusion", "latents", "tokenizer", "backbone"):
        try:
            return run.stage(name).config["data"]["root"]
        except (UserError, OSError, KeyError, TypeError):
            continue
    return ""


WORD_LISTS = ("words.txt", "LOC_synset_mapping.txt")  # of Tiny-ImageNet and of Kaggle's ImageNet


def in_words(names: Sequence[str], root: str | Path) -> list[str]:
    """Replace synsets (n01443537) by the first of their words (goldfish), for people to read.

    Other names stay, and so do synsets that no list in the images' folder or the one above has.

    Args:
      root: folder of the images, ``data.root``.
    """
    synsets = {name for name in names if re.fullmatch(r"n\d{8}", name)}
    words: dict[str, str] = {}
    for folder in (Path(root), Path(root).parent):
        for file in WORD_LISTS if synsets and str(root) else ():
            try:
                lines = (folder / file).read_text(errors="replace").splitlines()
            except OSError:
                continue
            for line in lines:
                synset, _, rest = line.replace("\t", " ", 1).partition(" ")
                if synset in synsets and rest.strip():
                    words.setdefault(synset, rest.split(",")[0].strip())
    return [words.get(name, name) for name in names]


def class_of(
    text: str, count: int, names: list[str], flag: str = "--class", words: Sequence[str] = ()
) -> int | None:
    """Return the number of a class, or None for `NO_CLASS`.

    Args:
      text: number or name; ``number:7`` and ``name:7`` where a name is a number of another class.
      count: of classes.
      names: in the order of their numbers; may be empty.
      words: other names of the same classes, as of `in_words`.

    Raises:
      UserError: if there is no such class, naming the nearest.
    """
    kind, _, rest = text.strip().rpartition(":")
    what = rest if kind in ("number", "name") else text.strip()
    if kind not in ("number", "name") and what == NO_CLASS:
        return None
    is_number = re.fullmatch(r"[+-]?\d+", what)
    if kind == "number" or (is_number and kind != "name"):
        if not is_number or not 0 <= int(what) < count:
            raise UserError(f"{flag}={text}: there is no class {what}; they are 0 to {count - 1}")
        number = int(what)
        if not kind and what in names and names.index(what) != number:
            raise UserError(
                f"{flag}={text} has two meanings: class {number} is called {names[number]!r}, and "
                f"class {names.index(what)} is called {what!r}; write number:{what} or name:{what}"
            )
        return number
    if what in names:
        return names.index(what)
    alike = [i for i, name in enumerate(names) if _plain(name) == _plain(what)]
    alike = alike or [i for i, name in enumerate(words) if _plain(name) == _plain(what)]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise UserError(
            f"{flag}={text}: {len(alike)} classes have this name; give one of the numbers "
            f"{', '.join(map(str, alike))}"
        )
    if not names:
        raise UserError(
            f"{flag}={text}: the run does not record the names of its classes, and its images are "
            f"not where they were; give a number from 0 to {count - 1}"
        )
    names = list(words) or names
    near = difflib.get_close_matches(what, names, n=3, cutoff=0.4)
    say = (
        f"the nearest are {', '.join(near)}" if near else f"they begin with {', '.join(names[:3])}"
    )
    raise UserError(
        f"{flag}={text}: there is no class of that name among {len(names)}; {say} (or give a "
        f"number from 0 to {count - 1}, or {NO_CLASS})"
    )


def _plain(name: str) -> str:
    """Remove what is easily mistyped: case, spaces, underscores, hyphens."""
    return re.sub(r"[\s_-]+", "", name).casefold()
