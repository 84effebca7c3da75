"""Draw ten images, one per class, from a run of examples/train.py.

python examples/sample.py runs/example images/
"""

import sys

import diffussm as ds

grid = ds.sample(sys.argv[1], sys.argv[2], num=10, classes=range(10))
print(f"a grid of the images: {grid}")
