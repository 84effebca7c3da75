"""The one command for a machine with GPUs: run the tests there, measure, and write one dated markdown file.

    python tools/gpu_check.py                 # on a GPU; about an hour
    python tools/gpu_check.py --toy           # the same path at toy sizes, on any machine

Each part is a command of its own, so that one that fails does not end the others. The report holds every command, what
it printed, the hardware and the versions. Exit code 1 if a part failed.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
MODELS = "xl,dit-xl/2,dit-xl/1"


@dataclass(frozen=True)
class Part:
    """One command of the check; `processes` above 1 start it by torchrun."""

    title: str
    command: Sequence[str]
    processes: int = 1

    def words(self) -> list[str]:
        """The command as it is run."""
        if self.processes == 1:
            return [sys.executable, *self.command]
        return [sys.executable, "-m", "torch.distributed.run", *self._torchrun(), *self.command]

    def text(self) -> str:
        """The command for a reader."""
        start = f"torchrun {' '.join(self._torchrun())}" if self.processes > 1 else "python"
        return f"{start} {shlex.join(self.command)}"

    def _torchrun(self) -> list[str]:
        return ["--standalone", "--nproc-per-node", str(self.processes)]


def parts(device: str, gpus: int) -> list[Part]:
    """What is run on a GPU."""
    profile = ["-m", "diffussm_cli", "profile", "--latency", "--no-count", "--precision", "bf16", "--device", device]
    profile += ["--models", MODELS, "--resolution", "256,512,1024", "--json"]
    throughput = ["benchmarks/speed/throughput.py"]
    settings = ["--set", f"train.device={device}", "--set", "train.precision=bf16"]
    found = [
        Part("Tests", ["-m", "pytest", "-q", "--device", device]),
        Part("The SSM core", ["benchmarks/speed/core.py", "--device", device]),
        Part("Latency, eager", profile),
        Part("Latency, compiled", [*profile, "--compile"]),
    ]
    batch_32 = ["--set", "train.batch_size=32", *settings]
    found += [
        Part("Training, eager", [*throughput, "train", "xl-256", "--steps", "50", *batch_32]),
        Part(
            "Training, compiled",
            [*throughput, "train", "xl-256", "--steps", "50", *batch_32, "--set", "train.compile=true"],
        ),
        Part("Training of DiT-XL/2", [*throughput, "train", "dit-xl-256", "--steps", "50", *batch_32]),
        Part("Sampling", [*throughput, "sample", "xl-256", "--steps", "50", "--images", "32", *settings]),
    ]
    if gpus > 1:
        found += _parallel("xl-256", 32 * gpus, 50, gpus, settings)
    return found


def toy_parts(device: str) -> list[Part]:
    """The same kinds of parts at toy sizes."""
    profile = ["-m", "diffussm_cli", "profile", "--latency", "--no-count", "--device", device, "--preset", "digits"]
    profile += ["--set", "model.depth=1", "--work", "forward", "--repeats", "1", "--json"]
    throughput, settings = ["benchmarks/speed/throughput.py"], ["--set", f"train.device={device}"]
    tests = ["-m", "pytest", "-q", "--device", device, "tests/model/test_dit.py", "-k", "identities"]
    return [
        Part("Tests", tests),
        Part("The SSM core", ["benchmarks/speed/core.py", "--toy", "--device", device, "kernel", "block"]),
        Part("Latency, eager", profile),
        Part("Latency, compiled", [*profile, "--compile"]),
        Part("Training, eager", [*throughput, "train", "digits", "--steps", "2", *settings]),
        Part("Sampling", [*throughput, "sample", "digits", "--steps", "2", "--images", "2", *settings]),
        *_parallel("digits", 16, 2, 2, settings),
    ]


def _parallel(preset: str, batch_size: int, steps: int, processes: int, settings: Sequence[str]) -> list[Part]:
    """Training with copies and with parts of the model, at one global batch."""
    command = ["benchmarks/speed/throughput.py", "train", preset, "--steps", str(steps), *settings]
    command += ["--set", f"train.batch_size={batch_size}"]
    return [
        Part(f"Training, {kind}, {processes} processes", [*command, "--set", f"train.parallel={kind}"], processes)
        for kind in ("ddp", "fsdp")
    ]


# -------------------------------------------------------------------------------------------------- running
def run(part: Part, timeout: float) -> tuple[bool, str]:
    """Run a part; whether it succeeded, and its section of the report."""
    start = time.perf_counter()
    try:
        done = subprocess.run(part.words(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        succeeded, output, errors = done.returncode == 0, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        succeeded, output, errors = False, "", f"no end after {timeout:.0f} s"
    seconds = time.perf_counter() - start
    lines = [
        f"## {part.title}",
        "",
        f"`{part.text()}`",
        "",
        f"{'passed' if succeeded else 'FAILED'}, {seconds:.0f} s",
        "",
    ]
    lines += shown(output) if succeeded else ["```", *(output + errors).splitlines()[-40:], "```"]
    return succeeded, "\n".join(lines) + "\n"


def shown(output: str) -> list[str]:
    """What a part printed: JSON objects as tables, other text as its last lines."""
    try:
        objects = [json.loads(output)]
    except ValueError:
        objects = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not objects:
        return ["```", *output.splitlines()[-5:], "```"]
    return ["| figure | value |", "|---|---|", *(f"| {k} | {v} |" for o in objects for k, v in flat(o))]


def flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """The numbers and words of nested JSON, by names joined with slashes; models by their names."""
    if isinstance(value, dict):
        return [item for key, inner in value.items() for item in flat(inner, f"{name}/{key}" if name else str(key))]
    if isinstance(value, list):
        named = [(v["name"] if isinstance(v, dict) and "name" in v else str(i), v) for i, v in enumerate(value)]
        return [item for key, inner in named for item in flat(inner, f"{name}/{key}")]
    return [(name, f"{value:.6g}" if isinstance(value, float) else str(value))]


def machine(device: str) -> list[str]:
    """Hardware, versions and commit, as lines of a list."""
    found = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "cpu cores": str(os.cpu_count()),
    }
    if device.startswith("cuda"):
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found[f"GPU {i}"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
        found |= {"driver": driver[0] if driver else "unknown"}
    return [f"- {name}: {value}" for name, value in found.items()]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy sizes, on the CPU unless --device is given")
    parser.add_argument("--device", help="default: cuda, with --toy cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-gpu.md, DATE-gpu-toy.md with --toy")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one part may take")
    a = parser.parse_args()
    device = a.device or ("cpu" if a.toy else "cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device is available here; --toy runs at toy sizes on the CPU")
    name = f"{datetime.date.today()}-gpu{'-toy' if a.toy else ''}.md"
    out = a.out or ROOT / "benchmarks" / "results" / name
    title = "# GPU check" + (", toy sizes: it says that the check runs, and nothing about speed" if a.toy else "")
    report, failed = "\n".join([title, "", *machine(device), "", ""]), []
    for part in toy_parts(device) if a.toy else parts(device, torch.cuda.device_count()):
        print(part.title, flush=True)
        succeeded, section = run(part, a.timeout)
        report += section + "\n"
        out.write_text(report, encoding="utf-8")  # after each part, so that an end in between loses nothing
        if not succeeded:
            failed.append(part.title)
    print(f"{'failed: ' + ', '.join(failed) if failed else 'all parts passed'}; report in {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
