"""The commands, the help text that lists them, and what they keep when they are interrupted."""

USAGE = """\
gae_jax: train, sample and evaluate semantically aligned image tokenizers.

usage: python -m gae_jax COMMAND --config=FILE [--workdir=DIR] [--fresh] [--config.KEY=VALUE ...]
       python -m gae_jax COMMAND RUN [--fresh] [--config.KEY=VALUE ...]
       python -m gae_jax COMMAND RUN [--amend] [--from-step=N] [--config.KEY=VALUE ...]

commands, in the order of the pipeline:
{commands}

options:
  RUN                   the directory of an existing run, whose recorded config is used
  --config=FILE         a config, e.g. configs/demo.py; its fields are documented in
                        gae_jax/config/
  --config.KEY=VALUE    change one field, e.g. --config.tokenizer.losses.align=0
  --config.precision=P  how networks are computed: exact (float32), fast (bfloat16), or auto, which
                        is fast on GPUs and TPUs where training was shown to learn alike;
                        --config.precision.NETWORK.FIELD=VALUE overrides it for one network, such as
                        --config.precision.diffusion.dtype=float32
  --workdir=DIR         the run's directory (default: runs/NAME, NAME as in configs/NAME.py, and
                        runs/NAME-ARGUMENT for configs/NAME.py:ARGUMENT)
  --fresh               delete what the stage left in the run and start it over
  --amend               resume training with changed fields or images, from the last checkpoint,
                        or beyond the end with more steps; the change is recorded in the stage and
                        in all that is built on it
  --from-step=N         resume from an earlier checkpoint; later ones are removed
  --distributed         one of several processes that run the same command: the hosts of a TPU pod,
                        the tasks of a Slurm job, or those that JAX_COORDINATOR_ADDRESS,
                        JAX_NUM_PROCESSES and JAX_PROCESS_ID name; they share the run directory
  --topology=T          for plan: a target topology such as v5p-64 or v5p:4x4x4; no hardware needed
  --heartbeat_seconds=N silence after which a process counts as lost and the others stop (100)
  --help                this text; behind a command, also the fields that it reads

commands with their own options (see COMMAND --help):
{own}

A finished stage is skipped, an interrupted one resumes from its last checkpoint. On Ctrl-C and
SIGTERM training saves the current step and exits with status 130 or 143; a second Ctrl-C exits at
once.

examples:
  python -m gae_jax demo --config=configs/demo.py
  python -m gae_jax tokenizer --config=configs/demo.py --workdir=runs/mine --fresh
  python -m gae_jax demo --config=configs/folder.py --workdir=runs/birds \\
      --config.data.root=/data/birds
  python -m gae_jax import-torch --config=configs/gae_d32.py --workdir=runs/released \\
      --config.import_torch.tokenizer=gae_d32.ckpt
  python -m gae_jax import-torch --config=configs/fae.py:siglip2 --workdir=runs/fae \\
      --config.import_torch.backbone=siglip2-giant-opt-patch16-256/  # folder with index and parts
  python -m gae_jax export-torch runs/demo
  python -m gae_jax sample runs/demo --class=7 --count=16 --guidance=3.3
"""

# Command -> (module with a function run(session), what it does). Those of the pipeline, in order:
PIPELINE: dict[str, tuple[str, str]] = {
    "backbone": ("stages.backbone", "train a small ViT instead of DINOv2"),
    "teacher": ("stages.teacher", "train the semantic downsampler by distilling the backbone"),
    "tokenizer": ("stages.tokenizer", "train the autoencoder"),
    "latents": ("stages.latents", "encode the training set, with exact statistics"),
    "diffusion": ("stages.diffusion", "train LightningDiT on the latents"),
    "sample": ("stages.sample", "draw images of every class, unguided and guided"),
    "evaluate": ("stages.evaluate", "measure reconstructions, latents and samples"),
    "report": ("stages.report", "write report.html and result.json"),
}
ANALYSES: dict[str, tuple[str, str]] = {
    "reference": ("stages.reference", "statistics of the data for FID and related metrics"),
    "likelihood": (
        "stages.likelihood",
        "log-likelihood of held-out images' latents, by the flow's ODE",
    ),
    "doctor": ("commands.doctor", "try on every host what a long run needs, before it starts"),
    "bench": ("commands.bench", "time training, sampling and metrics on random weights and data"),
    "plan": (
        "commands.plan",
        "memory, communication and hours of every stage on a target topology",
    ),
}
WEIGHTS: dict[str, tuple[str, str]] = {
    "import-torch": ("commands.import_torch", "make stages of a run from released checkpoints"),
    "export-torch": (
        "commands.export_torch",
        "write the run's weights for the released PyTorch code",
    ),
}
TRAINING = frozenset({"backbone", "teacher", "tokenizer", "diffusion"})
# `plan` does not touch this machine's devices, `doctor` tells all that is wrong at once.
UNCHECKED = frozenset({"plan", "doctor"})
COMMANDS = PIPELINE | ANALYSES | WEIGHTS
# Command -> (module with USAGE and a function main(arguments), usage in short, what it does).
OWN: dict[str, tuple[str, str, str]] = {
    "sample": (
        "commands.draw",
        "sample RUN",
        "a few images as PNG files, from a run directory alone",
    ),
    "evaluate-samples": (
        *("commands.evaluate_samples", "evaluate-samples --samples=X --ref=Y"),
        "FID and related metrics of any set of images",
    ),
    "prepare-data": (
        *("commands.prepare_data", "prepare-data --source=DIR --out=DIR"),
        "ImageNet or class folders as ArrayRecord shards",
    ),
    "compare": (
        "commands.compare",
        "compare A.json B.json",
        "how two results differ, protocol first",
    ),
}

# Commands as earlier versions named them.
ALIASES = {"teacher-backbone": "backbone", "make-reference": "reference"}
# What an interrupted command keeps; others start over.
KEPT = {
    **dict.fromkeys(TRAINING, "checkpoints are kept, and training resumes from the last one"),
    "latents": "complete shards are kept",
    "sample": "complete batches are kept",
    "sample RUN": "images that are written are kept, but all are drawn again",
    "evaluate": "statistics of the training images are kept, all else is measured again",
    "demo": "finished stages are kept, and the interrupted one resumes",
    "prepare-data": "complete shards are kept",
}


def usage() -> str:
    def lines_of(commands):
        return [f"  {name:<20}  {what}" for name, (_, what) in commands.items()]

    lines = [
        *lines_of(PIPELINE),
        f"  {'demo':<20}  all of the above, one after the other",
        "",
        "beside the pipeline:",
        *lines_of(ANALYSES),
        "",
        "weights from and for PyTorch:",
        *lines_of(WEIGHTS),
    ]
    own = [f"  {short:<38}  {what}" for _, short, what in OWN.values()]
    return USAGE.format(commands="\n".join(lines), own="\n".join(own))
