"""Draw ten images, one per class, from a run of examples/train.py.

python examples/sample.py runs/example images/
"""

import sys

from diffussm_cli.events import finish
from diffussm_cli.sampling import sample

grid = finish(sample(sys.argv[1], sys.argv[2], num=10, classes=range(10)))
print(f"a grid of the images: {grid}")
