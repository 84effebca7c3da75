"""One way to measure images against a reference: `diffussm eval` and training both use it."""

import itertools
import json
import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli import runs
from diffussm_cli.config import BUILTIN, Config, SampleConfig
from diffussm_cli.data.samples import META
from diffussm_cli.errors import ConfigError, DataError, RunError, reason
from diffussm_cli.evaluation.comparison import (
    TABLE,
    USUAL,
    check_images,
    evaluate_features,
    needs_images,
    parse_metrics,
    possible,
    warnings,
)
from diffussm_cli.evaluation.extractors import AUTO, NAMES, Extractor, doubts, load_extractor
from diffussm_cli.evaluation.features import Gathered, gather_features
from diffussm_cli.evaluation.reference import (
    Reference,
    check_extractor,
    open_reference,
    write_reference,
)
from diffussm_cli.evaluation.sets import HELD_OUT, DrawnImages, ImageSet, open_images
from diffussm_cli.evaluation.text import Clip, names_in, names_of, retrieval
from diffussm_cli.events import Event, Message, Stage, Warned
from diffussm_cli.machine.device import keep_freed_memory, pick_device
from diffussm_cli.machine.files import check_output, write_text
from diffussm_cli.machine.processes import ALONE, World, process_group, read_world
from diffussm_cli.runs import dit_checkpoint
from diffussm_cli.runs.report import write_report
from diffussm_cli.sampling.folder import prompts_of, read_meta, sample_facts
from diffussm_cli.sampling.sampler import Sampler, open_sampler

Size = tuple[int, int]  # height, width in pixels


class UnsavedResult(RunError):
    """The file for a result cannot be written; `result` holds what took long to compute."""

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


