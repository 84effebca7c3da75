"""What a run that continues may change of its configuration."""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from diffussm_cli import runs
from diffussm_cli.config import Config, to_dict
from diffussm_cli.data.vae_facts import full_name
from diffussm_cli.errors import ConfigError
from diffussm_cli.events import Event, Message
from diffussm_cli.machine.processes import World, first_works
from diffussm_cli.training.measure import difference_of_best


def compare_config(
    config: Config, root: Path, checkpoint: Path | None, world: World, facts: Mapping[str, Any]
) -> Generator[Event, None, None]:
    """Tell what a resume changes. Raises ConfigError, RunError, in all processes."""
    with first_works(world):
        if checkpoint is None or world.rank:
            return
        runs.read_metrics(root / runs.BEST)  # report damage now, not at the next evaluation
        if not (root / runs.CONFIG).exists():
            yield Message(
                f"{root / runs.CONFIG} was missing; it will be written again from this command line"
            )
            return

        before = runs.read_data(root)
        moved = before is not None and bool(facts["sha256"]) and before["sha256"] == facts["sha256"]
        changes = check_unchanged(runs.read_config(root, "--resume"), config, moved)
        yield from (Message(f"changed: {change}") for change in changes)
        if config.eval.every and (difference := difference_of_best(root, config)):
            yield Message(
                f"the FID of {root / runs.BEST} cannot be compared with new ones: {difference}; "
                "the next evaluation replaces it"
            )


def refuse_other_data(root: Path | None, config: Config) -> None:
    """Raises ConfigError if a run that continues in `root` has read data at another place, to which
    its configuration fits.
    """
    if root is None or not runs.list_checkpoints(root) or not (root / runs.CONFIG).exists():
        return
    saved = runs.read_config(root, "--resume")
    if saved.data.path != config.data.path:
        check_unchanged(saved, config, moved=False)


def check_unchanged(saved: Config, config: Config, moved: bool = False) -> list[str]:
    """Check that resuming does not change the nature of the run.

    Args:
        moved: whether `data.path` may differ, because the same images are there.

    Returns:
        The harmless changes, one per line.

    Raises:
        ConfigError: naming the first difference in model, data, diffusion, batch, seed,
            optimizer or initial weights.
    """
    old, new = to_dict(saved), to_dict(config)
    for values in (old["data"], new["data"]):
        values["vae"] = values["vae"] and full_name(values["vae"])
    # not known to earlier versions
    old["data"]["vae_sha256"] = old["data"]["vae_sha256"] or new["data"]["vae_sha256"]

    # What makes it another run.
    harmless = [("data", "skip_unreadable"), *([("data", "path")] if moved else [])]
    fixed = [
        (s, f) for s in ("model", "data", "diffusion") for f in new[s] if (s, f) not in harmless
    ]
    fixed += [("train", name) for name in ("batch_size", "seed", "optimizer", "init")]
    for section, name in fixed:
        was, now = old[section][name], new[section][name]
        if was != now:
            options = {"path": "--data", "init": "--init"}.get(name, "--preset and --set")
            raise ConfigError(
                f"--resume: {section}.{name} was {was!r} and is now {now!r}; "
                f"omit {options} to keep the run's own values, "
                "or choose another --out to begin a new run"
            )
    if config.train.snapshot_every and not saved.train.snapshot_every:
        raise ConfigError(
            f"--resume: train.snapshot_every was 0 and is now {config.train.snapshot_every}; its "
            "averages are of all steps, so choose another --out to begin a new run"
        )

    # What may change.
    free = [*harmless, *((s, f) for s in ("train", "sample", "eval") for f in new[s])]
    values = [(s, f, old[s][f], new[s][f]) for s, f in free]
    changes = [f"{s}.{f} was {was!r} and is now {now!r}" for s, f, was, now in values if was != now]
    added = [decay for decay in config.train.ema if decay not in saved.train.ema]
    return changes + [
        f"the average of {decay} begins as a copy of that of {saved.train.ema[0]}"
        for decay in added
    ]
