"""What is taken from the hub, and how weights are identified. Nothing here needs a network."""

from pathlib import Path

import huggingface_hub
import torch

from diffussm_cli import runs
from diffussm_cli.machine.hub import fetch, weights_sha256


def test_fetch_skips_code(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or name
    )
    assert fetch("owner/name@v1", "RUN", runs.FILES_TO_SAMPLE) == Path("owner/name")
    wanted = [
        "config.yaml",
        "model.safetensors",
        "ema-0.9.safetensors",
        "state.json",
        "metrics.json",
    ]
    others = [
        "pipeline.py",
        "denoiser/denoiser.py",
        "model.bin",
        "model.pt",
        "x/model.safetensors.py",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        wanted + others, allow_patterns=asked["allow_patterns"]
    )
    assert list(kept) == wanted
    assert asked["revision"] == "v1"


def test_weights_hash_is_that_of_stored_files():
    """Those of a network in half precision too, which numpy cannot hold."""
    networks = [torch.nn.Linear(2, 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    with torch.no_grad():
        for p in [*networks[0].parameters(), *networks[1].parameters()]:
            p.fill_(1)
    hashes = [weights_sha256(n) for n in networks]
    assert hashes[0] != hashes[1]
    assert hashes[0] == weights_sha256(networks[0])
    with torch.no_grad():
        networks[0].bias[1] = 2
    assert hashes[0] != weights_sha256(networks[0])