class EvaluationSession:
    """An extractor, a cache of features, and the comparison of image sets with references.

    Args:
        extractor: a name for `load_extractor`, or `auto` to choose by the first images that are
            opened.
        weights: a file with the weights of `inception`, instead of a download.
        cache: the folder for cached features; None disables the cache.
    """

    def __init__(
        self,
        extractor: str = AUTO,
        weights: Path | None = None,
        device: str = "auto",
        batch_size: int = 64,
        cache: Path | None = None,
        world: World = ALONE,
    ):
        keep_freed_memory()
        self.requested = extractor
        self.name = extractor
        self.weights = weights
        self.device = pick_device(device)
        self.batch_size = batch_size
        self.cache = cache
        self.world = world
        self._extractor: Extractor | None = None

    @property
    def extractor(self) -> Extractor:
        """The extractor, loaded at first use. Raises DiffussmError."""
        if self._extractor is None:
            self._extractor = load_extractor(self.name, self.weights, self.device)
        return self._extractor

    def choose(self, size: Size, grey: bool) -> None:
        """Replace `auto` by digits for grey images of 28x28, and by inception for others."""
        if self.name == AUTO:
            self.name = "digits" if tuple(size) == (28, 28) and grey else "inception"

    def open(self, path: str, size: Size | None = None, name: str = "samples") -> ImageSet:
        """Open a set of images for the extractor, cropped to `size` if given; `name` is what errors
        call the path.

        Raises:
            DiffussmError: if it cannot be read, or does not fit the extractor.
        """
        if self.name == AUTO:
            images = open_images(path, 3, None, name)
            self.choose(size or images.size, images.grey)
        return open_images(path, self.extractor.channels, size, name)

    def reference(self, path: str, size: Size | None, size_of_run: Size | None = None) -> Reference:
        """Open a reference. Its images are cropped to `size`, or to the size of the run unless they
        are in an .npz.

        Raises:
            DiffussmError: if it cannot be read or was made with another extractor.
        """
        is_folder = not path.endswith(".npz") and not path.startswith(BUILTIN)
        return open_reference(path, self.extractor, size or (size_of_run if is_folder else None))

    def held_out(self, config: Config) -> ImageSet | None:
        """The held-out images of a run with text; None if there is no separate held-out set, or
        only latents.
        """
        data = config.data
        path = f"{data.path}{HELD_OUT}" if data.path.startswith(BUILTIN) else data.held_out
        if (
            not config.model.text_width
            or data.vae is not None
            or not isinstance(path, str)
            or not path
        ):
            return None
        return self.open(path, None if path.startswith(BUILTIN) else data.size, "data.held_out")

    def features(self, images: ImageSet, unit: str) -> Generator[Event, None, Gathered]:
        """Compute the features of a set, or load them from the cache. A Message tells what of the
        set is not used.
        """
        if images.left_out:
            yield Message(images.left_out)
        yield Stage("loading the extractor")
        return (
            yield from gather_features(
                images, self.extractor, self.batch_size, self.cache, self.world, unit
            )
        )

    def compare(
        self,
        images: ImageSet,
        reference: Reference,
        metrics: Sequence[str] = USUAL,
        lenient: bool = False,
    ) -> Generator[Event, None, tuple[dict[str, float], Gathered]]:
        """The metrics of a set, and its features. On processes other than the first, metrics are
        empty.

        Args:
            lenient: leave out metrics that the extractor or the reference does not support, and
                allow values that are not finite, instead of raising.

        Raises:
            DataError, ConfigError: if the reference does not fit the extractor, or a metric cannot
                be computed or, unless `lenient`, is not a finite number.
        """
        if not lenient:
            check_images(metrics, images, reference)

        # The features of both sets.
        if (
            reference.images is not None
            and reference.gathered is None
            and needs_images(metrics, reference)
        ):
            reference.complete((yield from self.features(reference.images, "reference")))
        samples = yield from self.features(images, "samples")
        check_extractor(reference, samples.pool.shape[1], self.extractor)

        # Their metrics, on one process.
        values: dict[str, float] = {}
        if self.world.rank:
            return values, samples
        yield Stage("metrics")
        names = possible(metrics, samples, reference) if lenient else metrics
        for name, value in evaluate_features(samples, reference, names):
            if not lenient and not math.isfinite(value):
                raise DataError(
                    f"metrics: {name} of {images.name} against {reference.name} is {value}"
                )
            values[name] = value
            yield Stage(f"metrics: {', '.join(values)}")
        return values, samples

    def prompted(
        self, samples: Gathered, prompts: Sequence[str], real: ImageSet | None
    ) -> Generator[Event, None, dict[str, float]]:
        """How well images with these features show what their prompts say; empty on processes other
        than the first.

        `clip_score`, if the extractor is CLIP. If every prompt is a caption of the `real` images:
        the shares of images whose nearest real image has the right name or class
        (`evaluation/text.py`). A Warned tells if none is.
        """
        values: dict[str, float] = {}
        network = getattr(self.extractor, "network", None)
        if isinstance(network, Clip) and self.world.rank == 0:
            values["clip_score"] = network.score(samples.pool, prompts)

        right_names = names_of(prompts, real.captions) if real else None
        if real is None or right_names is None:
            yield Warned(
                "retrieval is left out: the prompts are not captions of the held-out or reference "
                "images"
            )
            return values
        pool = (yield from self.features(real, "captioned images")).pool
        if self.world.rank == 0:
            captioned = [i for i, captions in enumerate(real.captions) if captions]
            names = [real.captions[i][0] for i in captioned]
            labels = real.labels and [real.labels[i] for i in captioned]
            shares = retrieval(samples.pool, right_names, pool[captioned], names, labels)
            values |= {f"retrieval_{name}": share for name, share in shares.items()}
        return values


