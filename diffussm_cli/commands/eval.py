"""`diffussm eval`."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from diffussm_cli.commands import options
from diffussm_cli.commands.options import bar, make_console, parse_classes, sampling_request, warn
from diffussm_cli.errors import ConfigError, DataError, RunError, reason
from diffussm_cli.files import PARTIAL

AUTO = "auto"
META_SHOWN = (
    "run",
    "step",
    "sampler",
    "steps",
    "guidance",
    "guidance_channels",
    "guidance_interval",
    "num",
    "first_seed",
)


def evaluate(
    samples: Annotated[
        str | None,
        typer.Argument(metavar="SAMPLES", help="A folder of PNG, an .npz (arr_0, uint8 NHWC), or a run to draw from."),
    ] = None,
    target: Annotated[Path | None, typer.Argument(metavar="[REF.npz]", help="What --make-ref writes.")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="REF", help="ADM's or our .npz, or images. Default: that of the run.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="fid, sfid, is, precision, recall, kid, fid_infinity, or all.")
    ] = "fid,sfid,is,precision,recall,kid",
    extractor: Annotated[
        str,
        typer.Option(
            help="inception, digits, a file of torch.export or TorchScript, or module:factory. Default: by size."
        ),
    ] = AUTO,
    extractor_weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of inception, in place of a download.")
    ] = None,
    adm_half: Annotated[
        bool, typer.Option("--adm-half", help="Precision and recall in float16, as ADM's evaluator has them.")
    ] = False,
    resolution: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="Crop reference images to it, as ADM does.")
    ] = None,
    num: Annotated[
        int, typer.Option("--num", "-n", min=2, max=options.MAX_IMAGES, help="Of a run: how many images to draw.")
    ] = 50_000,
    classes: options.Classes = None,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    sampler: options.SamplerName = None,
    guidance: options.Guidance = None,
    guidance_channels: options.GuidanceChannels = None,
    guidance_interval: options.GuidanceInterval = None,
    precision: options.Precision = "auto",
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
    cache: Annotated[
        Path | None, typer.Option(help="Where features are kept. Default: ~/.cache/diffussm.", envvar="DIFFUSSM_CACHE")
    ] = None,
    keep: Annotated[bool, typer.Option("--cache-features/--no-cache", help="Keep features for the next time.")] = True,
    make_ref: Annotated[
        bool, typer.Option("--make-ref", help="Make the reference file REF.npz of the images in SAMPLES, and stop.")
    ] = False,
    ref_images: Annotated[int, typer.Option(min=1, help="Images that --make-ref keeps, for recall.")] = 10_000,
    ref_info: Annotated[
        Path | None, typer.Option("--ref-info", metavar="FILE", help="Say what a reference holds, and stop.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the result goes. Default: results.json at the samples.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure samples against a reference: FID, sFID, Inception Score, precision, recall, KID, by ADM's protocol."""
    if ref_info is not None:
        show_reference(ref_info)
        return
    if samples is None:
        raise ConfigError("eval: name SAMPLES, as: diffussm eval images/ --reference REF.npz")
    if (target is not None) != make_ref:
        raise ConfigError("eval: --make-ref IMAGES REF.npz takes two names, the evaluation one")
    from diffussm_cli.distributed import meeting, read_share
    from diffussm_cli.evaluation.evaluate import parse_metrics
    from diffussm_cli.evaluation.reference import reference_of

    chosen, size = parse_metrics(metrics), parse_size(resolution)
    for path in (target, out):
        if path is not None:
            check_writable(path)
    share = read_share()
    bench = Bench(extractor, extractor_weights, batch_size, device, share)
    if keep:
        bench.cache = cache or default_cache()
        if bench.cache is None:
            warn(bench.console, "features are not kept: there is no home folder; --cache FOLDER keeps them")
    with meeting(share):
        if make_ref:
            make_reference(bench, samples, target, size, ref_images, seed)
            return
        trained = find_trained_at(samples)
        if trained is None:
            images, facts = bench.open(samples, None), read_facts(samples)
        else:
            how = sampling_request(trained.config, sampler, steps, guidance, guidance_channels, guidance_interval)
            labels = parse_classes(classes, trained.config)
            images, facts = bench.draw(trained, how, labels, range(seed, seed + num), precision)
            reference = reference or reference_of(trained.config)
        if reference is None:
            raise ConfigError("--reference: name an .npz of ADM, one of --make-ref, or a folder of real images")
        result = compare(bench, images, reference, size, chosen, adm_half, facts)
    if share.rank == 0:
        result |= {"samples": samples}
        show(bench.console, result, as_json)
        write(bench.console, result, out, results_path(samples))


