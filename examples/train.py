"""Train a small model on the 8x8 digits of scikit-learn. About ten seconds on a CPU.

python examples/train.py runs/example
"""

import sys

from diffussm_cli.config import load_config
from diffussm_cli.training import TrainingRecord, train

config = load_config(
    "digits", ["train.steps=60", "train.log_every=20", "train.sample_every=60", "sample.steps=20"]
)
for event in train(config, sys.argv[1], resume=True):
    if isinstance(event, TrainingRecord):
        print(f"step {event.record['step']}: loss {event.record['loss']:.3f}")
