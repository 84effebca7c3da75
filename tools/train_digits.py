"""Train the feature extractor of digits that comes with the package, and say how many held-out
digits it knows.

    OMP_NUM_THREADS=1 python tools/train_digits.py [FILE]

On the training part of the built-in MNIST digits, shifted, turned, scaled and noised a little; 40
epochs.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import diffussm_cli.evaluation
from diffussm_cli.data import builtin
from diffussm_cli.evaluation.networks import DIGITS, DigitsNet

EPOCHS, BATCH, RATE = 40, 50, 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Path(diffussm_cli.evaluation.__file__).parent / DIGITS
    parser.add_argument(
        "file", type=Path, nargs="?", default=usual, help="default: that of the package"
    )
    target = parser.parse_args().file
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, held_out = (builtin.load("mnist", (28, 28), 1, held_out=part) for part in (False, True))
    network = DigitsNet()
    steps = EPOCHS * -(-len(train) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(train)).split(BATCH):
            logits = network(distort(train.images[chosen].float()))[2]
            F.cross_entropy(logits, train.labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    network.eval()
    with torch.no_grad():
        right = (network(held_out.images)[2].argmax(1) == held_out.labels).double().mean().item()
    save_file(network.state_dict(), target)
    print(
        f"{right:.1%} of {len(held_out)} held-out digits; {target.stat().st_size:,} bytes in "
        f"{target}"
    )


def distort(images: Tensor) -> Tensor:
    """Turned by up to 12 degrees, scaled by up to 10%, shifted by up to 2 pixels, a little noise;
    values 0..255.
    """
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * math.radians(12)
    scale = 1 + (torch.rand(n) * 2 - 1) * 0.1
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift = (torch.rand(n, 2) * 2 - 1) * 2 / 14
    rows = (torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return (moved + torch.randn_like(moved) * 8).clamp(0, 255)


if __name__ == "__main__":
    main()