class Bench:
    """Extractor, cache and console of one evaluation; the extractor is chosen when the images are known."""

    cache: Path | None = None  # where features are kept

    def __init__(self, name: str, weights: Path | None, batch_size: int, device: str, share):
        from diffussm_cli.device import keep_freed_memory, pick_device

        keep_freed_memory()
        self.name, self.weights, self.batch_size, self.share = name, weights, batch_size, share
        self.device, self.console = pick_device(device), make_console(quiet=share.rank > 0)
        self.asked = name
        self._extractor = None

    @property
    def extractor(self):
        """Loaded at first use."""
        from diffussm_cli.evaluation.features import load_extractor

        if self._extractor is None:
            with self.console.status("loading the extractor"):
                self._extractor = load_extractor(self.name, self.weights, self.device)
        return self._extractor

    def open(self, path: str, size: tuple[int, int] | None, option: str = "SAMPLES"):
        """An image set as the extractor sees it. Raises DiffussmError."""
        from diffussm_cli.evaluation.features import usual_extractor
        from diffussm_cli.evaluation.sets import open_images, probe

        if self.name == AUTO:
            found, grey = probe(path, option)
            self.name = usual_extractor(size or found, grey)
        return open_images(path, self.extractor.channels, size, option)

    def draw(self, trained, how, classes, seeds: range, precision: str):
        """The images of a run as a set, drawn when they are read; and what decides them."""
        from diffussm_cli.evaluation.drawn import Drawn
        from diffussm_cli.evaluation.features import usual_extractor
        from diffussm_cli.samples import Sampler

        with self.console.status("loading the run"):
            sampler = Sampler(trained, how, classes, self.batch_size, precision, str(self.device))
            facts = sampler.facts(seeds)
        if sampler.warning:
            raise DataError(f"eval: {sampler.warning}")
        data = trained.config.data
        if self.name == AUTO:
            self.name = usual_extractor(data.size, data.is_grey)
        return Drawn(sampler, seeds, self.extractor.channels, facts), facts

    def gather(self, images, what: str):
        """Features of a set, from the cache or under a bar; the finished Gathering."""
        from diffussm_cli.evaluation.gathering import Gathering

        extractor = self.extractor
        with self.console.status("looking for kept features"):
            work = Gathering(images, extractor, self.batch_size, self.cache, self.share)
        with bar(self.console, len(work.part), what) as advance:
            for n in work.run():
                advance(n)
        if work.warning:
            warn(self.console, work.warning)
        return work


def compare(bench: Bench, images, reference: str, size, metrics, half: bool, facts: dict[str, Any]) -> dict[str, Any]:
    """Every metric of a set against a reference, with warnings; `facts` are of its meta.json. Raises DiffussmError."""
    from diffussm_cli.evaluation.evaluate import evaluate, needs_images, warnings
    from diffussm_cli.evaluation.features import doubts
    from diffussm_cli.evaluation.reference import check_extractor, open_reference

    against = open_reference(reference, bench.extractor, size)
    if against.images is not None and needs_images(metrics, against):
        against.complete(bench.gather(against.images, "reference").result)
    gathered = bench.gather(images, "samples").result
    check_extractor(against, gathered.pool.shape[1], bench.extractor)
    if bench.share.rank:
        return {}
    found = {}
    with bench.console.status("metrics") as status:
        for name, value in evaluate(gathered, against, metrics, half):
            found[name] = value
            status.update(f"metrics: {', '.join(found)}")
        remarks = doubts(bench.asked, bench.name, reference) + warnings(images, gathered, against, metrics)
    if facts.get("decoded_by") == "linear preview":
        remarks.append("samples were drawn without their VAE: these are figures of previews")
    for remark in remarks:
        warn(bench.console, remark)
    counts = {"num": len(images), "reference_images": against.gathered and len(against.gathered.pool)}
    return {
        "metrics": found,
        **counts,
        "reference": reference,
        "extractor": bench.extractor.identity,
        "adm_half": half,
        "warnings": remarks,
        "meta": facts,
    }


