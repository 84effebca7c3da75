"""Run what is missing of a study; the same command continues after an interruption.

    python benchmarks/studies/run.py NAME [--jobs 2] [--work runs/studies]
    python benchmarks/studies/run.py NAME --plan        # what it would run, with Gflops and GPU days
    torchrun --nproc-per-node 8 benchmarks/studies/run.py NAME --one RUN-s0   # one training, on several GPUs
    python benchmarks/studies/run.py NAME --repeat RUN-s0   # train it again from its JSON, and compare the loss

Every training is a process of its own with one thread. Its result is one JSON in benchmarks/studies/results/NAME/: the
configuration's hash, seed, commit, versions, machine, Gflops, seconds, the curve of the held-out loss, and metrics
(`measures.py`). For the first seed the metrics are also those of other sampling seeds; floor.json is of real images.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from changes import CHANGES
from measures import floor, measure
from study import FLOOR, RATES, RESULTS, Job, Study, choose, config_hash, load_study, missing, step_gflops

from diffussm_cli.machine.files import write_text
from diffussm_cli.machine.processes import read_world
from diffussm_cli.profiling.flops import cost

HERE = Path(__file__).parent
TURNS, TURN_STEPS = 3, 60  # of each run when the seconds of a step are measured
GPU_TFLOPS = 0.35 * 989  # of --plan: an H100 in bfloat16 at 35% of its peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/studies"), help="where runs are kept meanwhile")
    parser.add_argument("--plan", action="store_true", help="show what would run, and stop")
    parser.add_argument("--one", metavar="JOB", help="only this training, as --plan names it, in this process")
    parser.add_argument("--repeat", metavar="JOB", help="train a finished job again; exit code 1 if its loss differs")
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
        write_text(folder / RATES, json.dumps(measure_rates(study, arguments.work), indent=1) + "\n")
        study = load_study(arguments.name)
    if arguments.one:
        job = next(job for job in known_jobs(study, folder) if job.name == arguments.one)
        result = train_and_measure(job, study, arguments.work)
        if read_world().rank == 0:
            write_text(folder / f"{job.name}.json", json.dumps(result, indent=1) + "\n")
    else:
        run_all(missing(study.trials(), folder), arguments)
        run_all(missing(jobs_of(study, folder), folder), arguments)
        if study.samples and not (folder / FLOOR).exists():
            config = study.jobs({})[0].config()
            write_text(folder / FLOOR, json.dumps(floor(config, study.samples, arguments.work / study.name)) + "\n")


def measure_rates(study: Study, work: Path) -> dict:
    """Seconds of a step of each run with one thread: the median over TURNS, in which all are trained for some steps."""
    import torch

    from diffussm_cli.config import load_config
    from diffussm_cli.training import train

    torch.set_num_threads(1)
    found: dict[str, list[float]] = {run: [] for run in study.runs}
    for turn in range(TURNS):
        for run in study.runs:
            preset, overrides = study.config(run, {})
            config = load_config(preset, [*overrides, f"train.steps={TURN_STEPS}", "train.log_every=10"])
            root = work / study.name / f"rate-{run}-{turn}"
            shutil.rmtree(root, ignore_errors=True)
            list(train(config, root))
            found[run].append(config.train.batch_size / images_per_second(read_log(root)))
    middle = {run: statistics.median(seconds) for run, seconds in found.items()}
    return {"step_seconds": middle, "turns": found, "machine": machine_name(), "commit": commit()}


def repeat(file: Path) -> tuple[float, float]:
    """Train what a result describes once more: its held-out loss now, and the one that is stored."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    job = Job(stored["run"], stored["seed"], stored["preset"], tuple(stored["overrides"]), change=stored.get("change"))
    with tempfile.TemporaryDirectory() as folder:
        return train_job(job, Path(folder) / "run")["held_out"], stored["held_out"]


def read_log(root: Path) -> list[dict]:
    """The records of a run."""
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def images_per_second(records: list[dict]) -> float:
    """The median rate in the log of a run."""
    return statistics.median(r["images_per_second"] for r in records if r.get("images_per_second"))