# -------------------------------------------------------------------------------------- evaluations
def evaluate(
    samples: str | Path,
    reference: str | None = None,
    metrics: str | Sequence[str] = USUAL,
    *,
    extractor: str = AUTO,
    extractor_weights: Path | None = None,
    resolution: Size | None = None,
    num: int = 50_000,
    seed: int = 0,
    classes: Sequence[int] = (),
    prompts: Sequence[str] = (),
    negative: str | None = None,
    sampling: SampleConfig | None = None,
    precision: str = "auto",
    batch_size: int = 64,
    device: str = "auto",
    cache: Path | None = None,
    out: Path | None = None,
    run: runs.TrainedRun | None = None,
) -> Generator[Event, None, dict[str, Any] | None]:
    """Measure samples, or images drawn from a run, by ADM's protocol.

    Args:
        samples: a folder of PNG, an .npz, or a run.
        reference: an .npz from ADM or `make_reference`, or images; by default, the reference of the
            run, also for a folder of images that `sample` has drawn from it.
        metrics: names of `METRICS`; or one text, in which commas separate them, or "all".
        resolution: (H, W) to crop the reference images to; by default, the run's resolution.
        num, seed, classes, prompts, negative, sampling, precision: how images are drawn from a run;
            without effect for other samples. A run with text draws the names of its held-out images
            if there are no prompts.
        cache: the folder for cached features; None disables the cache.
        out: file for the result; by default beside the samples, with a warning if it cannot be
            written there.
        run: the run at `samples`, if `find_run_at` has already opened it.

    Yields:
        events.

    Returns:
        The metrics and how they were obtained, also written to `out`; None on processes other than
        the first. The report of a run is renewed too.

    Raises:
        DiffussmError: before the long work starts, where possible.
        UnsavedResult: if the result cannot be written to `out`; the error holds it.
    """
    metrics = parse_metrics(metrics)
    if out is not None:
        earlier = [out.name] if out.name.endswith(runs.RESULTS) else []
        check_output(out, "out", reads=[samples, reference], replaces=earlier)

    # What the samples say of themselves: a run by its configuration, other images by the meta.json
    # beside them.
    world = read_world()
    trained = run or find_run_at(samples)
    facts = {} if trained else read_facts(samples)
    usual_extractor = trained.config.eval.extractor if trained else facts.get("extractor")
    if extractor == AUTO and usual_extractor in NAMES:  # never code that a run names
        extractor = usual_extractor
    session = EvaluationSession(extractor, extractor_weights, device, batch_size, cache, world)

    with process_group(world):
        # The reference, and the real images with captions among which drawn ones are looked for.
        images = None if trained else session.open(str(samples))
        captioned: ImageSet | None = None
        size_of_run: Size | None = None
        if trained:
            session.choose(trained.config.data.size, trained.config.data.is_grey)
            captioned = None if reference else session.held_out(trained.config)
            reference = reference or trained.config.reference
            size_of_run = trained.config.data.size
        elif reference is None and facts.get("reference"):
            assert images is not None, "opened above"
            reference = str(facts["reference"])
            size_of_run = images.size
            yield Message(f"reference: {reference}, as {META} says")
            if facts.get("prompts") and reference.startswith(BUILTIN):
                captioned = session.open(f"{reference}{HELD_OUT}")
        if reference is None:
            raise ConfigError(
                "reference: name a reference file, such as one of ADM's, or a folder of real images"
            )
        against = session.reference(reference, resolution, size_of_run)
        captioned = captioned or against.images

        # The samples, if a run draws them.
        if trained:
            if trained.assumption:
                yield Message(trained.assumption)
            yield Stage("loading the run")
            if not prompts and trained.config.model.text_width and captioned:
                prompts = names_in(captioned.captions)
            seeds = range(seed, seed + num)
            sampler = open_sampler(trained, sampling, batch_size, precision, device)
            facts = sample_facts(trained, sampler, seeds, classes, prompts, negative)
            images = drawn_images(session, trained, sampler, seeds, facts)
        assert images is not None, "opened or drawn"

        # The comparison.
        values, features = yield from session.compare(images, against, metrics)
        if requested := requested_prompts(facts, len(images)):
            values |= yield from session.prompted(features, requested, captioned)
    if world.rank:
        return None

    # The result, with what makes it incomparable.
    remarks = doubts(session.requested, session.name, reference) + warnings(
        images, features, against, metrics
    )
    remarks += _doubtful_facts(facts, len(images))
    yield from map(Warned, remarks)
    result = {
        "metrics": values,
        "num": len(images),
        "reference_images": against.gathered and len(against.gathered.pool),
        "reference": reference,
        "extractor": session.extractor.identity,
        "warnings": remarks,
        "meta": dict(facts),
        "samples": str(samples),
    }
    usual = (
        trained.root / runs.RESULTS
        if trained and runs.is_elsewhere(samples)
        else results_path(Path(samples))
    )
    yield from _save(result, out, usual)
    root = trained.root if trained else usual.absolute().parent.parent  # images of a run lie in it
    yield from _renew_report(root)
    return result


def _doubtful_facts(facts: Mapping[str, Any], images: int) -> list[str]:
    """Warnings about what the meta.json of this number of images says."""
    remarks = []

    if facts.get("num", images) != images:
        remarks.append(
            f"{META} tells of {facts['num']:,} images, but there are {images:,}: "
            "it may be of others"
        )

    if facts.get("complete") is False:
        remarks.append(
            f"{META} says that these images are not complete; the command that drew them continues"
        )

    if facts.get("decoded_by") == "linear preview":
        remarks.append("samples were drawn without their VAE: these are scores of previews")

    return remarks