def make_reference(bench: Bench, images: str, target: Path, size, count: int, seed: int) -> None:
    """Write a reference file. Raises DiffussmError."""
    from diffussm_cli.evaluation.features import doubts
    from diffussm_cli.evaluation.reference import write_reference

    if target.suffix != ".npz":
        raise ConfigError(f"--make-ref: {str(target)!r} must end in .npz")
    work = bench.gather(bench.open(images, size), "image")
    if bench.share.rank == 0:
        with bench.console.status("writing"):
            kept = write_reference(target, work, count, seed)
        n, height, width = len(work.images), *work.images.size
        for remark in doubts(bench.asked, bench.name, images):
            warn(bench.console, remark)
        bench.console.print(f"statistics of {n:,} images of {height}x{width}, {kept:,} of them kept")
        typer.echo(target)


def show_reference(path: Path) -> None:
    """What a reference file holds, as JSON on stdout. Raises DataError."""
    from diffussm_cli.evaluation.reference import describe

    typer.echo(json.dumps(describe(path), indent=1))


# ------------------------------------------------------------------------------------------------- parts
def find_trained_at(samples: str):
    """The trained run at a path, or None if it is no run (then it should be images)."""
    from diffussm_cli import published, runs

    path = Path(samples)
    known = any(os.path.exists(path / name) for name in (runs.CONFIG, runs.EMA, runs.MODEL))
    if known or path.suffix == published.SUFFIX:
        return runs.find_run(path)
    return None


def read_facts(samples: str) -> dict[str, Any]:
    """meta.json beside samples, shown with the result; empty if there is none."""
    from diffussm_cli.samples import META, read_meta

    path = Path(samples)
    folder = path.parent if path.suffix == ".npz" else path
    return read_meta(folder) if (folder / META).is_file() else {}


def results_path(samples: str) -> Path:
    """Beside the samples."""
    path = Path(samples)
    if path.is_dir():
        return path / "results.json"
    return path.with_suffix(".results.json") if path.exists() else Path("results.json")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`256` or `256x384`. Raises ConfigError."""
    from diffussm_cli.commands.encode import parse_resolution

    return None if text is None else parse_resolution(text)


def default_cache() -> Path | None:
    """Below the user's cache folder; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffussm"
    except RuntimeError:
        return None


def check_writable(path: Path) -> None:
    """Raises ConfigError if a file cannot be written, before hours of work go into it."""
    if not os.path.isdir(path.absolute().parent):
        raise ConfigError(f"eval: there is no folder {str(path.parent)!r} for {path.name}")
    if os.path.isdir(path):
        raise ConfigError(f"eval: cannot write {str(path)!r}: it is a folder")
    probe = path.with_name(f"{PARTIAL}{path.name}.{os.getpid()}")
    try:
        probe.touch()
        probe.unlink(missing_ok=True)  # perhaps by a process of another machine
    except OSError as e:
        raise ConfigError(f"eval: cannot write {str(path)!r}: {e.strerror}") from e


# ------------------------------------------------------------------------------------------------- showing
def write(console, result: dict[str, Any], out: Path | None, usual: Path) -> None:
    """The result as a file: where it was asked for, or in the usual place if that can be written.

    Raises:
        RunError: if it cannot be written where it was asked for.
    """
    from diffussm_cli.files import whole_file

    try:
        with whole_file(out or usual) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    except OSError as e:
        if out is not None:
            raise RunError(f"--out: cannot write {str(out)!r}: {reason(e)}") from e
        warn(console, f"the result cannot be kept in {str(usual)!r}: {reason(e)}; --out FILE names another place")


def show(console, result: dict[str, Any], as_json: bool) -> None:
    """One JSON object, or a table on stdout and how the samples were made on stderr."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps(result))
        return
    facts = {k: result["meta"][k] for k in META_SHOWN if result["meta"].get(k) is not None}
    if facts:
        console.print(", ".join(f"{k} {v}" for k, v in facts.items()))
    table = Table("metric", "value")
    found = dict(result["metrics"])
    error = found.pop("kid_error", None)
    for name, value in found.items():
        table.add_row(name, f"{value:.6g}" + (f" ± {error:.2g}" if name == "kid" else ""))
    stdout = Console(markup=False, emoji=False, highlight=False)
    stdout.print(f"{result['num']:,} samples against {result['reference']}", soft_wrap=True)
    stdout.print(table)
