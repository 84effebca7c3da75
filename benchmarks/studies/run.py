"""Run what is missing of a study; the same command continues after an interruption.

    python benchmarks/studies/run.py NAME [--jobs 2] [--work runs/studies]
    python benchmarks/studies/run.py NAME --plan
        # what it would run, with Gflops and GPU days
    torchrun --nproc-per-node 8 benchmarks/studies/run.py NAME --one RUN-s0
        # one training, on several GPUs
    python benchmarks/studies/run.py NAME --repeat RUN-s0
        # train it again from its JSON, and compare the loss

Every training is a process of its own with one thread. Its result is one JSON in
benchmarks/studies/results/NAME/: the configuration and its hash, seed, versions, machine, when it
began, the commit then and whether its code was changed, Gflops, seconds, the log, the curve of the
held-out loss, the loss of each held-out image, and metrics (`measures.py`). Where all trainings
share their sampling seeds, the metrics of the first seed are also those of other samples;
floor.json is of real images, and rates.json holds the seconds of a step.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from changes import CHANGES
from measures import floor, held_out_losses, measure
from study import (
    FLOOR,
    RATES,
    RESULTS,
    Job,
    Study,
    choose,
    config_hash,
    load_study,
    missing,
    step_gflops,
    stored_config,
)

from diffussm_cli.config import Config, load_config, to_dict
from diffussm_cli.machine.files import write_text
from diffussm_cli.machine.processes import read_world
from diffussm_cli.profiling.flops import cost

HERE = Path(__file__).parent
TURNS, TURN_STEPS = 3, 40  # of each run when the seconds of a step are measured
LOGGED = 100  # the most records of a training's log that its result keeps
GPU_TFLOPS = 0.35 * 989  # of --plan: an H100 in bfloat16 at 35% of its peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/studies"), help="where runs are kept meanwhile"
    )
    parser.add_argument("--plan", action="store_true", help="show what would run, and stop")
    parser.add_argument(
        "--one", metavar="JOB", help="only this training, as --plan names it, in this process"
    )
    parser.add_argument(
        "--repeat",
        metavar="JOB",
        help="train a finished job again; exit code 1 if its loss differs",
    )
    arguments = parser.parse_args()
    study = load_study(arguments.name)
    folder = RESULTS / study.name
    if arguments.plan:
        show_plan(study)
        return
    if arguments.repeat:
        if not (folder / f"{arguments.repeat}.json").is_file():
            raise SystemExit(f"--repeat: {arguments.repeat!r} is not a result in {folder}")
        again, stored = repeat(folder / f"{arguments.repeat}.json")
        print(f"held-out loss of {arguments.repeat}: {stored} stored, {again} again")
        sys.exit(again != stored)
    folder.mkdir(parents=True, exist_ok=True)
    if study.seconds is not None and not study.step_seconds:
        write_text(folder / RATES, as_text(measure_rates(study, arguments.work)))
        study = load_study(arguments.name)
    if arguments.one:
        job = next(job for job in known_jobs(study, folder) if job.name == arguments.one)
        result = train_and_measure(job, study, arguments.work)
        if read_world().rank == 0:
            write_text(folder / f"{job.name}.json", as_text(result))
    else:
        run_all(missing(study.trials(), folder), arguments)
        run_all(missing(jobs_of(study, folder), folder), arguments)
        if study.samples and not (folder / FLOOR).exists():
            config = study.jobs({})[0].config()
            measured = floor(config, study.samples, arguments.work / study.name)
            write_text(folder / FLOOR, json.dumps(measured) + "\n")


def as_text(result: dict) -> str:
    """A result as JSON with a line for each field."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def measure_rates(study: Study, work: Path, steps: int = TURN_STEPS) -> dict:
    """Seconds of a step of each run with one thread: the median over TURNS, in which all are
    trained for some steps.

    With `timed_by`, this run of the study beside is timed too, and the seconds are scaled such that
    its own are what that study measured: equal seconds then mean the same in both.
    """
    timed = dict.fromkeys(study.runs, study)
    if study.timed_by and study.beside:
        timed = {study.timed_by: study.beside, **timed}

    origin = provenance()
    turns: dict[str, list[float]] = {run: [] for run in timed}
    for _ in range(TURNS):
        for run, of in timed.items():
            preset, overrides = of.config(run, {})
            change = (of.runs[run] or {}).get("change")
            overrides = [*overrides, f"train.steps={steps}", "train.log_every=10"]
            root = work / study.name / f"rate-{run}"
            shutil.rmtree(root, ignore_errors=True)
            # a change stays in its process
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                done = alone.submit(time_steps, load_config(preset, overrides), change, root)
                turns[run].append(done.result())

    measured = {run: statistics.median(seconds) for run, seconds in turns.items()}
    scale = 1.0
    if study.timed_by and study.beside:
        scale = study.beside.step_seconds[study.timed_by] / measured[study.timed_by]
    return {
        "step_seconds": {run: scale * measured[run] for run in study.runs},
        "measured": measured,
        "turns": turns,
        "machine": machine_name(),
        **origin,
    }


