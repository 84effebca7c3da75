"""What the data sheets of a few GPUs say. This module needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """What the data sheet of a GPU says: memory and bandwidth in bytes and bytes a second, and
    dense operations a second (two per multiply-add), with sums in float32. `name` is what the
    driver calls it.
    """

    title: str
    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp32: float


GPUS = {
    "h200": GPU("H200 SXM", "NVIDIA H200", 141e9, 4.8e12, 989e12, 67e12),
    "h100": GPU("H100 SXM", "NVIDIA H100 80GB HBM3", 80e9, 3.35e12, 989e12, 67e12),
    "a100": GPU("A100 SXM, 80 GB", "NVIDIA A100-SXM4-80GB", 80e9, 2.04e12, 312e12, 19.5e12),
    "4090": GPU("GeForce RTX 4090", "NVIDIA GeForce RTX 4090", 24e9, 1.01e12, 165e12, 82.6e12),
}


def gpu_named(name: str) -> GPU | None:
    """The GPU that the driver calls so, if its data sheet is known."""
    return next((gpu for gpu in GPUS.values() if gpu.name == name), None)
