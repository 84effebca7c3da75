"""What lies beside samples: what their meta.json says of them, and the result of a measurement."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli import runs
from diffussm_cli.data.samples import META
from diffussm_cli.errors import ConfigError, RunError, reason
from diffussm_cli.events import Event, Warned
from diffussm_cli.machine.files import check_output, read_regular, write_text
from diffussm_cli.runs import dit_checkpoint
from diffussm_cli.runs.report import write_report
from diffussm_cli.sampling.request import read_meta

MAX_RESULT_BYTES = 1 << 26
OF_RESULT = {"metrics", "num", "meta"}  # keys of a result of any version
FOREIGN = "exists and is no result of eval"


class UnsavedResult(RunError):
    """The file for a result cannot be written; `result` holds what took long to compute."""

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


def find_run_at(
    samples: str | Path,
    ema: float | None = None,
    objective: str | None = None,
    ema_width: float | None = None,
) -> runs.TrainedRun | None:
    """The trained run at a path, as in `find_run`, or None if there is no run and the path should
    hold images.
    """
    path = Path(samples)
    known = any(
        os.path.exists(path / name) for name in (runs.CONFIG, runs.EMA, runs.MODEL)
    ) or runs.is_elsewhere(path)
    known |= path.suffix == dit_checkpoint.SUFFIX
    return runs.find_run(path, ema, objective, ema_width) if known else None


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


def doubtful_facts(facts: Mapping[str, Any], images: int) -> list[str]:
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


def results_path(samples: Path) -> Path:
    """The default file for a result: beside the samples."""
    if samples.is_dir():
        return samples / runs.RESULTS
    return samples.with_suffix(f".{runs.RESULTS}") if samples.exists() else Path(runs.RESULTS)


def check_result(out: Path, reads: Sequence[str | Path | None]) -> None:
    """Check the file for a result: it ends in .json, and replaces nothing but an earlier result.

    Raises ConfigError.
    """
    earlier = [out.name] if out.name.endswith(runs.RESULTS) else []
    check_output(out, "out", [".json"], reads=reads, replaces=earlier)
    if is_foreign(out):
        raise ConfigError(f"out: {str(out)!r} {FOREIGN}; name another file")


def is_foreign(path: Path) -> bool:
    """Whether a file is there that holds no result of a measurement."""
    if not os.path.lexists(path):
        return False
    try:
        values = json.loads(read_regular(path, MAX_RESULT_BYTES))
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(values, dict) or not values.keys() >= OF_RESULT


def save_result(result: dict[str, Any], out: Path | None, usual: Path) -> Iterator[Event]:
    """Write a result to `out`, or else to `usual`, where a failure is only a warning. Raises
    UnsavedResult.
    """
    if out is None and is_foreign(usual):
        yield Warned(
            f"the result is not saved: {str(usual)!r} {FOREIGN}; name another file with out"
        )
        return

    try:
        usual.parent.mkdir(parents=True, exist_ok=True)  # of a model that has no run folder here
        write_text(out or usual, json.dumps(result, indent=1) + "\n")
    except OSError as e:
        if out is not None:
            raise UnsavedResult(f"out: cannot write {str(out)!r}: {reason(e)}", result) from e
        yield Warned(
            f"the result cannot be saved in {str(usual)!r}: {reason(e)}; name another file with out"
        )


def renew_report(root: Path) -> Iterator[Event]:
    """Write the report of a run folder again, if there is one; a failure is a warning."""
    if not (root / runs.LOG).is_file():
        return
    try:
        write_report(root)
    except (OSError, RunError) as e:
        yield Warned(f"{root / runs.REPORT} cannot be written: {reason(e)}")
