"""The names of all files in a run folder, and the list of its checkpoints.

RUN/config.yaml                      the resolved configuration
RUN/metrics.jsonl, RUN/tensorboard/  records of training
RUN/samples/step-*.png               previews
RUN/nearest.png, RUN/nearest.json    the last preview with the nearest training image beside each
                                     sample, and how far they are
RUN/report.html                      all of this on a page
RUN/results.json                     what `diffussm eval RUN` measured last; in RUN/images, of those
                                     images
RUN/skipped.jsonl                    images that could not be read, with data.skip_unreadable
RUN/data.json                        where the training images were, how many, and a hash of their
                                     list
RUN/checkpoints/step-*/              model, ema, optimizer (.safetensors), state.json
.../teacher.safetensors              in checkpoints of a model of the mean velocity: the
                                     weights that it began with
RUN/final/                           model.safetensors (averaged weights) and config.yaml: all that
                                     sampling needs; and a model card and a pipeline of diffusers,
                                     see publish.py
.../ema-DECAY.safetensors            in both: each further average, if train.ema lists several
RUN/snapshots/step-*/                width-WIDTH.safetensors, for --ema-width, and state.json
.../width-WIDTH.safetensors          in checkpoints too: averages with a power-function profile
RUN/best/                            the same at the lowest FID, with metrics.json

state.json holds the step, the hashes of the weights beside it, and a hash of its own values.
"""

import re
from pathlib import Path

from diffussm_cli.config import CONFIG, run_folders

STATE, MODEL, METRICS = "state.json", "model.safetensors", "metrics.json"
EMA, OPTIMIZER = "ema.safetensors", "optimizer.safetensors"
TEACHER = "teacher.safetensors"
CHECKPOINTS, FINAL, BEST, SAMPLES, BOARD = "checkpoints", "final", "best", "samples", "tensorboard"
SNAPSHOTS = "snapshots"
LOG, SKIPPED, DATA = "metrics.jsonl", "skipped.jsonl", "data.json"
REPORT, RESULTS = "report.html", "results.json"
NEAREST, NEAREST_FACTS = "nearest.png", "nearest.json"
CARD, IMAGE = "README.md", "samples.png"
# of a model on the hub; code is not among them
FILES_TO_SAMPLE = [CONFIG, STATE, METRICS, MODEL, "ema-*.safetensors"]
# All that a run may hold before its first checkpoint.
BEFORE_CHECKPOINTS = {CONFIG, LOG, BOARD, SAMPLES, SKIPPED, DATA, REPORT, "wandb", CHECKPOINTS}
BEFORE_CHECKPOINTS |= {SNAPSHOTS}


def ema_file(decay: float | str) -> str:
    """File of the average with this decay (`*`: a pattern for all). The first average has a name of
    its own: EMA in checkpoints, MODEL in `final/`.
    """
    return f"ema-{decay}.safetensors"


def width_file(width: float | str) -> str:
    """The file of an average with a power-function profile (`*`: a pattern for all)."""
    return f"width-{width}.safetensors"


def newest_run(folder: Path, name: str | None = None) -> Path | None:
    """The run in `folder` whose configuration was written last; with a name, only NAME, NAME-2,
    NAME-3, ... count.
    """
    roots = run_folders(folder)
    if name is not None:
        roots = [root for root in roots if re.fullmatch(re.escape(name) + r"(-\d+)?", root.name)]
    return max(roots, key=lambda root: (root / CONFIG).stat().st_mtime, default=None)


def checkpoint_name(step: int) -> str:
    """The folder name of a step; names sort in the order of steps."""
    return f"step-{step:08d}"


def list_snapshots(root: Path) -> list[Path]:
    """The complete snapshots of a run, oldest first."""
    return list_checkpoints(root, SNAPSHOTS)


def list_checkpoints(root: Path, folder: str = CHECKPOINTS) -> list[Path]:
    """The complete checkpoints of a run, oldest first; a folder counts only under its final
    name.
    """
    named = (p for p in (root / folder).glob("step-*") if is_named_by_step(p))
    return sorted((p for p in named if (p / STATE).is_file()), key=step_of)


def is_named_by_step(path: Path) -> bool:
    """Whether a folder has the name of a step, which a copy under a name of its own has not."""
    return re.fullmatch(r"step-\d{8,}", path.name) is not None


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step-"))
