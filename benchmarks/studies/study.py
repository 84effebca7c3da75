"""What a study is: the runs of its YAML with every override resolved, and the budget that makes
them comparable.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffussm_cli.config import Config, config_from_dict, load_config, to_yaml
from diffussm_cli.profiling.flops import cost

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FLOOR, RATES = "floor.json", "rates.json"  # measures of real images; seconds of a step
TRAINING_PASSES = 3  # a backward pass takes twice the multiply-adds of a forward pass


@dataclass(frozen=True)
class Job:
    """One training of a study, with its name as file name."""

    run: str
    seed: int
    preset: str
    overrides: tuple[str, ...]
    searched: str | None = None  # the value of the searched field, in a trial of the search
    change: str | None = None  # to the network, a name in `changes.CHANGES`
    held_out_images: int | None = None  # of the last held-out loss, where the curve takes fewer

    @property
    def name(self) -> str:
        """RUN-sSEED, or RUN-VALUE for a trial of the search."""
        return (
            f"{self.run}-s{self.seed}" if self.searched is None else f"{self.run}-{self.searched}"
        )

    def config(self) -> Config:
        """The whole configuration."""
        return load_config(self.preset, [*self.overrides, f"train.seed={self.seed}"])


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    `runs` maps a name to a preset, a change to the network (`changes.py`), and overrides. The
    budget is `gflops` of training, `images`, or `seconds` of training on one thread, by the seconds
    of a step of each run that were measured in turn beforehand. `search` maps one field to its
    grid, which is tried at a share of the budget on the held-out loss; a run that sets this field
    itself is not searched. With `train.lr_decay: constant`, the averaged weights take the place of
    annealing, and one run answers for equal images, Gflops and seconds.

    The defaults are what the first studies did; docs/results.md says what a new study takes.
    """

    name: str
    question: str
    rule: str
    runs: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    base: dict[str, Any] = field(default_factory=dict)
    gflops: float | None = None
    images: int | None = None
    seconds: float | None = None
    search: dict[str, list] = field(default_factory=dict)
    search_seed: int | None = None  # of the trials; by default the first seed, which then counts
    search_share: float = 1 / 3  # of the budget, for each trial
    warmup: float | None = None  # share of a run's steps; by default its `train.warmup_steps`
    samples: int = 2000  # 0: only the held-out loss
    balanced: bool = False  # samples of all classes in turn, not of classes drawn with the seeds
    own_samples: bool = False  # other seeds of sampling for each seed of training
    evaluations: int = 10  # points of the held-out curve
    curve_images: int = 0  # held-out images of the curve; its last point is of all. 0: all
    against: str = ""  # the run that the report takes differences to; by default the first
    margin: float | None = None  # of held-out loss; runs that differ by less are equal
    stopped: tuple[str, ...] = ()  # runs that were stopped before they had all seeds
    target: float | None = None  # a held-out loss; the report shows the seconds that lead to it
    step_seconds: dict[str, float] = field(default_factory=dict)  # of each run, in the file RATES
    beside: "Study | None" = None  # an earlier study of the same budget, whose runs a report shows
    timed_by: str = ""  # a run of the study beside, whose seconds of a step are the scale of ours

    def shown(self) -> list["Study"]:
        """The studies whose runs the report shows, in order."""
        return [*(self.beside.shown() if self.beside else []), self]

    def trials(self) -> list[Job]:
        """The trainings of the search, of every searched run and value, with one seed."""
        seed = self.seeds[0] if self.search_seed is None else self.search_seed
        return [
            self._job(run, seed, {name: value}, value, self.search_share)
            for name, grid in self.search.items()
            for run in self.searched(name)
            for value in grid
        ]

    def searched(self, name: str) -> list[str]:
        """The runs that do not set the searched field themselves."""
        return [run for run, fields in self.runs.items() if name not in (fields or {})]

    def sampling_seed(self, seed: int) -> int:
        """The seed of the first sample of the training with this seed."""
        return seed * self.samples if self.own_samples else 0

    def compared(self) -> str:
        """The run that differences are taken to."""
        return self.against or next(run for of in self.shown() for run in of.runs)

    def jobs(self, chosen: dict[str, dict[str, Any]]) -> list[Job]:
        """The trainings that count, with the values that the search has chosen for each run."""
        return [
            self._job(run, seed, chosen.get(run, {})) for seed in self.seeds for run in self.runs
        ]

    def config(self, run: str, values: dict[str, Any]) -> tuple[str, list[str]]:
        """The preset of a run, and its overrides."""
        fields = dict(self.runs[run] or {})
        preset = fields.pop("preset", self.base.get("preset"))
        fields.pop("change", None)
        settings = {k: v for k, v in self.base.items() if k != "preset"} | fields | values
        return preset, [f"{k}={v}" for k, v in settings.items()]

    def _job(
        self, run: str, seed: int, values: dict[str, Any], searched: Any = None, share: float = 1.0
    ) -> Job:
        preset, overrides = self.config(run, values)
        steps = self.steps(run, load_config(preset, overrides), share)
        every = math.ceil(steps / self.evaluations)
        overrides += [f"train.steps={steps}", f"eval.every={every}", "eval.images=0"]
        overrides += ["eval.held_out_every=0"]
        if self.warmup is not None and not any(
            o.startswith("train.warmup_steps=") for o in overrides
        ):
            overrides.append(f"train.warmup_steps={round(self.warmup * steps)}")
        held_out = None
        if self.curve_images:
            held_out = load_config(preset, overrides).eval.held_out_images
            overrides.append(f"eval.held_out_images={self.curve_images}")

        searched = None if searched is None else str(searched)
        change = (self.runs[run] or {}).get("change")
        return Job(run, seed, preset, tuple(overrides), searched, change, held_out)

    def steps(self, run: str, config: Config, share: float = 1.0) -> int:
        """The number of steps that a share of the budget pays for."""
        if self.seconds is not None:
            if run not in self.step_seconds:
                raise SystemExit(
                    f"{self.name}: a step of {run} has not been timed yet; run it without --plan"
                )
            return round(share * self.seconds / self.step_seconds[run])
        if self.images is not None:
            return round(share * self.images / config.train.batch_size)
        return round(share * self.gflops / step_gflops(config))


