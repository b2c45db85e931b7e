"""The sections ``data`` and ``mesh``, and their checks."""

from ml_collections.config_dict import FieldReference

from gae_jax.config.choices import choice


def data_section() -> dict:
    """Which images there are, and how they are read."""
    return dict(
        # digits | folder | tfds | array_record, see docs/data.md
        name=choice("folder", "data.sources:SOURCES"),
        # folder: where the class folders are; tfds: TFDS's data_dir; array_record: what
        # `prepare-data` wrote. The last two may be gs://
        root="",
        dataset="imagenet2012:5.*.*",  # tfds: name and version
        holdout=0.0,  # share of the images held out, where the source has no split of its own
        image_size=256,
        crop=choice("center", "random"),  # after the ADM resize
        mirror=True,  # horizontal mirror images make sense for this data
        on_corrupt=choice("error", "skip"),  # skipped images are counted and named
        # ignore | apply: EXIF orientations; ImageNet's protocols ignore them
        exif=choice("ignore", "data.decoding:EXIF"),
        # processes that decode; "auto": one for each core, none for few images or for one core;
        # 0: none, threads read
        workers=FieldReference("auto", field_type=object),
        # of decoded, cut images: none | memory | disk, see docs/data.md
        cache=choice("none", "data.cache:CACHES"),
        cache_dir="",  # where `disk` keeps them; empty: ~/.cache/gae_jax (or XDG_CACHE_HOME)
    )


def mesh_section() -> dict:
    """How the devices are arranged."""
    return dict(
        data=-1,  # devices per axis; -1 takes what is left
        fsdp=1,  # parameters, optimizer and EMA are split over it, as the batch is
        tensor=1,  # heads and MLPs are split over it
        slices=0,  # groups with a slow network between them, over which data is split; 0: as found
        preset="",  # or a machine of gae_jax/runtime/machines.py, such as "v5p-64", for its mesh
    )


def data_clashes(data) -> list[str]:
    """List the problems of the section ``data``."""
    from gae_jax.data.pipeline import AUTO  # a slow import

    workers = str(data.workers)
    if workers != AUTO and not workers.isdecimal():
        what = f"give a number of processes (0: threads read), or {AUTO!r}"
        return [f"data.workers is {data.workers!r}; {what}"]
    return []


def mesh_clashes(mesh) -> list[str]:
    """List the problems of the section ``mesh``, whatever the devices."""
    rest = [name for name in ("data", "fsdp", "tensor") if mesh[name] == -1]
    if len(rest) < 2:
        return []
    return [f"mesh.{' and mesh.'.join(rest)} are -1; one axis alone can take what is left"]
