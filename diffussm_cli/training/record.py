"""What the loop measures between two records, and where records go: metrics.jsonl and TensorBoard."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

QUARTERS = 4


class Meter:
    """Means since the last flush, summed on the device so that no step waits for the host."""

    def __init__(self, T: int, device: torch.device):
        self.T, self.device = T, device
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.images = self.steps = 0
        self.norm = torch.zeros((), device=self.device)
        self.quarter_sums = torch.zeros(QUARTERS, device=self.device)
        self.quarter_counts = torch.zeros(QUARTERS, device=self.device)
        self.since, self.pause = time.perf_counter(), 0.0

    def add(self, losses: dict[str, Tensor], t: Tensor) -> None:
        """Losses of each image, (B,), and its timestep, (B,)."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach().sum()
        quarter = t * QUARTERS // self.T
        self.quarter_sums.index_add_(0, quarter, losses["mse"].detach().float())
        self.quarter_counts.index_add_(0, quarter, torch.ones_like(quarter, dtype=torch.float32))
        self.images += len(t)

    def add_norm(self, norm: Tensor) -> None:
        """The gradient norm of a finished step."""
        self.norm += norm
        self.steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count against the rate."""
        start = time.perf_counter()
        yield
        self.pause += time.perf_counter() - start

    def flush(self) -> dict[str, float]:
        """Means by name: losses, `mse_q1` (smallest t) .. `mse_q4`, grad_norm, images_per_second. Starts anew."""
        seconds = time.perf_counter() - self.since - self.pause
        means = {name: total.item() / self.images for name, total in self.sums.items()}
        quarters = (self.quarter_sums / self.quarter_counts).tolist()
        means |= {f"mse_q{i + 1}": q for i, q in enumerate(quarters) if q == q}  # an empty quarter has no mean
        means |= {"grad_norm": self.norm.item() / self.steps, "images_per_second": self.images / seconds}
        self._restart()
        return means


class RecordWriter:
    """Appends records to RUN/metrics.jsonl and RUN/tensorboard; on resume, what lies beyond `step` is dropped."""

    def __init__(self, root: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        path = root / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step(line) <= step] if path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a")
        self.board = SummaryWriter(str(root / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in record.items():
            if name != "step":
                self.board.add_scalar(name if "/" in name else f"train/{name}", value, record["step"])

    def close(self) -> None:
        self.file.close()
        self.board.close()


def _step(line: str) -> int:
    """The step of a line; a line cut short by a kill counts as beyond all."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return 1 << 62