def step_gflops(config: Config) -> float:
    """Gflops of one step of training, kernels included."""
    c = cost(config)
    return TRAINING_PASSES * (c.gflops * config.train.batch_size + c.kernel_gflops)


def load_study(name: str) -> Study:
    """The study in NAME.yaml beside this file, or at a path. Raises SystemExit for one that does
    not hold together.
    """
    path = Path(name) if name.endswith(".yaml") else HERE / f"{name}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {f.name for f in dataclasses.fields(Study)}
    if set(values) - known:
        raise SystemExit(
            f"{path}: unknown {', '.join(sorted(set(values) - known))}; known: "
            f"{', '.join(sorted(known))}"
        )
    beside = load_study(values["beside"]) if "beside" in values else None
    study = Study(
        **({"name": path.stem} | values | {"seeds": tuple(values["seeds"]), "beside": beside})
    )
    if [study.gflops, study.images, study.seconds].count(None) != 2 or len(study.search) > 1:
        raise SystemExit(f"{path}: give gflops, images or seconds, and at most one searched field")
    if study.timed_by and (beside is None or study.timed_by not in beside.runs):
        raise SystemExit(f"{path}: timed_by: {study.timed_by} is not a run of the study beside")
    if study.against and study.compared() not in [run for of in study.shown() for run in of.runs]:
        raise SystemExit(f"{path}: against: {study.against} is not a run")
    rates = RESULTS / study.name / RATES
    if study.seconds is not None and rates.is_file():
        study.step_seconds.update(json.loads(rates.read_text(encoding="utf-8"))["step_seconds"])
    return study


def config_hash(config: Config, change: str | None = None) -> str:
    """A hash of everything that determines a run: configuration and change, its seed aside."""
    unseeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))
    text = to_yaml(unseeded) + (f"change: {change}\n" if change else "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stored_config(result: dict) -> Config:
    """The configuration of a result: the stored one, or in old results what its preset gives.

    Raises:
        SystemExit: if that preset gives another configuration today.
    """
    if "configuration" in result:
        return config_from_dict(result["configuration"], "--repeat")
    config = load_config(result["preset"], [*result["overrides"], f"train.seed={result['seed']}"])
    today = config_hash(config)  # the hash of old results leaves out the change
    if today != result["config"]:
        raise SystemExit(
            f"--repeat: preset {result['preset']} with the overrides of {result['run']} is "
            f"configuration {today} today, and {result['config']} was trained; repeat it at "
            f"commit {result['commit']}"
        )
    return config


def choose(study: Study, held_out: dict[str, float]) -> dict[str, dict[str, Any]]:
    """The best value of the searched field for each run, from the held-out losses of the trials by
    name.

    Raises:
        SystemExit: if a trial is missing, or the best value lies at the edge of its grid.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for name, grid in study.search.items():
        for run in study.searched(name):
            losses = [held_out[f"{run}-{value}"] for value in grid]
            best = min(range(len(grid)), key=losses.__getitem__)
            if best in (0, len(grid) - 1):
                raise SystemExit(
                    f"{study.name}: {run} is best at the edge of its grid, {name}={grid[best]}; "
                    "widen it"
                )
            chosen[run] = {name: grid[best]}
    return chosen


def missing(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """The jobs without a result."""
    return [job for job in jobs if not (folder / f"{job.name}.json").is_file()]
