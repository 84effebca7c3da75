"""Compare a folder of images with a reference folder by FID and KID.

python examples/evaluate.py images/ real-images/
"""

import sys

import diffussm as ds

print(ds.evaluate(sys.argv[1], sys.argv[2], metrics=("fid", "kid")))
