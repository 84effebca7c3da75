"""Drawing from a trained run into a folder, as `diffussm sample` does."""

import os
import shlex
from collections.abc import Generator, Sequence
from pathlib import Path

from diffussm_cli import runs
from diffussm_cli.config import SampleConfig, unused_of_request
from diffussm_cli.data.images import GRID
from diffussm_cli.data.samples import META, NPZ, holds_samples, is_image_name
from diffussm_cli.errors import ConfigError, writing
from diffussm_cli.events import Event, Message, Progress, Stage, Warned
from diffussm_cli.machine.files import check_output
from diffussm_cli.machine.processes import gather, process_group, read_world
from diffussm_cli.runs import TrainedRun, find_run
from diffussm_cli.sampling.beginning import Picture, read_beginning, unused_of_beginning
from diffussm_cli.sampling.film import SUFFIXES, write_film
from diffussm_cli.sampling.folder import IMAGES, SampleFolder, free_folder
from diffussm_cli.sampling.request import read_meta, sample_facts
from diffussm_cli.sampling.sampler import open_sampler


def sample(
    run: Path | str | TrainedRun,
    out: Path | str | None = None,
    num: int = 40,
    *,
    seed: int = 0,
    classes: Sequence[int] = (),
    prompts: Sequence[str] = (),
    negative: str | None = None,
    sampling: SampleConfig | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    device: str = "auto",
    grid: Path | str | None = None,
    npz: bool = False,
    film: Path | str | None = None,
    image: Picture | None = None,
    mask: Picture | None = None,
    strength: float | None = None,
    interpolate: Sequence[int] | None = None,
) -> Generator[Event, None, Path]:
    """Draw images of seeds `seed`, `seed` + 1, ... into a folder. The same call resumes an
    interrupted one.

    Under torchrun the processes share the work.

    Args:
        run: a run folder, its `final/` or `best/`, a checkpoint, a published DiT, or a name that
            `find_run` takes.
        out: the output folder; by default RUN/images, or a numbered one if that holds images of
            another request.
        classes: labels, used in turn; if empty, each seed draws its own.
        prompts: captions, used in turn, for a run with text, by default its `sample.prompts`;
            `negative` is what guidance leads away from.
        sampling: sampler, steps and guidance; the run's own by default.
        grid: the file of the grid; OUT/grid.png by default.
        npz: also write samples.npz.
        film: also write the denoising of the first images into this .gif or .webp. It replaces
            nothing but the film that was last written for the same folder.
        image, mask, strength, interpolate: what images begin with; see `read_beginning`.
            `interpolate` names its seeds itself, so that `seed` has no effect.

    Yields:
        events.

    Returns:
        The path of the grid.

    Raises:
        DiffussmError: where possible, before anything is drawn.
    """
    trained = run if isinstance(run, TrainedRun) else find_run(Path(run))
    grid = None if grid is None else Path(grid)
    film = None if film is None else Path(film)
    sampling = sampling or trained.config.sample
    if line := unused_of_request(trained.config, sampling, num, classes, prompts):
        yield Warned(line)
    prompts = prompts or trained.config.sample.prompts
    # images between two seeds are numbered from 0
    world = read_world()
    seeds = range(num) if interpolate else range(seed, seed + num)

    if grid and grid.suffix.lower() != ".png":
        raise ConfigError(f"--grid: {str(grid)!r} must end in .png")
    if film:
        made = Path(out) if out is not None else trained.root / IMAGES
        check_output(film, "--film", SUFFIXES, makes=made)
    if trained.assumption:
        yield Message(trained.assumption)

    beginning = read_beginning(trained.config, sampling, num, image, mask, strength, interpolate)
    if line := unused_of_beginning(beginning, sampling):
        yield Warned(line)

    yield Stage("loading")
    sampler = open_sampler(trained, sampling, batch_size, precision, device, beginning)
    facts = sample_facts(trained, sampler, seeds, classes, prompts, negative)
    sampler.text(prompts[:1])  # a missing text encoder is an error before anything is written

    if out is not None:
        check_folder(Path(out))
    path = Path(out) if out is not None else free_folder(trained.root, facts)
    if out is None and path.name != IMAGES:
        yield Message(
            f"{trained.root / IMAGES} holds images of another request; these go to {path}"
        )
    if sampler.decoding.warning:
        yield Warned(sampler.decoding.warning)
    grid = check_grid(grid, path) if grid else path / GRID
    before = recorded(path, "film")
    if film:
        check_replaced(film, path, "film", [before])
    beside = {
        "grid": os.path.relpath(grid, path),
        "film": os.path.relpath(film, path) if film else before,
    }
    written = [name for name, is_ours in ((GRID, grid == path / GRID), (NPZ, npz)) if is_ours]
    check_foreign(path, written)
    folder = SampleFolder(path, sampler, seeds, facts | beside)

    with writing(f"--out: cannot write to {str(path)!r}"), process_group(world):
        if world.rank == 0:
            folder.begin()
        gather(None, world)

        yield Stage("looking for finished images")
        batches = folder.missing(world)
        done = 0
        gather(None, world)  # every process looks before any of them draws

        total = sum(map(len, batches))
        if total:
            yield Progress(0, total)
        for n in folder.draw(batches):
            done += n
            yield Progress(done, total)
        gather(None, world)
        if world.rank == 0:
            folder.finish(grid, npz)

    if film and world.rank == 0:
        yield Stage("filming")
        write_film(sampler, seeds, facts, film)
        yield Message(f"film: {film}")
    yield Message(f"{num} images of {trained.label} in {shlex.quote(str(path))}")
    return grid


