"""What `import diffussm` offers beside the networks: each function does what a command does, and
returns its value.

The events of a session are shown as the commands show them, on stderr, unless `show` is false.
"""

import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from diffussm_cli.commands.console import follow, make_console, warn
from diffussm_cli.config import (
    DEFAULT_PRESET,
    DEFAULT_VAE,
    MAX_SEED,
    Config,
    SampleConfig,
    check_whole,
    config_from_dict,
    load_config,
    nearest,
    preset_names,
    to_dict,
    unused_of_request,
    whole_number,
)
from diffussm_cli.data.arrays import write_npz
from diffussm_cli.data.datasets import images_of
from diffussm_cli.data.images import image_grid
from diffussm_cli.errors import ConfigError, naming_parameters
from diffussm_cli.evaluation.comparison import USUAL
from diffussm_cli.events import Event, finish
from diffussm_cli.machine.files import default_cache
from diffussm_cli.model import Backbone
from diffussm_cli.profiling.flops import Cost
from diffussm_cli.runs import TrainedRun, find_run
from diffussm_cli.sampling.beginning import Beginning, Picture, read_beginning
from diffussm_cli.sampling.sampler import Sampler, open_sampler

T = TypeVar("T")
Name = str | Path


@dataclass(frozen=True)
class Run:
    """A trained model that is ready to draw.

    Attributes:
        trained: where it comes from: folder, configuration, weights, step and average.
        device, precision: where and how images are drawn, as `diffussm sample` takes them.
    """

    trained: TrainedRun
    device: str = "auto"
    precision: str = "auto"

    @property
    def folder(self) -> Path:
        """The run folder; of a model that is none, the folder to which its images go."""
        return self.trained.root

    @property
    def config(self) -> Config:
        """Everything that determined the run."""
        return self.trained.config

    @property
    @naming_parameters()
    def model(self) -> Backbone:
        """The network with averaged weights, in eval mode: (x_t, t, y) -> what its objective
        predicts.
        """
        return self._sampler().model

    @naming_parameters()
    def sample(
        self,
        num: int = 40,
        *,
        classes: Sequence[int | str] = (),
        prompts: Sequence[str] = (),
        negative: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        image: Picture | None = None,
        mask: Picture | None = None,
        strength: float | None = None,
        interpolate: Sequence[int] | None = None,
        callback: Callable[[int, Tensor], Any] | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw images of the seeds seed, seed + 1, ...: uint8 (num, C, H, W).

        Args:
            classes: labels or names of classes, used in turn; if empty, each seed draws its own.
            prompts: captions, used in turn, for a model with text; by default the run's
                `sample.prompts`.
            negative: a prompt that guidance leads away from.
            image: an image to begin with in place of noise: a file, an image of Pillow, or uint8
                (C, H, W), of the size of the run's images.
            mask: the same with white pixels, or bool (H, W), where `image` is drawn anew; the rest
                of it is kept.
            strength: how much of `image` is drawn again, from 0 (nothing) to 1; by default 0.8, and
                1 with a mask.
            interpolate: two seeds in place of `seed`; the images go from that of the first to that
                of the second. Without `classes`, all have the label of the first.
            callback: is called with the number of the step, from 0, and x_t (B, C, H, W) after each
                step of each batch.
            sampling: fields of the section `sample` to change: steps, sampler, guidance, ...

        Raises:
            DiffussmError: for a request that the model does not support.

        Warns:
            UserWarning: about the parts of the request that nothing uses.
        """
        from diffussm_cli.data.text import check_prompts

        check_numbers({"num": num, "seed": seed, "batch_size": batch_size})
        labels = check_labels(classes, self.config)
        if callback is not None and not callable(callback):
            raise ConfigError(f"callback: {callback!r:.80} must be a function of step and x_t")
        request = with_fields(self.config, sampling, "sample").sample
        beginning = read_beginning(self.config, request, num, image, mask, strength, interpolate)
        sampler = self._sampler(request, batch_size, beginning)
        lines = [unused_of_request(self.config, request, num, labels, prompts)]
        lines += [unused_seed(seed, interpolate)]
        for line in filter(None, lines):
            warnings.warn(line, stacklevel=3)
        prompts = prompts or self.config.sample.prompts
        check_prompts(prompts, negative, self.config, sampler.sampling)
        seeds = range(num) if interpolate else range(seed, seed + num)
        captions = [prompts[i % len(prompts)] for i in range(num) if prompts]
        text = sampler.text(captions, negative)

        def after_step(step: int, _: Any, x: Tensor) -> Tensor:
            if callback is not None:
                callback(step, x)
            return x

        drawn = sampler.draw(seeds, sampler.labels(seeds, labels), text, after_step)
        return torch.cat([images for _, images in drawn])

    def _sampler(
        self,
        sampling: SampleConfig | None = None,
        batch_size: int = 64,
        beginning: Beginning | None = None,
    ) -> Sampler:
        where = self.precision, self.device
        return open_sampler(self.trained, sampling, batch_size, *where, beginning)


@naming_parameters()
def load(
    run: Name | None = None,
    *,
    ema: float | None = None,
    objective: str | None = None,
    ema_width: float | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Run:
    """Open a trained model.

    Args:
        run: a run folder, its `final/`, a checkpoint, a published DiT's .pt file, a model of the
            package ("mnist", "emoji"), or OWNER/NAME[@REVISION] on the hub; by default the newest
            run in runs/.
        ema: the decay of the average, if the run has several.
        objective: what a published .pt file predicts: noise, as DiT's, or flow, as SiT's.
        ema_width: the width of an average that the snapshots of the run give, such as 0.1.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: auto, fp32, bf16.

    Raises:
        DiffussmError: if there is no such run, or it is damaged.
    """
    trained = find_run(None if run is None else Path(run), ema, objective, ema_width)
    return Run(trained, device, precision)


@naming_parameters()
def train(
    config: Config | Name | None = None,
    out: Name | None = None,
    *,
    data: Dataset | Name | None = None,
    init: Name | None = None,
    resume: bool = False,
    set: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    show: bool = True,
    **fields: Any,
) -> Run:
    """Train a model and write a self-describing run folder, as `diffussm train` does.

    Args:
        config: a preset's name, a YAML file, or a configuration; by default the preset "mnist",
            with size, channels, classes and guidance read from `data`, if they are given. A run
            that continues keeps its own configuration, unless this is one or a file.
        out: the run folder; by default the first free one of runs/PRESET, runs/PRESET-2, ...
        data: a folder, as `--data`; or a torch Dataset whose items are images (C, H, W) or pairs
            (image, label): uint8, or floats in [-1, 1]. Classes are its `classes`, or the numbers
            up to the largest label. To resume such a run, give the data again.
        init: begin with the weights of another model, as far as they fit: what `load` takes.
        resume: continue the run in `out`, or the newest run of the preset, from its newest
            checkpoint.
        set: fields by their whole name, such as {"model.depth": 4}.
        stop: asked after every step; if it returns true, a checkpoint is written and training ends.
        fields: fields of the section `train` to change: lr=2e-3, steps=500, ...

    Returns:
        The trained run.

    Raises:
        DiffussmError: for anything that can be mended; before training where possible.
    """
    from diffussm_cli.profiling import flops
    from diffussm_cli.training import session
    from diffussm_cli.training.configure import configure

    changes = dict(set or {}) | {f"train.{name}": value for name, value in fields.items()}
    if isinstance(data, str | Path):
        changes["data.path"] = str(data)
    if init is not None:
        changes["train.init"] = str(init)
    where = None if out is None else Path(out)
    dataset = None if isinstance(data, str | Path) else data
    if isinstance(config, Config):
        config = with_changes(config, changes)
    else:
        preset = None if config is None else str(config)
        continues = resume and (preset is None or preset in preset_names())
        config, where, lines = configure(
            preset, where, fields=changes, continues=continues, dataset=dataset
        )
        for line in lines if show else ():
            make_console().print(line)

    options: dict[str, Any] = {"dataset": dataset, "operations": flops.training_operations}
    events = session.train(config, where, resume=resume, stop=stop, **options)
    return load(_run(events, show).root)


@naming_parameters()
def sample(
    run: Run | Name, out: Name | None = None, num: int = 40, *, show: bool = True, **request: Any
) -> Path:
    """Draw images into a folder, as `diffussm sample` does: PNG files, a grid, and how they were
    made.

    Args:
        run: from `load` or `train`, or what `load` takes.
        out: the folder; by default RUN/images, or a numbered one.
        request: classes, prompts, negative, seed, batch_size, npz, film, image, mask, strength,
            interpolate, and fields of the section `sample`.

    Returns:
        The path of the grid.

    Raises:
        DiffussmError: where possible, before anything is drawn.
    """
    from diffussm_cli.sampling import session

    run = run if isinstance(run, Run) else load(run)
    line = unused_seed(request.get("seed", 0), request.get("interpolate"))
    if line and show:
        warn(make_console(), line)
    sampling, request = split_fields(run.config, request)
    check_numbers(request | {"num": num})
    request["classes"] = check_labels(request.get("classes", ()), run.config)
    request |= {"sampling": sampling, "precision": run.precision, "device": run.device}
    return _run(
        session.sample(run.trained, None if out is None else Path(out), num, **request), show
    )


@naming_parameters()
def evaluate(
    samples: Run | Name,
    reference: Name | Dataset | None = None,
    metrics: Sequence[str] = USUAL,
    *,
    show: bool = True,
    **request: Any,
) -> dict[str, float]:
    """Measure images, or images drawn from a run, against a reference, as `diffussm eval` does.

    Args:
        samples: a folder of images, an .npz, a run from `load` or `train`, or what `load` takes.
        reference: an .npz from ADM or `diffussm eval --make-ref`, images, or a torch Dataset as in
            `train`; by default the run's own.
        metrics: fid, sfid, is, precision, recall, kid, fid_infinity.
        request: num, seed, classes, prompts, negative, extractor, resolution, batch_size, and
            fields of the section `sample`.

    Returns:
        The metrics by name, such as {"fid": 0.5}.

    Raises:
        DiffussmError: before the long work starts, where possible.
    """
    from diffussm_cli.evaluation import session
    from diffussm_cli.evaluation.results import find_run_at

    check_numbers(request)
    request = {"cache": default_cache()} | request
    run = samples if isinstance(samples, Run) else None
    trained = run.trained if run else find_run_at(Path(str(samples)))
    if trained is not None:
        request["sampling"], request = split_fields(trained.config, request)
        request["classes"] = check_labels(request.get("classes", ()), trained.config)
    if run is not None:
        request |= {"precision": run.precision, "device": run.device}
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(reference, Dataset):
            pixels = images_of(reference).permute(0, 2, 3, 1).numpy()
            reference = Path(folder) / "reference.npz"
            write_npz(reference, {"arr_0": (pixels.shape, pixels.dtype, [pixels])})
        where = run.folder if run else str(samples)
        against = None if reference is None else str(reference)
        result = _run(session.evaluate(where, against, metrics, run=trained, **request), show)
    return {} if result is None else result["metrics"]


@naming_parameters()
def encode(
    source: Name,
    target: Name,
    resolution: int | tuple[int, int] = 256,
    vae: Name = DEFAULT_VAE,
    *,
    show: bool = True,
    **options: Any,
) -> Path:
    """Encode images as latents of a VAE, as `diffussm encode` does; the same call resumes after an
    interruption.

    Args:
        source: one folder per class, a flat folder, tar or parquet shards.
        target: the folder for the latents.
        resolution: pixels, or (height, width).
        vae: a hub name or a folder.
        options: those of `diffussm_cli.data.latents.encode_images`.

    Returns:
        `target`, which `train(data=...)` takes.

    Raises:
        DiffussmError: for anything that can be mended.
    """
    from diffussm_cli.data.latents import encode_images

    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    _run(encode_images(source, target, size, str(vae), **options), show)
    return Path(target)


@naming_parameters()
def cost(config: Config | Name = DEFAULT_PRESET, set: Mapping[str, Any] | None = None) -> Cost:
    """Parameters, tokens, Gflops and training memory of a configuration, by formula.

    Args:
        config: a preset's name, a YAML file, or a configuration.
        set: fields by their whole name, such as {"model.depth": 4}.

    Raises:
        ConfigError: for a wrong field.
    """
    from diffussm_cli.profiling import flops

    if isinstance(config, Config):
        config = with_changes(config, set or {})
    return flops.cost(
        config if isinstance(config, Config) else load_config(str(config), fields=set)
    )


def grid(images: Tensor, path: Name | None = None, columns: int = 10) -> Image.Image:
    """Images in rows as one picture; small ones are enlarged.

    Args:
        images: uint8 (n, 1 or 3, H, W), n at least 1.
        path: also write it there.
        columns: images in a row, at least 1.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            "images must be uint8 (n, C, H, W), n at least 1, "
            f"not {images.dtype} {tuple(images.shape)}"
        )
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    pixels = np.asarray(image_grid(images, min(columns, len(images))).permute(1, 2, 0))
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if path is not None:
        picture.save(path)
    return picture


