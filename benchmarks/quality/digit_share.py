"""How many class-conditional digits of a run are what they were asked to be, in the eyes of a
classifier of real ones.

    python benchmarks/quality/digit_share.py RUN [--num 1000]

The classifier is scikit-learn's SVC (RBF, C = 5) on the digits that the model was trained on; its
share on the held-out tenth of the real digits is printed beside that of the samples.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from sklearn.svm import SVC

from diffussm_cli import runs
from diffussm_cli.data import builtin
from diffussm_cli.data.images import to_uint8
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.machine.device import keep_freed_memory
from diffussm_cli.sampling.generate import generate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--guidance", type=float)
    arguments = parser.parse_args()

    keep_freed_memory()
    trained = runs.find_run(arguments.run)
    config, how = trained.config, trained.config.sample
    if arguments.guidance is not None:
        how = dataclasses.replace(how, guidance=arguments.guidance)
    name = config.data.path.removeprefix("builtin:")
    train, held_out = (
        builtin.load(name, config.data.size, 1, held_out=part) for part in (False, True)
    )
    classifier = SVC(C=5).fit(flat(train.images), train.labels)

    process = make_objective(config.diffusion)
    digits = [i % 10 for i in range(arguments.num)]
    drawn = list(
        generate(
            runs.load_model(trained), process, how, range(arguments.num), digits, batch_size=100
        )
    )
    images = to_uint8(torch.cat([part for _, part in drawn]))
    by_class = [float((classifier.predict(flat(images[c::10])) == c).mean()) for c in range(10)]
    result = {
        "samples": classifier.score(flat(images), digits),
        "held_out": classifier.score(flat(held_out.images), held_out.labels),
        "by_class": by_class,
        "num": arguments.num,
        "how": dataclasses.asdict(how),
    }
    print(json.dumps(result))


def flat(images: torch.Tensor):
    """uint8 (n, 1, H, W) -> float (n, HW) in [0, 1]."""
    return images.flatten(1).numpy() / 255


if __name__ == "__main__":
    main()