def check_folder(folder: Path) -> None:
    """Raises ConfigError for a folder that belongs to a run, in which images have no place, or to
    another program that has a meta.json.
    """
    kept = {runs.CHECKPOINTS, runs.FINAL, runs.BEST, runs.SAMPLES, runs.BOARD}
    inside = {runs.CONFIG, runs.STATE} & set(os.listdir(folder)) if folder.is_dir() else set()
    path = folder.absolute()
    if inside or (path.name in kept and (path.parent / runs.CONFIG).is_file()):
        raise ConfigError(
            f"--out: {str(folder)!r} is a folder of a run; "
            "name one of its own for the images, such as RUN/images"
        )
    if not (folder / META).is_file() or holds_samples(folder):
        return

    # A damaged meta.json of ours lies beside images with the names of samples.
    if not any(map(is_image_name, os.listdir(folder))):
        raise ConfigError(
            f"--out: {str(folder)!r} is not a folder of samples, as its {META} shows; "
            "name another folder"
        )


def check_foreign(folder: Path, names: Sequence[str]) -> None:
    """Raises ConfigError if files of these names, which samples have beside them, lie in a folder
    that holds no samples.
    """
    foreign = [name for name in names if os.path.lexists(folder / name)]
    if foreign and not holds_samples(folder):
        raise ConfigError(
            f"--out: {str(folder / foreign[0])!r} is not of samples and would be replaced; name "
            "another folder"
        )


def check_grid(grid: Path, folder: Path) -> Path:
    """Return the file for the grid of a folder of images. It replaces nothing but the grid of that
    folder.

    Raises:
        ConfigError: if it has the name of an image of the folder, or is another file that exists.
    """
    if grid.parent.is_dir():
        check_output(grid, "--grid")
    if grid.resolve().parent == folder.resolve() and is_image_name(grid.name):
        raise ConfigError(f"--grid: {str(grid)!r} is the name of an image; name another file")
    check_replaced(grid, folder, "grid", [recorded(folder, "grid"), GRID])
    return grid


def check_replaced(path: Path, folder: Path, kind: str, ours: Sequence[str | None]) -> None:
    """Raises ConfigError if the grid or film of a folder of images, as `kind` says, would replace
    a file that is none of `ours`, named relative to the folder.
    """
    if path.exists() and os.path.relpath(path, folder) not in ours:
        raise ConfigError(
            f"--{kind}: {str(path)!r} exists and would be replaced; name another file"
        )


def recorded(folder: Path, kind: str) -> str | None:
    """The grid or film that was written for a folder of images, relative to it, as its meta.json
    says.
    """
    return read_meta(folder).get(kind) if (folder / META).is_file() else None
