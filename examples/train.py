"""Train a small model on the 8x8 digits of scikit-learn. About ten seconds on a CPU; the same
command continues a run that was interrupted.

python examples/train.py runs/example
"""

import sys

import diffussm as ds

run = ds.train(
    "digits",
    sys.argv[1],
    resume=True,
    steps=60,
    log_every=20,
    sample_every=60,
    set={"sample.steps": 20},
)
print(f"trained {run.config.train.steps} steps; everything is in {run.folder}")
