"""The one command for a machine with GPUs: run the tests there, measure, and write one dated
markdown file.

    python tools/gpu_check.py --quick         # on a GPU; ten minutes, what matters most first
    python tools/gpu_check.py                 # on a GPU; hours
    python tools/gpu_check.py --toy
        # every kind of part of both once, at toy sizes, on any machine

Each part is a command of its own with its own time, so that one that fails or does not end leaves
time for the others. What a part printed is in the report as soon as it ends, also if it was
stopped, and so are every command, the hardware and the versions; a JSON file beside the report
holds the figures. The package need not be installed. Exit code 1 if a part failed or found no time.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MODELS = "xl,dit-xl/2,dit-xl/1"


@dataclasses.dataclass(frozen=True)
class Part:
    """One command of the check; `processes` above 1 start it by torchrun. It is stopped after
    `seconds`.
    """

    title: str
    command: Sequence[str]
    processes: int = 1
    seconds: float = 3600

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
    profile = [
        "-m",
        "diffussm_cli",
        "profile",
        "--latency",
        "--no-count",
        "--precision",
        "bf16",
        "--device",
        device,
    ]
    profile += ["--models", MODELS, "--resolution", "256,512,1024", "--json"]
    throughput = ["benchmarks/speed/throughput.py"]
    settings = ["--set", f"train.device={device}", "--set", "train.precision=bf16"]
    planned = [
        Part("Tests", ["-m", "pytest", "-q", "--device", device]),
        Part("The SSM core", ["benchmarks/speed/core.py", "--device", device]),
        Part("Latency, eager", profile),
        Part("Latency, compiled", [*profile, "--compile"]),
    ]
    batch_32 = ["--set", "train.batch_size=32", *settings]
    planned += [
        Part("Training, eager", [*throughput, "train", "xl-256", "--steps", "50", *batch_32]),
        Part(
            "Training, compiled",
            [
                *throughput,
                "train",
                "xl-256",
                "--steps",
                "50",
                *batch_32,
                "--set",
                "train.compile=true",
            ],
        ),
        Part(
            "Training of DiT-XL/2", [*throughput, "train", "dit-xl-256", "--steps", "50", *batch_32]
        ),
        Part(
            "Sampling",
            [*throughput, "sample", "xl-256", "--steps", "50", "--images", "32", *settings],
        ),
    ]
    if gpus > 1:
        planned += _parallel("xl-256", 32 * gpus, 50, gpus, settings)
    return planned


QUICK = 590  # seconds of all quick parts together
# presets whose step is measured
STEPS = {"XL": "xl-256", "DiT-XL/2": "dit-xl-256", "axial XL": "axial-xl-256"}


def quick_parts(device: str, toy: bool, figures: Path) -> list[Part]:
    """What is run in ten minutes: the first parts are worth most.

    Together they may take QUICK seconds, less a few in which parts end, so that each finds its time
    even if all before it were stopped at theirs. The last one compares what those before it left in
    `figures` with what was predicted. At toy sizes, one preset stands for all.
    """
    core = ["benchmarks/speed/core.py", *(["--toy"] if toy else []), "--device", device]
    tests = [
        "tests/model",
        "tests/diffusion",
        "tests/training/test_step.py",
        "tests/test_cuda.py",
        "-n",
        # each imports torch first
        str(min(8, os.cpu_count() or 1)),
    ]
    tests = ["tests/model/test_dit.py", "-k", "identities"] if toy else tests
    ceilings = ["ceilings", *(["kernel", "block"] if toy else [])]
    compiled = ["--set", "train.compile=true"]
    steps = dict(list(STEPS.items())[:1]) if toy else STEPS
    beside = ["benchmarks/speed/beside.py", str(figures), "--device", device]
    beside += [*(["--gpu", "h200"] if toy else []), *_settings(toy)]
    planned = [
        Part("Ceilings: copy and product", [*core, *ceilings], seconds=20),
        Part("Tests", ["-m", "pytest", "-q", "--device", device, *tests], seconds=95),
        Part(
            "Convolutions, forward and backward",
            [*core, "convolutions", "convolutions_compiled"],
            seconds=65,
        ),
        *(_step(title, preset, device, toy, seconds=35) for title, preset in steps.items()),
        Part("Kernels of a step of XL", [*core, "top"], seconds=45),
        *(
            _step(f"{title}, compiled", preset, device, toy, 70, compiled)
            for title, preset in steps.items()
        ),
        Part("Measured beside predicted", beside, seconds=35),
    ]
    # At toy sizes only the path counts, on machines of any speed.
    return [dataclasses.replace(part, seconds=600) for part in planned] if toy else planned


def shared(quick: Sequence[Part], seconds: float) -> list[Part]:
    """The quick parts with their shares of so many seconds, such as more on a slow machine."""
    times = seconds / QUICK
    return [dataclasses.replace(part, seconds=part.seconds * times) for part in quick]


def _step(
    title: str, preset: str, device: str, toy: bool, seconds: float, more: Sequence[str] = ()
) -> Part:
    """Training steps at a batch of 32 in bfloat16; the first step, which compiles,
    is timed apart.
    """
    words = [*_settings(toy), "--set", f"train.device={device}", *more]
    steps = "2" if toy else "20"
    command = ["benchmarks/speed/throughput.py", "train", preset, "--steps", steps, *words]
    return Part(f"Step of {title}", command, seconds=seconds)


def _settings(toy: bool) -> list[str]:
    """Of the steps that are measured, and of their predictions."""
    small = ["model.hidden_size=32", "model.depth=1", "train.batch_size=2"]
    settings = small if toy else ["train.batch_size=32", "train.precision=bf16"]
    return [word for setting in settings for word in ("--set", setting)]


def toy_parts(device: str, figures: Path) -> list[Part]:
    """Every kind of part once, at toy sizes: those of the quick check, and what only the long one
    has.
    """
    profile = [
        "-m",
        "diffussm_cli",
        "profile",
        "--latency",
        "--no-count",
        "--device",
        device,
        "--preset",
        "digits",
    ]
    profile += ["--set", "model.depth=1", "--work", "forward", "--repeats", "1", "--json"]
    throughput, settings = ["benchmarks/speed/throughput.py"], ["--set", f"train.device={device}"]
    *quick, beside = quick_parts(device, toy=True, figures=figures)
    return [
        *quick,
        Part("Latency, compiled", [*profile, "--compile"]),
        Part(
            "Sampling",
            [*throughput, "sample", "digits", "--steps", "2", "--images", "2", *settings],
        ),
        *_parallel("digits", 16, 2, 2, settings)[-1:],
        beside,
    ]


def _parallel(
    preset: str, batch_size: int, steps: int, processes: int, settings: Sequence[str]
) -> list[Part]:
    """Training with copies and with parts of the model, at one global batch."""
    command = ["benchmarks/speed/throughput.py", "train", preset, "--steps", str(steps), *settings]
    command += ["--set", f"train.batch_size={batch_size}"]
    return [
        Part(
            f"Training, {kind}, {processes} processes",
            [*command, "--set", f"train.parallel={kind}"],
            processes,
        )
        for kind in ("ddp", "fsdp")
    ]


# ------------------------------------------------------------------------------------------ running
class Outcome(NamedTuple):
    """Whether a part succeeded, its section of the report, and the JSON objects that it printed."""

    succeeded: bool
    section: str
    objects: list[object]


def run(part: Part, seconds: float) -> Outcome:
    """Run a part for so many seconds at most."""
    start = time.perf_counter()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        part.words(),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
        end = "passed" if process.returncode == 0 else "FAILED"
    except subprocess.TimeoutExpired:
        # with the processes that it started, which would keep the GPU
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        end = f"STOPPED after its {seconds:.0f} s"

    # The end of what it said, if it failed.
    succeeded = end == "passed"
    lines = [
        f"## {part.title}",
        "",
        f"`{part.text()}`",
        "",
        f"{end}, {time.perf_counter() - start:.0f} s",
        "",
    ]
    objects = printed(output)
    if succeeded or "{" in output:
        lines += shown(output, objects)
    if not succeeded:
        lines += ["", "```", *(output + errors).splitlines()[-40:], "```"]
    return Outcome(succeeded, "\n".join(lines) + "\n", objects)


def printed(output: str) -> list[object]:
    """The JSON objects that a part printed: one in all, or one a line."""
    try:
        return [json.loads(output)]
    except ValueError:
        return [object for line in output.splitlines() if (object := _parsed(line)) is not None]


def shown(output: str, objects: Sequence[object]) -> list[str]:
    """What a part printed: JSON objects as tables, other text as its last lines."""
    if not objects:
        return ["```", *output.splitlines()[-5:], "```"]
    return [
        "| figure | value |",
        "|---|---|",
        *(f"| {k} | {v} |" for o in objects for k, v in flat(o)),
    ]


def _parsed(line: str) -> object:
    """A JSON object on one line; None for other text, and for a line that was cut short."""
    try:
        return json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None


def flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """The numbers and words of nested JSON, by names joined with slashes; models by their names."""
    if isinstance(value, dict):
        return [
            item
            for key, inner in value.items()
            for item in flat(inner, f"{name}/{key}" if name else str(key))
        ]
    if isinstance(value, list):
        named = [
            (v["name"] if isinstance(v, dict) and "name" in v else str(i), v)
            for i, v in enumerate(value)
        ]
        return [item for key, inner in named for item in flat(inner, f"{name}/{key}")]
    return [(name, f"{value:.6g}" if isinstance(value, float) else str(value))]


def machine(device: str) -> list[str]:
    """Hardware, versions and commit, as lines of a list."""
    facts = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "system": platform.platform(),
        "cpu cores": str(os.cpu_count()),
    }
    if device.startswith("cuda"):
        import torch

        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            facts[f"GPU {i}"] = (
                f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability "
                f"{p.major}.{p.minor}"
            )
        driver = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ).splitlines()
        facts |= {"CUDA": str(torch.version.cuda), "cuDNN": _cudnn()}
        facts |= {"driver": driver[0] if driver else "unknown"}
    return [f"- {name}: {value}" for name, value in facts.items()]


def _cudnn() -> str:
    """The version of cuDNN, or what is wrong with it."""
    import torch

    try:
        return str(torch.backends.cudnn.version())
    except RuntimeError as e:
        return " ".join(str(e).split())


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help=f"what matters most, in {QUICK} seconds")
    form.add_argument(
        "--toy",
        action="store_true",
        help="every kind of part at toy sizes, on the CPU unless --device is given",
    )
    parser.add_argument("--device", help="default: cuda, with --toy cpu")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/DATE-gpu.md, with -quick or -toy"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of all parts; by default {QUICK} with --quick, whose parts share it",
    )
    a = parser.parse_args()
    device = a.device or ("cpu" if a.toy else "cuda")
    import torch  # it may take a part of the time, which has begun

    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device is available here; --toy runs at toy sizes on the CPU")
    name = f"{datetime.date.today()}-gpu{'-quick' if a.quick else ''}{'-toy' if a.toy else ''}.md"
    out = a.out or ROOT / "benchmarks" / "results" / name
    title = "# GPU check" + (
        ", toy sizes: it says that the check runs, and nothing about speed" if a.toy else ""
    )
    report, failed = "\n".join([title, "", *machine(device), "", ""]), []
    figures: dict[str, list[object]] = {}
    seconds = a.seconds or (QUICK if a.quick else math.inf)
    path = Path(os.path.relpath(out.with_suffix(".json"), ROOT))  # parts run there
    if a.toy:
        chosen = toy_parts(device, path)
    elif a.quick:
        chosen = shared(quick_parts(device, toy=False, figures=path), seconds)
    else:
        chosen = parts(device, torch.cuda.device_count())
    end = start + seconds
    for part in chosen:
        seconds = min(part.seconds, end - time.monotonic())
        if seconds < 1:
            done = Outcome(False, f"## {part.title}\n\nNOT RUN: no time was left\n", [])
        else:
            done = run(part, seconds)
        print(f"{'passed' if done.succeeded else 'failed'}: {part.title}", flush=True)
        report += done.section + "\n"
        if done.objects or not done.succeeded:
            figures[part.title] = done.objects
        # after each part, so that an end in between loses nothing
        out.write_text(report, encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        if not done.succeeded:
            failed.append(part.title)
    print(f"{'failed: ' + ', '.join(failed) if failed else 'all parts passed'}; report in {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
