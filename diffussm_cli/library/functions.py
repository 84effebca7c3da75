"""The commands as functions: `train`, `sample`, `evaluate`, `encode` and `cost`, which return their
value.

The events of a session are shown as the commands show them, on stderr, unless `show` is false.
"""

import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import Dataset

from diffussm_cli.commands.console import follow, make_console, warn
from diffussm_cli.config import DEFAULT_PRESET, DEFAULT_VAE, Config, load_config, preset_names
from diffussm_cli.data.arrays import write_npz
from diffussm_cli.data.datasets import images_of
from diffussm_cli.errors import ConfigError, in_python, naming_parameters
from diffussm_cli.evaluation.comparison import USUAL
from diffussm_cli.events import Event, finish
from diffussm_cli.library.requests import (
    OF_LOAD,
    check_labels,
    check_names,
    check_numbers,
    check_paths,
    checked_fields,
    checked_prompts,
    checked_size,
    split_fields,
    unused_seed,
    with_changes,
    without_drawing,
)
from diffussm_cli.library.run import Run, load
from diffussm_cli.machine.files import default_cache
from diffussm_cli.profiling.flops import Cost

T = TypeVar("T")


@naming_parameters()
def train(
    config: Config | Path | str | None = None,
    out: Path | str | None = None,
    *,
    data: Dataset | Path | str | None = None,
    init: Path | str | None = None,
    resume: bool = False,
    set: Mapping[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    show: bool = True,
    **fields: Any,
) -> Run:
    """Train a model and write a self-describing run folder, as `diffussm train` does.

    Args:
        config: a preset's name, a YAML file, or a configuration; by default the preset "mnist",
            whose size, channels, classes and guidance are read from `data`, if there is any. A run
            that continues keeps its own configuration, unless this is one or a file.
        out: the run folder; by default the first free one of runs/PRESET, runs/PRESET-2, ...
        data: a folder, as `--data`; or a torch Dataset whose items are images (C, H, W) or pairs
            (image, label): uint8, or floats in [-1, 1]. Classes are its `classes`, or the numbers
            up to the largest label. To resume such a run, give the data again.
        init: begin with the weights of another model, as far as they fit: what `load` takes.
        resume: continue the run in `out`, or the newest run of the preset, from its newest
            checkpoint.
        set: fields by their whole name, such as {"model.depth": 4}.
        stop: asked before the first step and after every one; if it returns true, a checkpoint of
            the steps that were made is written, and training ends.
        fields: fields of the section `train` to change: lr=2e-3, steps=500, ...

    Returns:
        The trained run.

    Raises:
        DiffussmError: for anything that can be mended; before training where possible.
    """
    from diffussm_cli.profiling import flops
    from diffussm_cli.training import session
    from diffussm_cli.training.configure import configure

    if out is not None:
        check_paths(out=out)
    if not callable(stop):
        raise ConfigError(f"stop: {stop!r:.80} must be a function")

    # What changes of the configuration.
    changes = checked_fields(set) | {f"train.{name}": value for name, value in fields.items()}
    if isinstance(data, str | Path):
        changes["data.path"] = str(data)
    if init is not None:
        changes["train.init"] = str(init)

    # The configuration: as it is given, or fitted to the data or to the run that continues.
    where = None if out is None else Path(out)
    dataset = None if isinstance(data, str | Path) else data
    listing = None
    if isinstance(config, Config):
        config = with_changes(config, changes)
    else:
        preset = None if config is None else str(config)
        continues = resume and (preset is None or preset in preset_names())
        config, where, lines, listing = configure(
            preset, where, fields=changes, continues=continues, dataset=dataset
        )
        for line in lines if show else ():
            make_console().print(in_python(line))

    events = session.train(
        config,
        where,
        resume=resume,
        dataset=dataset,
        listing=listing,
        stop=stop,
        operations=flops.training_operations,
    )
    return load(_run(events, show).root)


@naming_parameters()
def sample(
    run: Run | Path | str,
    out: Path | str | None = None,
    num: int = 40,
    *,
    show: bool = True,
    **request: Any,
) -> Path:
    """Draw images into a folder, as `diffussm sample` does: PNG files, a grid, and how they were
    made.

    Args:
        run: from `load` or `train`, or what `load` takes.
        out: the folder; by default RUN/images, or a numbered one.
        num: how many images.
        request: classes, prompts, negative, seed, batch_size, npz, grid, film, image, mask,
            strength, interpolate, and fields of the section `sample`.

    Returns:
        The path of the grid.

    Raises:
        DiffussmError: where possible, before anything is drawn.
    """
    from diffussm_cli.sampling import session

    check_names(request, session.sample, hidden=("sampling", *OF_LOAD))
    if out is not None:
        check_paths(out=out)
    run = run if isinstance(run, Run) else load(run)
    line = unused_seed(request.get("seed", 0), request.get("interpolate"))
    if line and show:
        warn(make_console(), line)
    sampling, request = split_fields(run.config, request)
    check_numbers(request | {"num": num})
    request["classes"] = check_labels(request.get("classes", ()), run.config)
    request["prompts"] = checked_prompts(request.get("prompts", ()), request.get("negative"))
    request |= {"sampling": sampling, "precision": run.precision, "device": run.device}
    return _run(
        session.sample(run.trained, None if out is None else Path(out), num, **request), show
    )


@naming_parameters()
def evaluate(
    samples: Run | Path | str,
    reference: Path | str | Dataset | None = None,
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
        request: num, seed, classes, prompts, negative, extractor, extractor_weights, resolution,
            batch_size, cache, out, and fields of the section `sample`; unless `samples` is from
            `load` or `train`, also device and precision.

    Returns:
        The metrics by name, such as {"fid": 0.5}.

    Raises:
        DiffussmError: before the long work starts, where possible.
    """
    from diffussm_cli.evaluation import session
    from diffussm_cli.evaluation.results import find_run_at

    # The request.
    run = samples if isinstance(samples, Run) else None
    if run is None:
        check_paths(samples=samples)
    if reference is not None and not isinstance(reference, Dataset):
        check_paths(reference=reference)
    check_names(request, session.evaluate, hidden=("sampling", "run", *(OF_LOAD if run else ())))
    check_numbers(request)
    request = {"cache": default_cache()} | request
    if request.get("resolution") is not None:
        request["resolution"] = checked_size(request["resolution"])
    prompts = checked_prompts(request.get("prompts", ()), request.get("negative"))

    # Images of a run, or images that are there.
    trained = run.trained if run else find_run_at(Path(str(samples)))
    if trained is not None:
        request["sampling"], request = split_fields(trained.config, request)
        request["classes"] = check_labels(request.get("classes", ()), trained.config)
        request["prompts"] = prompts
    else:
        request, line = without_drawing(request)
        if line and show:
            warn(make_console(), line)
    if run is not None:
        request |= {"precision": run.precision, "device": run.device}

    # A dataset becomes a file, as the session reads one.
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(reference, Dataset):
            images, doubt = images_of(reference)
            if doubt and show:
                warn(make_console(), doubt)
            pixels = images.permute(0, 2, 3, 1).numpy()
            reference = Path(folder) / "reference.npz"
            write_npz(reference, {"arr_0": (pixels.shape, pixels.dtype, [pixels])})

        where = run.folder if run else str(samples)
        against = None if reference is None else str(reference)
        result = _run(session.evaluate(where, against, metrics, run=trained, **request), show)
    return {} if result is None else result["metrics"]


@naming_parameters()
def encode(
    source: Path | str,
    target: Path | str,
    resolution: int | tuple[int, int] = 256,
    vae: Path | str = DEFAULT_VAE,
    *,
    show: bool = True,
    **options: Any,
) -> Path:
    """Encode images as latents of a VAE, as `diffussm encode` does; the same call resumes after an
    interruption.

    Args:
        source: one folder per class, a flat folder, tar or parquet shards, .npz files, CIFAR's
            batches, or hub:OWNER/NAME.
        target: the folder for the latents.
        resolution: pixels, or (height, width).
        vae: a hub name or a folder.
        options: those of `diffussm_cli.data.latents.encode_images`. Its `workers` start Python
            anew: a script calls this below `if __name__ == "__main__":`, or with workers=0.

    Returns:
        `target`, which `train(data=...)` takes.

    Raises:
        DiffussmError: for anything that can be mended.
    """
    from diffussm_cli.data.latents import encode_images

    check_paths(source=source, target=target, vae=vae)
    check_names(options, encode_images)
    _run(encode_images(source, target, checked_size(resolution), str(vae), **options), show)
    return Path(target)


@naming_parameters()
def cost(
    config: Config | Path | str = DEFAULT_PRESET, set: Mapping[str, Any] | None = None
) -> Cost:
    """Parameters, tokens, Gflops and training memory of a configuration, by formula.

    Args:
        config: a preset's name, a YAML file, or a configuration.
        set: fields by their whole name, such as {"model.depth": 4}.

    Returns:
        Numbers of parameters and tokens, Gflops (billions of multiply-adds) of one image, and bytes
        of memory.

    Raises:
        ConfigError: for a wrong field.
    """
    from diffussm_cli.profiling import flops

    fields = checked_fields(set)
    if isinstance(config, Config):
        config = with_changes(config, fields)
    return flops.cost(
        config if isinstance(config, Config) else load_config(str(config), fields=fields)
    )


def _run(session: Generator[Event, None, T], show: bool) -> T:
    return follow(make_console(), session) if show else finish(session)