def drawn_images(
    session: EvaluationSession,
    trained: runs.TrainedRun,
    sampler: Sampler,
    seeds: range,
    facts: Mapping[str, Any],
) -> DrawnImages:
    """The images of a request, as `sample_facts` describes it, drawn when they are read. Raises
    DiffussmError.
    """
    if sampler.decoding.warning:
        raise DataError(f"eval: {sampler.decoding.warning}")
    text = sampler.text(prompts_of(facts, seeds), facts["negative"])
    return DrawnImages(
        sampler, seeds, facts["labels"], session.extractor.channels, str(trained.root), facts, text
    )


def make_reference(
    images: str | Path,
    target: Path,
    *,
    extractor: str = AUTO,
    extractor_weights: Path | None = None,
    resolution: Size | None = None,
    count: int = 10_000,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    cache: Path | None = None,
) -> Generator[Event, None, Path | None]:
    """Write a reference file for a set of images, with `count` of them for recall; ADM's evaluator
    can read it too.

    Yields:
        events.

    Returns:
        The path of the file; None on processes other than the first.

    Raises:
        DiffussmError: if the images cannot be read or the file cannot be written.
    """
    check_output(target, "target", [".npz"], reads=[images])
    world = read_world()
    session = EvaluationSession(extractor, extractor_weights, device, batch_size, cache, world)

    with process_group(world):
        opened = session.open(str(images), resolution, "images")
        if len(opened) < TABLE["fid"].least:
            raise DataError(
                f"images: {opened.name} holds one image, but statistics need at least two"
            )
        gathered = yield from session.features(opened, "image")

    # Only the first process writes.
    if world.rank:
        return None
    yield Stage("writing")
    kept = write_reference(target, opened, gathered, session.extractor, count, seed)
    yield from map(Warned, doubts(session.requested, session.name, str(images)))

    height, width = opened.size
    yield Message(
        f"statistics of {len(opened):,} images of {height}x{width}, {kept:,} of them kept"
    )
    return target


# -------------------------------------------------------------------------------------------- files
def find_run_at(samples: str | Path, ema: float | None = None) -> runs.TrainedRun | None:
    """The trained run at a path, as in `find_run`, or None if there is no run and the path should
    hold images.
    """
    path = Path(samples)
    known = any(
        os.path.exists(path / name) for name in (runs.CONFIG, runs.EMA, runs.MODEL)
    ) or runs.is_elsewhere(path)
    return runs.find_run(path, ema) if known or path.suffix == dit_checkpoint.SUFFIX else None


def read_facts(samples: str | Path) -> dict[str, Any]:
    """The meta.json beside samples, checked; empty if there is none. Raises RunError."""
    path = Path(samples)
    folder = path.parent if path.suffix == ".npz" else path
    return read_meta(folder) if (folder / META).is_file() else {}


def requested_prompts(facts: Mapping[str, Any], n: int) -> list[str]:
    """The prompt of each of n samples by their facts; empty if there are none, or not for this
    number of images.
    """
    prompts = facts.get("prompts")
    if (
        not isinstance(prompts, list)
        or not all(isinstance(p, str) for p in prompts)
        or facts.get("num") != n
    ):
        return []
    return list(itertools.islice(itertools.cycle(prompts), n))


def results_path(samples: Path) -> Path:
    """The default file for a result: beside the samples."""
    if samples.is_dir():
        return samples / runs.RESULTS
    return samples.with_suffix(f".{runs.RESULTS}") if samples.exists() else Path(runs.RESULTS)


def _save(result: dict[str, Any], out: Path | None, usual: Path) -> Iterator[Event]:
    """Write a result to `out`, or else to `usual`, where a failure is only a warning. Raises
    UnsavedResult.
    """
    try:
        usual.parent.mkdir(parents=True, exist_ok=True)  # of a model that has no run folder here
        write_text(out or usual, json.dumps(result, indent=1) + "\n")
    except OSError as e:
        if out is not None:
            raise UnsavedResult(f"out: cannot write {str(out)!r}: {reason(e)}", result) from e
        yield Warned(
            f"the result cannot be saved in {str(usual)!r}: {reason(e)}; name another file with out"
        )


def _renew_report(root: Path) -> Iterator[Event]:
    """Write the report of a run folder again, if there is one; a failure is a warning."""
    if not (root / runs.LOG).is_file():
        return
    try:
        write_report(root)
    except (OSError, RunError) as e:
        yield Warned(f"{root / runs.REPORT} cannot be written: {reason(e)}")
