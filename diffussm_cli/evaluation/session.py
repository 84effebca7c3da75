"""The sessions of `diffussm eval`: images against a reference, and the file of a reference."""

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli import runs
from diffussm_cli.config import BUILTIN, SampleConfig, unused_of_request
from diffussm_cli.data.samples import META
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation.comparison import TABLE, USUAL, parse_metrics, warnings
from diffussm_cli.evaluation.evaluator import Evaluator, Size, held_out_of_text
from diffussm_cli.evaluation.extractors import AUTO, NAMES, doubts
from diffussm_cli.evaluation.reference import check_present, check_replaced, write_reference
from diffussm_cli.evaluation.results import (
    check_result,
    doubtful_facts,
    find_run_at,
    read_facts,
    renew_report,
    requested_prompts,
    results_path,
    save_result,
)
from diffussm_cli.evaluation.sets import HELD_OUT, DrawnImages, ImageSet
from diffussm_cli.evaluation.text import names_in
from diffussm_cli.events import Event, Message, Stage, Warned
from diffussm_cli.machine.files import check_output
from diffussm_cli.machine.processes import process_group, read_world
from diffussm_cli.sampling.request import prompts_of, sample_facts
from diffussm_cli.sampling.sampler import Sampler, open_sampler


def evaluate(
    samples: str | Path,
    reference: str | None = None,
    metrics: str | Sequence[str] = USUAL,
    *,
    extractor: str = AUTO,
    extractor_weights: Path | str | None = None,
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
    cache: Path | str | None = None,
    out: Path | str | None = None,
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
    out = None if out is None else Path(out)
    if out is not None:
        check_result(out, [samples, reference])

    # What the samples say of themselves: a run by its configuration, other images by the meta.json
    # beside them.
    world = read_world()
    trained = run or find_run_at(samples)
    facts = {} if trained else read_facts(samples)
    usual_extractor = trained.config.eval.extractor if trained else facts.get("extractor")
    if extractor == AUTO and usual_extractor in NAMES:  # never code that a run names
        extractor = usual_extractor
    evaluator = Evaluator(extractor, extractor_weights, device, batch_size, cache, world)

    # What is not there, before the extractor is loaded, which may be downloaded first.
    is_usual = not reference if trained else reference is None
    if trained and is_usual and (path := held_out_of_text(trained.config)):
        check_present(path, "data.held_out")
    if not trained:
        check_present(str(samples), "samples")

    # The reference by name.
    if is_usual:
        reference = trained.config.reference if trained else facts.get("reference") or None
    if reference is None:
        raise ConfigError(
            "reference: name a reference file, such as one of ADM's, or a folder of real images, "
            "as in: diffussm eval images/ --reference church/"
        )
    reference = str(reference)
    check_present(reference)
    if is_usual and not trained:
        yield Message(f"reference: {reference}, as {META} says")

    with process_group(world):
        # The reference, and the real images with captions among which drawn ones are looked for.
        images = None if trained else evaluator.open(str(samples))
        captioned: ImageSet | None = None
        size_of_run: Size | None = None
        if trained:
            evaluator.choose(trained.config.data.size, trained.config.data.is_grey)
            captioned = evaluator.held_out(trained.config) if is_usual else None
            size_of_run = trained.config.data.size
        elif is_usual:
            assert images is not None, "opened above"
            size_of_run = images.size
            if facts.get("prompts") and reference.startswith(BUILTIN):
                captioned = evaluator.open(f"{reference}{HELD_OUT}")
        against = evaluator.reference(reference, resolution, size_of_run)
        captioned = captioned or against.images

        # The samples, if a run draws them.
        if trained:
            if trained.assumption:
                yield Message(trained.assumption)
            request = sampling or trained.config.sample, num, classes, prompts
            if line := unused_of_request(trained.config, *request):
                yield Warned(line)

            yield Stage("loading the run")
            if not prompts and trained.config.model.text_width and captioned:
                prompts = names_in(captioned.captions)
            seeds = range(seed, seed + num)
            sampler = open_sampler(trained, sampling, batch_size, precision, device)
            facts = sample_facts(trained, sampler, seeds, classes, prompts, negative)
            images = drawn_images(evaluator, trained, sampler, seeds, facts)
        assert images is not None, "opened or drawn"

        # The comparison.
        values, features = yield from evaluator.compare(images, against, metrics)
        if requested := requested_prompts(facts, len(images)):
            values |= yield from evaluator.prompted(features, requested, captioned)
    if world.rank:
        return None

    # The result, with what makes it incomparable.
    remarks = doubts(evaluator.requested, evaluator.name, reference) + warnings(
        images, features, against, metrics
    )
    remarks += doubtful_facts(facts, len(images))
    yield from map(Warned, remarks)
    result = {
        "metrics": values,
        "num": len(images),
        "reference_images": against.gathered and len(against.gathered.pool),
        "reference": reference,
        "extractor": evaluator.extractor.identity,
        "warnings": remarks,
        "meta": dict(facts),
        "samples": str(samples),
    }
    usual = (
        trained.root / runs.RESULTS
        if trained and runs.is_elsewhere(samples)
        else results_path(Path(samples))
    )
    yield from save_result(result, out, usual)
    root = trained.root if trained else usual.absolute().parent.parent  # images of a run lie in it
    yield from renew_report(root)
    return result


def drawn_images(
    evaluator: Evaluator,
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
        sampler,
        seeds,
        facts["labels"],
        evaluator.extractor.channels,
        str(trained.root),
        facts,
        text,
    )


def make_reference(
    images: str | Path,
    target: Path,
    *,
    extractor: str = AUTO,
    extractor_weights: Path | str | None = None,
    resolution: Size | None = None,
    count: int = 10_000,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    cache: Path | str | None = None,
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
    check_replaced(target)
    world = read_world()
    evaluator = Evaluator(extractor, extractor_weights, device, batch_size, cache, world)

    with process_group(world):
        opened = evaluator.open(str(images), resolution, "images")
        if len(opened) < TABLE["fid"].least:
            raise DataError(
                f"images: {opened.name} holds one image, but statistics need at least two"
            )
        gathered = yield from evaluator.features(opened, "image")

    # Only the first process writes.
    if world.rank:
        return None
    yield Stage("writing")
    kept = write_reference(target, opened, gathered, evaluator.extractor, count, seed)
    yield from map(Warned, doubts(evaluator.requested, evaluator.name, str(images)))

    height, width = opened.size
    yield Message(
        f"statistics of {len(opened):,} images of {height}x{width}, {kept:,} of them kept"
    )
    return target
