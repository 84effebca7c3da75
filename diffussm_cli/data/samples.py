"""The names in a folder of samples, which `diffussm sample` writes and every listing of images
knows.
"""

import json
import os
from pathlib import Path

from diffussm_cli.machine.files import read_regular

META, NPZ = "meta.json", "samples.npz"  # how the images beside it were made; all of them
BESIDE = (META, NPZ, "results.json")
MAX_META_BYTES = 1 << 26
# What the meta.json of any version holds, and hardly that of another program.
OF_SAMPLES = {"weights_sha256", "first_seed", "pixel_rule"}


def file_name(seed: int) -> str:
    """The file name of the image of a seed."""
    return f"{seed:06d}.png"


def is_image_name(name: str) -> bool:
    """Whether `file_name` gives this name to some seed."""
    stem, _, suffix = name.rpartition(".")
    return suffix == "png" and stem.isdecimal() and name == file_name(int(stem))


def holds_samples(folder: Path) -> bool:
    """Whether `diffussm sample` has drawn images into a folder, as its meta.json says."""
    if not os.path.isfile(folder / META):
        return False
    try:
        facts = json.loads(read_regular(folder / META, MAX_META_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(facts, dict) and facts.keys() >= OF_SAMPLES
