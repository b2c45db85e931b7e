"""Sampling from a run alone: what it records, with the classes and options that a caller gives."""

import dataclasses
import logging
from collections.abc import Sequence

import ml_collections
import numpy as np

from gae_jax.config import default_config, flatten, precision
from gae_jax.config.choices import choice_problems, declared
from gae_jax.config.ranges import range_problems
from gae_jax.config.renamed import modern
from gae_jax.config.sample import sample_clashes
from gae_jax.generators.sampling import SETS
from gae_jax.run.class_names import NO_CLASS, class_of, in_words, recorded_names, recorded_root
from gae_jax.run.run import Run
from gae_jax.run.sampling import bind_sampler
from gae_jax.runtime import ranges
from gae_jax.runtime.errors import UserError
from gae_jax.runtime.ranges import Range, whole

# Ranges of the numbers among the options.
LIMITS = {
    "count": whole(1, 10_000_000),
    "steps": whole(2),
    "guidance": ranges.GUIDANCE,
    "seed": ranges.SEED,
    "batch_size": ranges.COUNT,
}
BATCH_SIZE = 256  # images at once, over all devices, unless a caller asks otherwise


def is_interval(low: float, high: float) -> bool:
    """Whether these are times of guidance: 0 <= low <= high <= 1."""
    share = Range(0, 1)
    return not (share.problem(low) or share.problem(high)) and low <= high


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Which images to draw and how; None where the run's own value counts.

    Attributes:
      classes: numbers, or texts as of `class_names.class_of`; empty: all classes.
      count: of images of each class.
      sampler: "ode" or "sde".
      steps, method, guidance: fields of the section of that name in ``sample``.
      interval: times (low, high) at which guidance acts.
      seed: a different seed gives different images.
      batch_size: images at once, over all devices.
      flags: whether messages name options as the command line does (--guidance).

    Raises:
      UserError: for a number outside of its range.
    """

    classes: Sequence[int | str] = ()
    count: int = 4
    sampler: str = "ode"
    steps: int | None = None
    method: str | None = None
    guidance: float | None = None
    interval: tuple[float, float] | None = None
    seed: int = 0
    batch_size: int = BATCH_SIZE
    flags: bool = False

    def __post_init__(self):
        for name, allowed in LIMITS.items():
            value = getattr(self, name)
            if value is not None and (problem := allowed.problem(value)):
                raise UserError(f"{self.name(name)} is {value!r}; it must be {problem}")
        if self.sampler not in SETS:
            known = " or ".join(SETS)
            raise UserError(f"{self.name('sampler')} is {self.sampler!r}; use {known}")
        if self.interval is not None:
            try:
                low, high = self.interval
                valid = is_interval(low, high)
            except (TypeError, ValueError):
                valid = False
            if not valid:
                raise UserError(
                    f"{self.name('interval')} is {self.interval!r}; give (low, high) with "
                    "0 <= low <= high <= 1, 0 being noise"
                )

    def name(self, option: str) -> str:
        """The name of an option in messages."""
        if self.flags:
            return f"--{option.replace('_', '-')}"
        return "class_id" if option == "class" else option


def sampling_config(run: Run, options: SamplingOptions) -> ml_collections.ConfigDict:
    """Combine the defaults, the run's model and recorded sampling, and the options.

    Raises:
      UserError: if the run has no diffusion model, or an option is invalid.
    """
    config = default_config()
    run.require()
    diffusion, samples = run.stage("diffusion"), run.stage("sample")
    done, trained = diffusion.require_done(), diffusion.config.diffusion
    for name in ("num_classes", "class_dropout_prob"):
        config.diffusion.model[name] = trained.model[name]
    config.diffusion.flow.update(trained.flow)
    made = (
        samples.config
        if samples.done
        else modern({"sample": done.get("sampling", {}), "precision": done.get("precision", {})})
    )
    recorded, computed = made.get("sample", {}), precision.flat(made.get("precision", {}))
    for name in SETS:
        config.sample[name].update(recorded.get(name, {}))
    config.sample.update(
        weaker=recorded.get("weaker", ""),
        sets=(options.sampler,),
        batch_size=int(options.batch_size),
    )
    how = {key: value for key, value in computed.items() if key.endswith((".dtype", ".matmuls"))}
    precision.override(config, how)
    config.seed = int(options.seed)
    section = config.sample[options.sampler]
    if options.sampler not in recorded:
        logging.warning(
            "sample: no stage of %s records how it is sampled, so sample.%s has the defaults: %s, "
            "%d points, guidance %g (change them with %s, %s and %s)",
            *(run.path, options.sampler, section.method, section.steps, section.guidance),
            *(options.name(name) for name in ("method", "steps", "guidance")),
        )
    for name in ("steps", "method"):
        if (value := getattr(options, name)) is not None:
            section[name] = value if isinstance(value, str) else int(value)
    _set_guidance(section, options, run)
    sample = {path: value for path, value in flatten(config).items() if path.startswith("sample.")}
    default = default_config()
    names = {path: field for path, field in declared(default).items() if path in sample}
    problems = range_problems(sample, flatten(default))
    problems = problems or [*choice_problems(sample, names).values(), *sample_clashes(config)]
    if problems:
        raise UserError("\n".join(problems))
    return config


def _set_guidance(section, options: SamplingOptions, run: Run) -> None:
    """Set the guidance of a sampler's section by the options."""
    if options.guidance is not None:
        # one scale replaces the parts
        section.update(guidance=float(options.guidance), guidance_parts=())
    if options.interval is None:
        return
    if section.guidance_parts or section.guidance == 1:
        has = "a scale for every part of the time" if section.guidance_parts else "no guidance"
        has = f"{run.path} ({options.sampler}) has {has}"
        guidance = options.name("guidance")
        raise UserError(
            f"{options.name('interval')} says when guidance acts, but "
            f"{has if options.guidance is None else f'{guidance}=1 is no guidance'}; give "
            f"{guidance}=W too, other than 1"
        )
    section.guidance_start, section.guidance_end = map(float, options.interval)