# ----------------------------------------------------------------------------------- parts of these
def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration with other values of fields, given by their whole names; checked. Raises
    ConfigError.
    """
    return config_from_dict(to_dict(config), "config", fields=changes, name=config.preset)


def with_fields(config: Config, fields: Mapping[str, Any], section: str) -> Config:
    """A configuration with other fields of a section, checked. Raises ConfigError."""
    return with_changes(config, {f"{section}.{name}": value for name, value in fields.items()})


def split_fields(config: Config, request: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The section `sample` with what a request changes of it, and the rest of the request. Raises
    ConfigError.
    """
    fields = {
        name: value
        for name, value in request.items()
        if hasattr(config.sample, name) and name != "prompts"
    }
    rest = {name: value for name, value in request.items() if name not in fields}
    return with_fields(config, fields, "sample").sample, rest


def check_numbers(request: Mapping[str, Any]) -> None:
    """Raises ConfigError for a wrong num, batch_size or seed of a request."""
    for name in ("num", "batch_size"):
        check_whole(name, request.get(name, 1), least=1)
    check_whole("seed", request.get("seed", 0), least=0, most=MAX_SEED)


def unused_seed(seed: int, interpolate: Sequence[int] | None) -> str:
    """A line about a seed, other than by default, that nothing uses; empty if there is none."""
    return f"not used: seed={seed} (interpolate names the seeds)" if interpolate and seed else ""


def check_labels(classes: Sequence[int | str], config: Config) -> list[int]:
    """Labels, or names of classes, as whole numbers. Raises ConfigError for those that the model
    does not have.
    """
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise ConfigError(
            f"classes: {classes!r:.80} must be a list of labels or class names, such as [0]"
        )

    n, names = config.model.num_classes, config.data.class_names
    labels = []
    for value in classes:
        is_name = isinstance(value, str) and value in names
        label = names.index(value) if is_name else whole_number(value)
        if label is None or not 0 <= label < n:
            has = f"0 to {n - 1}" if n else "none, as it was trained without classes"
            near = nearest(value, names) if names and isinstance(value, str) else ""
            raise ConfigError(
                f"classes: {value!r:.80} is not a class of this model; it has {has}{near}"
            )
        labels.append(label)
    return labels


def _run(session: Generator[Event, None, T], show: bool) -> T:
    return follow(make_console(), session) if show else finish(session)
