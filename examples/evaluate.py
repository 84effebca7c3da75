"""Compare a folder of images with a reference folder by FID and KID.

python examples/evaluate.py images/ real-images/
"""

import sys

from diffussm_cli.evaluation import evaluate
from diffussm_cli.events import Result, Warned

for event in evaluate(sys.argv[1], sys.argv[2], metrics=("fid", "kid")):
    if isinstance(event, Warned):
        print("note:", event.text)
    if isinstance(event, Result):
        print(event.value["metrics"])