def class_numbers(
    run: Run, count: int, classes: Sequence[int | str], flag: str
) -> list[int | None]:
    """Return the numbers of classes that are given by number or name; None: without a class.

    Args:
      count: of the model's classes.
      classes: numbers, or texts as of `class_names.class_of`.
      flag: the name of the option, for messages.

    Raises:
      UserError: for an unknown class, naming the nearest.
    """
    names = recorded_names(run)
    words = in_words(names, recorded_root(run))
    numbers: list[int | None] = []
    for given in classes:
        if isinstance(given, str):
            numbers.append(class_of(given, count, names, flag, words=words))
            continue
        if problem := Range(0, count - 1, whole=True).problem(given):
            raise UserError(f"{flag}={given!r}: there is no such class; give {problem}, or a name")
        numbers.append(int(given))
    return numbers


def labels_of(run: Run, config: ml_collections.ConfigDict, options: SamplingOptions) -> np.ndarray:
    """Make int32 labels of the images [n]; the number after the last class means without a class.

    Args:
      config: of `sampling_config`.

    Raises:
      UserError: for an unknown class, or if the model was not trained without classes.
    """
    count = config.diffusion.model.num_classes
    classes: list[int | None] = list(range(count))
    if options.classes:
        classes = class_numbers(run, count, options.classes, options.name("class"))
    if options.guidance == 0 and options.interval is None:
        classes = [None] * len(classes)
    if None in classes:
        asked = ("guidance", "0") if options.guidance == 0 else ("class", NO_CLASS)
        require_null_class(config, run, f"{options.name(asked[0])}={asked[1]}")
    labels = np.array([count if c is None else c for c in classes], np.int32)
    return np.repeat(labels, options.count)


def require_null_class(config: ml_collections.ConfigDict, run: Run, asked: str) -> None:
    """Raise UserError if the diffusion model was not trained without classes.

    Args:
      config: with the section ``diffusion`` of the model.
      asked: what asks for that, for the message.
    """
    if not config.diffusion.model.class_dropout_prob:
        raise UserError(
            f"{asked} is without a class, but the diffusion model of {run.path} was trained "
            "with class_dropout_prob 0 and knows no such images; leave the option out"
        )


def sampler_section(
    config: ml_collections.ConfigDict, options: SamplingOptions, labels: np.ndarray
) -> dict:
    """Return the arguments of the sampler that draws these labels."""
    section = bind_sampler(options.sampler, config.sample[options.sampler])
    if (labels == config.diffusion.model.num_classes).all():  # guidance has no effect then
        section |= {"guidance": 1.0, "guidance_parts": ()}
    return section
