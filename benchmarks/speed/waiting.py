"""The share of a training step that is spent waiting for its batch, and all that is not forward,
backward, optimiser.

    python benchmarks/speed/waiting.py mnist --steps 50
    python benchmarks/speed/waiting.py s-256 --data latents/ --set train.batch_size=8 --steps 5

Prints one JSON object. The first step, which makes its batch while nothing else can be done, is
left out.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable

from diffussm_cli.config import load_config
from diffussm_cli.data.opening import open_source
from diffussm_cli.machine.device import keep_freed_memory, pick_device
from diffussm_cli.training.batches import batches
from diffussm_cli.training.step import Step


def timed(function: Callable, clock: Counter, name: str) -> Callable:
    def call(*arguments):
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            clock[name] += time.perf_counter() - start

    return call


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset")
    parser.add_argument("--data")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--steps", type=int, default=20)
    a = parser.parse_args()

    keep_freed_memory()
    overrides = [*a.overrides, f"train.steps={a.steps + 1}", "train.precision=auto"]
    config = load_config(a.preset, overrides, {"data.path": a.data} if a.data else None)
    source = open_source(config)
    step = Step(config, pick_device(config.train.device))
    following = batches(source, config, 0)
    step.update(next(following))

    clock = Counter()
    step.meter.add = timed(step.meter.add, clock, "record")
    step.meter.end_step = timed(step.meter.end_step, clock, "record")
    wait = timed(next, clock, "waiting")
    update = timed(step.update, clock, "update")
    start = time.perf_counter()
    for _ in range(a.steps):
        update(wait(following))
    total = time.perf_counter() - start
    outside = total - clock["update"] + clock["record"]
    world = {
        "preset": a.preset,
        "share_waiting": clock["waiting"] / total,
        "share_outside": outside / total,
    }
    world |= {"seconds_a_step": total / a.steps}
    print(json.dumps({**world, "batch_size": config.train.batch_size, "device": str(step.device)}))


if __name__ == "__main__":
    main()
