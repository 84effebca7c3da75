"""Compare the library with the reference implementations it must agree with, and print the largest
error of each.

    python benchmarks/quality/parity.py

The reference values are in tests/golden (state-spaces/s4, guided-diffusion, the ADM evaluator),
except for DiT, which is compared with the implementation in diffusers on the same random weights.
The tests assert the same agreements with a tolerance; this script prints how close they are. One
JSON object; errors are relative unless their name says more.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch

# the golden values are read by the tests' own helpers
sys.path.insert(0, str(Path(__file__).parents[2]))
from diffussm_cli.config import load_config
from diffussm_cli.diffusion.losses import training_losses
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.diffusion.samplers import make_scheduler
from diffussm_cli.diffusion.schedulers import sample
from diffussm_cli.evaluation.metrics import inception_score
from diffussm_cli.model import build_model
from diffussm_cli.model.s4d.convolution import convolve, kernel_spectra
from diffussm_cli.model.s4d.kernel import s4d_kernel
from tests.conftest import fill, golden, relative
from tests.diffusion.test_samplers import gaussian_denoiser
from tests.evaluation import adm_half
from tests.evaluation.test_metrics import distance
from tests.model.test_dit import in_diffusers
from tests.model.test_dit import tiny as tiny_dit
from tests.model.test_s4d import golden_parameters


def s4d(dtype: torch.dtype) -> float:
    g, p = golden_parameters(dtype)
    K = s4d_kernel(*p, L=g["u"].shape[-1])
    causal, anticausal = convolve(g["u"].to(dtype), kernel_spectra(torch.stack([K, K]))).chunk(
        2, dim=1
    )
    pairs = [(K, g["kernel"]), (causal, g["y_causal"]), (anticausal, g["y_anticausal"])]
    return max(relative(ours, theirs) for ours, theirs in pairs)


def process_and_losses() -> float:
    g, process = golden("adm_diffusion"), GaussianDiffusion()
    losses = training_losses(process, g["model_output"], g["x0"], g["x_t"], g["t"], g["noise"])
    p = process.p_mean_variance(g["model_output"], g["x_t"], g["t"])
    mean, log_variance = process.q_posterior(g["x0"], g["x_t"], g["t"])
    ours = {
        "x_t": process.q_sample(g["x0"], g["t"], g["noise"]),
        "p_mean": p.mean,
        "p_log_variance": p.log_variance,
    }
    ours |= {"pred_x0": p.x_0, "q_posterior_mean": mean} | losses
    ours |= {"q_posterior_log_variance": log_variance.expand_as(mean)}
    return max(relative(value, g[name]) for name, value in ours.items())


def sampler(name: str, steps: int) -> float:
    g, key = golden("adm_diffusion"), f"s{'ddim' if name == 'ddim' else ''}{steps}"
    scheduler = make_scheduler(name, GaussianDiffusion(), steps, learned_covariance=True)
    noise = iter(g.get(f"{key}_z", ()))
    with patch(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noise).double()
    ):
        return relative(sample(gaussian_denoiser, scheduler, g[f"{key}_xT"]), g[f"{key}_final"])


def metrics() -> dict[str, float]:
    g = golden("adm_metrics")
    ours = {
        "fid": distance(g["gen_pool"], g["ref_pool"]),
        "sfid": distance(g["gen_spatial"], g["ref_spatial"]),
    }
    logits = g["gen_pool"] @ g["logit_weight"]
    ours |= {f"is_split{split}": inception_score(logits, split) for split in (5000, 1000)}
    errors = {name: abs(value / g[name].item() - 1) for name, value in ours.items()}
    half = adm_half.precision_recall(g["ref_pool"], g["gen_pool"], adm_half.half_distances)
    return errors | {
        f"{n}, float16, absolute": abs(v - g[n].item())
        for n, v in zip(("precision", "recall"), half)
    }


def dit(patch_size: int) -> float:
    torch.manual_seed(0)
    model = fill(tiny_dit(patch_size=patch_size)).double().eval()
    x, t, y = torch.randn(3, 4, 8, 8).double(), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        return relative(model(x, t, y), in_diffusers(model)(x, timestep=t, class_labels=y).sample)


def xl_parameters() -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(load_config("xl-256")).parameters())


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    errors = {
        "S4D kernel and convolutions, float64": s4d(torch.float64),
        "S4D kernel and convolutions, float32": s4d(torch.float32),
        "ADM process and losses": process_and_losses(),
        "ADM sampling, DDPM 250": sampler("ddpm", 250),
        "ADM sampling, DDPM 50": sampler("ddpm", 50),
        "ADM sampling, DDIM 25": sampler("ddim", 25),
        "ADM evaluator": metrics(),
        "DiT of diffusers, patch size 1": dit(1),
        "DiT of diffusers, patch size 2": dit(2),
        "parameters of DiffuSSM-XL": xl_parameters(),
    }
    print(json.dumps(errors, indent=1))


if __name__ == "__main__":
    main()
