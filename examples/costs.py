"""Compare DiffuSSM-XL with DiT-XL/2 at two resolutions: parameters, tokens, and Gflops of one
forward pass per image.

python examples/costs.py
"""

from diffussm_cli.profiling import cost, named_model

for resolution in (256, 512):
    for name in ("xl", "dit-xl/2"):
        c = cost(named_model(name, resolution))
        print(
            f"{name} at {resolution}: {c.parameters:,} parameters, {c.tokens:,} tokens, "
            f"{c.gflops:,.1f} Gflops"
        )
