"""What a GPU did beside what was predicted for it: ceilings and training steps of
`tools/gpu_check.py --quick`.

    python benchmarks/speed/beside.py FIGURES.json --device cuda --set train.batch_size=32

FIGURES.json holds what `core.py ceilings` and `throughput.py train` printed, by the titles under
which they ran. Predictions are those of `diffussm profile --estimate --device h200` and the like,
with the given settings. Prints one JSON object.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from diffussm_cli.config import Config, load_config
from diffussm_cli.machine.device import processor_name
from diffussm_cli.machine.gpus import GPU, GPUS, gpu_named
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.roofline import COPIES_REACH, PRODUCTS_REACH, predict


def ratio(measured: float, predicted: float) -> dict[str, float]:
    """Both numbers, and the first over the second."""
    return {"measured": measured, "predicted": predicted, "ratio": measured / predicted}


def ceilings(rates: dict[str, Any], gpu: GPU) -> dict[str, Any]:
    """What copies and products reached, beside the shares of the data sheet that predictions
    assume.
    """
    copies = COPIES_REACH * gpu.bandwidth / 1e9
    products = PRODUCTS_REACH * gpu.bf16 / 1e12
    return {
        "copy, GB/s": ratio(rates["copy_gb_per_second"], copies),
        "product in bfloat16, TFLOP/s": ratio(rates["product_bfloat16_tflops"], products),
    }


def step(figures: dict[str, Any], config: Config, gpu: str) -> dict[str, Any]:
    """Milliseconds and GiB of an eager step beside those of the roofline and the formula."""
    predicted = predict(config, gpu)
    gib = cost(config).training_bytes / 2**30
    return {
        "ms": ratio(1e3 * figures["step_seconds"], 1e3 * predicted["step_seconds"]),
        "GiB": ratio(figures["peak_bytes"] / 2**30, gib),
    }


def beside(parts: dict[str, list[dict]], gpu: str, overrides: list[str]) -> dict[str, Any]:
    """Every part that has a prediction, by its title, and why others have none."""
    rows: dict[str, Any] = {}
    for title, objects in parts.items():
        if not objects:
            rows[title] = "left out: it printed no figures"
        for figures in objects:
            if "ceilings" in figures:
                rows[title] = ceilings(figures["ceilings"], GPUS[gpu])
            elif figures.get("compiled"):
                rows[title] = "left out: predictions are of eager code"
            elif "step_seconds" in figures:
                rows[title] = step(figures, load_config(figures["preset"], overrides), gpu)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", type=Path)
    parser.add_argument("--device", default="cuda", help="what was measured")
    parser.add_argument("--gpu", choices=GPUS, help="predict for another GPU than that device")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    a = parser.parse_args()
    gpu = a.gpu
    if gpu is None:
        name = processor_name(torch.device(a.device))
        gpu = next((key for key in GPUS if GPUS[key] == gpu_named(name)), None)
    if gpu is None:
        print(json.dumps({"left out": f"the data sheet of {name} is not in machine/gpus.py"}))
        return

    parts = json.loads(a.figures.read_text(encoding="utf-8"))
    print(json.dumps({"gpu": GPUS[gpu].title, "beside": beside(parts, gpu, a.overrides)}))


if __name__ == "__main__":
    main()
