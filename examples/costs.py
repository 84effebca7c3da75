"""Compare DiffuSSM-XL with DiT-XL/2 at two resolutions: parameters, tokens, and Gflops of one
forward pass per image.

python examples/costs.py
"""

import diffussm as ds

for resolution in (256, 512):
    for preset in ("xl-256", "dit-xl-256"):
        c = ds.cost(preset, set={"data.resolution": resolution})
        print(
            f"{preset} at {resolution}: {c.parameters:,} parameters, {c.tokens:,} tokens, "
            f"{c.gflops:,.1f} Gflops"
        )
