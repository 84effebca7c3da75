"""Compare a folder of images with a reference folder by FID and KID.

python examples/evaluate.py images/ real-images/
"""

import sys

from diffussm_cli.evaluation import evaluate
from diffussm_cli.events import finish

result = finish(evaluate(sys.argv[1], sys.argv[2], metrics=("fid", "kid")))
print(result["metrics"])
for line in result["warnings"]:
    print("note:", line)
