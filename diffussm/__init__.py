"""DiffuSSM: image diffusion on state space layers, without attention (arXiv 2311.18257).

    import diffussm as ds

    run = ds.load("mnist")
    ds.grid(run.sample(40, classes=range(10)))

Everything here is imported when it is first used, so that `import diffussm` takes no time. The code
is in `diffussm_cli`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffussm_cli import __version__

if TYPE_CHECKING:
    from diffussm_cli.config import Config as Config
    from diffussm_cli.diffusion.flow import ImageFlow as ImageFlow
    from diffussm_cli.diffusion.flow import LinearFlow as LinearFlow
    from diffussm_cli.diffusion.process import GaussianDiffusion as GaussianDiffusion
    from diffussm_cli.diffusion.process import VelocityDiffusion as VelocityDiffusion
    from diffussm_cli.errors import DiffussmError as DiffussmError
    from diffussm_cli.library.configs import load_config as load_config
    from diffussm_cli.library.functions import cost as cost
    from diffussm_cli.library.functions import encode as encode
    from diffussm_cli.library.functions import evaluate as evaluate
    from diffussm_cli.library.functions import sample as sample
    from diffussm_cli.library.functions import train as train
    from diffussm_cli.library.run import Run as Run
    from diffussm_cli.library.run import grid as grid
    from diffussm_cli.library.run import load as load
    from diffussm_cli.model import DiffuSSM as DiffuSSM
    from diffussm_cli.model import DiT as DiT
    from diffussm_cli.model.s4d import S4D as S4D
    from diffussm_cli.profiling.flops import Cost as Cost
    from diffussm_cli.training.ema import EMA as EMA
    from diffussm_cli.training.optimizer import make_optimizer as make_optimizer
    from diffussm_cli.training.optimizer import parameter_groups as parameter_groups

PLACES = {
    "diffussm_cli.config": ("Config",),
    "diffussm_cli.diffusion.flow": ("ImageFlow", "LinearFlow"),
    "diffussm_cli.diffusion.process": ("GaussianDiffusion", "VelocityDiffusion"),
    "diffussm_cli.errors": ("DiffussmError",),
    "diffussm_cli.library.configs": ("load_config",),
    "diffussm_cli.library.functions": ("cost", "encode", "evaluate", "sample", "train"),
    "diffussm_cli.library.run": ("Run", "grid", "load"),
    "diffussm_cli.model": ("DiT", "DiffuSSM"),
    "diffussm_cli.model.s4d": ("S4D",),
    "diffussm_cli.profiling.flops": ("Cost",),
    "diffussm_cli.training.ema": ("EMA",),
    "diffussm_cli.training.optimizer": ("make_optimizer", "parameter_groups"),
}
MODULES = {name: module for module, names in PLACES.items() for name in names}
__all__ = ["__version__", *sorted(MODULES)]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in MODULES:
        raise AttributeError(f"module 'diffussm' has no attribute {name!r}")
    value = getattr(import_module(MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