def time_steps(config: Config, change: str | None, root: Path) -> float:
    """Seconds of a step of a short training with one thread, by the time of its processor.

    Other work on the machine disturbs it less than the time of the clock.
    """
    import torch

    from diffussm_cli.events import TrainingRecord
    from diffussm_cli.training import train

    torch.set_num_threads(1)
    if change:
        CHANGES[change]()
    times = [
        time.process_time() for event in train(config, root) if isinstance(event, TrainingRecord)
    ]
    return statistics.median(np.diff(times).tolist()) / config.train.log_every


def repeat(file: Path) -> tuple[float, float]:
    """Train what a result describes once more: its held-out loss now, and the one that is stored.

    Raises:
        SystemExit: if the result does not hold its configuration, and its preset is another today.
    """
    stored = json.loads(file.read_text(encoding="utf-8"))
    config, change = stored_config(stored), stored.get("change")
    with tempfile.TemporaryDirectory() as folder:
        again = train_config(config, change, Path(folder) / "run", stored.get("held_out_images"))
    return again["held_out"], stored["held_out"]


def read_log(root: Path) -> list[dict]:
    """The records of a run."""
    return [
        json.loads(line)
        for line in (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def images_per_second(records: list[dict]) -> float:
    """The median rate in the log of a run."""
    return statistics.median(r["images_per_second"] for r in records if r.get("images_per_second"))


def known_jobs(study: Study, folder: Path) -> list[Job]:
    """Trials, and the jobs that count as soon as all trials are done."""
    trials = study.trials()
    return trials if missing(trials, folder) else [*trials, *jobs_of(study, folder)]


def jobs_of(study: Study, folder: Path) -> list[Job]:
    """The trainings that count, with what the search has chosen."""
    losses = {
        job.name: json.loads((folder / f"{job.name}.json").read_text())["held_out"]
        for job in study.trials()
    }
    return study.jobs(choose(study, losses))


def run_all(jobs: list[Job], arguments: argparse.Namespace) -> None:
    """Each job in a process of its own, `--jobs` at a time. Raises SystemExit when one fails."""
    waiting, running = list(jobs), {}
    while waiting or running:
        while waiting and len(running) < arguments.jobs:
            job = waiting.pop(0)
            command = [
                sys.executable,
                __file__,
                arguments.name,
                "--work",
                str(arguments.work),
                "--one",
                job.name,
            ]
            running[job.name] = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
            print(f"{time.strftime('%H:%M:%S')} {job.name} begins, {len(waiting)} wait", flush=True)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    raise SystemExit(
                        f"{name} ended with {process.returncode}; the others go on, run this "
                        "again later"
                    )
        time.sleep(1)


def train_and_measure(job: Job, study: Study, work: Path) -> dict:
    """Train a job, or go on with it, and measure its averaged weights; under torchrun the first
    process does.
    """
    root = work / study.name / job.name
    result = {"study": study.name, **train_job(job, root)}
    if job.searched is not None or read_world().rank or not study.samples:
        return result
    seed = study.sampling_seed(job.seed)
    result["metrics"] = measure(root, study.samples, seed, study.balanced)
    # the spread over the seeds of sampling
    if job.seed == study.seeds[0] and not study.own_samples:
        result["metrics_again"] = measure(root, study.samples, study.samples, study.balanced)
    return result


def train_job(job: Job, root: Path) -> dict:
    """Train a job in a folder, or go on with it there: what is known of it without samples."""
    config = job.config()
    return {
        "run": job.run,
        "seed": job.seed,
        "searched": job.searched,
        "change": job.change,
        "preset": job.preset,
        "overrides": list(job.overrides),
        "held_out_images": job.held_out_images,
        "config": config_hash(config, job.change),
        **train_config(config, job.change, root, job.held_out_images),
        "machine": machine_name(),
        "configuration": to_dict(config),
    }


def train_config(
    config: Config, change: str | None, root: Path, held_out_images: int | None = None
) -> dict[str, Any]:
    """Train a configuration with a change to the network, or go on with it: its cost, log and
    losses.

    Args:
        held_out_images: number of images of the last held-out loss; by default as for the curve.
    """
    import torch

    import diffussm_cli
    from diffussm_cli.events import finish
    from diffussm_cli.training import train

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    if change:
        CHANGES[change]()
    origin, start = provenance(), time.process_time()
    done = finish(train(config, root, resume=root.exists()))
    seconds = time.process_time() - start

    records = read_log(root)
    curve = [(r["step"], r["images"], round(r["held_out"], 6)) for r in records if "held_out" in r]
    losses: dict[str, Any] = {}
    if read_world().rank == 0:
        losses = held_out_losses(root, held_out_images)
    return {
        "parameters": cost(config).parameters,
        "steps": done.steps,
        "gflops": step_gflops(config) * done.steps,
        "cpu_seconds": seconds,
        "images_per_second": images_per_second(records),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "left_out": sum(len(r.get("left_out", ())) for r in records),
        "log": short_log(records),
        "curve": curve,
        **losses,
        **origin,
        "versions": {
            "diffussm": diffussm_cli.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
    }


def short_log(records: list[dict]) -> dict[str, list[float]]:
    """Training loss, gradient norm and images/s by step: means of neighbouring records, at most
    LOGGED of them.
    """
    parts = np.array_split(np.arange(len(records)), min(len(records), LOGGED))
    log: dict[str, list[float]] = {"step": [records[part[-1]]["step"] for part in parts]}
    for name in ("loss", "grad_norm", "images_per_second"):
        # a record has None in place of a number that is not finite
        numbers = [
            [records[i][name] for i in part if records[i].get(name) is not None] for part in parts
        ]
        log[name] = [float(f"{statistics.mean(n):.4g}") if n else None for n in numbers]
    return log


def show_plan(study: Study) -> None:
    """What the study would run: steps, Gflops and GPU days by arithmetic."""
    jobs = [*study.trials(), *study.jobs({})]
    total = 0.0
    for job in jobs:
        config = job.config()
        gflops = step_gflops(config) * config.train.steps
        total += gflops
        print(
            f"{job.name:32} {config.train.steps:9,} steps  {gflops:.3g} Gflops  "
            f"{days(gflops):.3g} GPU days"
        )
    print(
        f"{len(jobs)} trainings, {total:.3g} Gflops, {days(total):.3g} GPU days at "
        f"{GPU_TFLOPS:.0f} TFLOP/s"
    )


def days(gflops: float) -> float:
    """GPU days of so many billions of multiply-adds."""
    return 2 * gflops / (GPU_TFLOPS * 1e3) / 86400


def machine_name() -> str:
    import torch

    from diffussm_cli.machine.device import processor_name

    if torch.cuda.is_available():
        return f"{read_world().size} x {processor_name(torch.device('cuda'))}"
    return f"{processor_name(torch.device('cpu'))}, 1 thread"


def provenance() -> dict[str, Any]:
    """When this began (UTC), at which commit, and whether files other than results were changed."""
    code = ["--", str(HERE.parents[1]), f":(exclude){RESULTS}"]
    return {
        "begun": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", *code)),
    }


def git(*arguments: str) -> str:
    """What git says of this checkout."""
    command = ["git", "-C", str(HERE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
