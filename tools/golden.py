"""Compute the reference values of tests/golden again, and say whether they are what the file holds.

    pip install tensorflow-cpu==2.21.*          # in an environment of its own
    python tools/golden.py [FILE]               # with FILE, also write the new values there

Only `adm_half.npz` can be made this way: TensorFlow alone computes it. The other files need the
source code of state-spaces/s4 and openai/guided-diffusion, which no package provides; see
tests/golden/README.md. The inputs are taken from the file.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def half_sums(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """xD, float16 (16, D), and nD, the sum of its squares over D as TensorFlow rounds it, for every
    D of the file.
    """
    import tensorflow as tf  # not a dependency of the package

    sums = {}
    for name in [n for n in arrays if n.startswith("x")]:
        sums[name] = arrays[name]
        sums[f"n{name[1:]}"] = tf.reduce_sum(tf.square(tf.constant(arrays[name])), 1).numpy()
    return sums


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", type=Path, nargs="?", help="where to write adm_half.npz; default: only compare"
    )
    target = parser.parse_args().file
    with np.load(GOLDEN / "adm_half.npz", allow_pickle=False) as arrays:
        stored = dict(arrays)
    computed = half_sums(stored)
    different = [name for name in stored if not np.array_equal(stored[name], computed[name])]
    print(
        f"adm_half.npz: {', '.join(different) + ' differ' if different else 'all arrays are equal'}"
    )
    if target is not None:
        np.savez_compressed(target, **computed)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