def known_jobs(study: Study, folder: Path) -> list[Job]:
    """Trials, and the jobs that count as soon as all trials are done."""
    trials = study.trials()
    return trials if missing(trials, folder) else [*trials, *jobs_of(study, folder)]


def jobs_of(study: Study, folder: Path) -> list[Job]:
    """The trainings that count, with what the search has chosen."""
    found = {job.name: json.loads((folder / f"{job.name}.json").read_text())["held_out"] for job in study.trials()}
    return study.jobs(choose(study, found))


def run_all(jobs: list[Job], arguments: argparse.Namespace) -> None:
    """Each job in a process of its own, `--jobs` at a time. Raises SystemExit when one fails."""
    waiting, running = list(jobs), {}
    while waiting or running:
        while waiting and len(running) < arguments.jobs:
            job = waiting.pop(0)
            command = [sys.executable, __file__, arguments.name, "--work", str(arguments.work), "--one", job.name]
            running[job.name] = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
            print(f"{time.strftime('%H:%M:%S')} {job.name} begins, {len(waiting)} wait", flush=True)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    raise SystemExit(f"{name} ended with {process.returncode}; the others go on, run this again later")
        time.sleep(1)


def train_and_measure(job: Job, study: Study, work: Path) -> dict:
    """Train a job, or go on with it, and measure its averaged weights; under torchrun the first process does."""
    root = work / study.name / job.name
    found = {"study": study.name, **train_job(job, root)}
    if job.searched is not None or read_world().rank or not study.samples:
        return found
    found["metrics"] = measure(root, study.samples)
    if job.seed == study.seeds[0]:  # the spread over the seeds of sampling
        found["metrics_again"] = measure(root, study.samples, seed=study.samples)
    return found


def train_job(job: Job, root: Path) -> dict:
    """Train a job in a folder, or go on with it there: what is known of it without samples."""
    import torch

    import diffussm_cli
    from diffussm_cli.events import finish
    from diffussm_cli.training import train

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    if job.change:
        CHANGES[job.change]()
    config, start = job.config(), time.process_time()
    done = finish(train(config, root, resume=root.exists()))
    records = read_log(root)
    curve = [(r["step"], r["images"], r["held_out"]) for r in records if "held_out" in r]
    return {
        "run": job.run,
        "seed": job.seed,
        "searched": job.searched,
        "change": job.change,
        "preset": job.preset,
        "overrides": list(job.overrides),
        "config": config_hash(config),
        "parameters": cost(config).parameters,
        "steps": done.steps,
        "gflops": step_gflops(config) * done.steps,
        "cpu_seconds": time.process_time() - start,
        "images_per_second": images_per_second(records),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "curve": curve,
        "held_out": curve[-1][2],
        "commit": commit(),
        "versions": {
            "diffussm": diffussm_cli.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "machine": machine_name(),
        "date": time.strftime("%Y-%m-%d"),
    }


def show_plan(study: Study) -> None:
    """What the study would run: steps, Gflops and GPU days by arithmetic."""
    jobs = [*study.trials(), *study.jobs({})]
    total = 0.0
    for job in jobs:
        config = job.config()
        gflops = step_gflops(config) * config.train.steps
        total += gflops
        print(f"{job.name:32} {config.train.steps:9,} steps  {gflops:.3g} Gflops  {days(gflops):.3g} GPU days")
    print(f"{len(jobs)} trainings, {total:.3g} Gflops, {days(total):.3g} GPU days at {GPU_TFLOPS:.0f} TFLOP/s")


def days(gflops: float) -> float:
    """GPU days of so many billions of multiply-adds."""
    return 2 * gflops / (GPU_TFLOPS * 1e3) / 86400


def machine_name() -> str:
    import torch

    from diffussm_cli.machine.device import processor_name

    if torch.cuda.is_available():
        return f"{read_world().size} x {processor_name(torch.device('cuda'))}"
    return f"{processor_name(torch.device('cpu'))}, 1 thread"


def commit() -> str:
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
