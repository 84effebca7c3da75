"""The weights that training begins with, if they are those of another model (`train.init`)."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffussm_cli.config import Config
from diffussm_cli.errors import RunError
from diffussm_cli.model import build_model
from diffussm_cli.runs.trained import TrainedRun, find_run, load_model, named_by

SHOWN = 4  # kinds of tensors that a line names


@dataclass(frozen=True)
class InitialWeights:
    """What a new model takes from another one.

    Attributes:
        source: the other model.
        tensors: what is taken, by name.
        anew: the tensors of the new model that are not taken, with their shapes.
        unused: those of the other model that have no place in the new one, with their shapes.
    """

    source: TrainedRun
    tensors: Mapping[str, Tensor]
    anew: Mapping[str, tuple[int, ...]]
    unused: Mapping[str, tuple[int, ...]]

    @property
    def line(self) -> str:
        """What is taken, what starts anew and what is not used."""
        total = len(self.tensors) + len(self.anew)
        line = f"train.init: {len(self.tensors)} of {total} tensors are those of {self._label}"
        if self.anew:
            line += f"; {len(self.anew)} start anew: {_listed(map(self._described, self.anew))}"

        only_there = [name for name in self.unused if name not in self.anew]
        if only_there:
            line += f"; {len(only_there)} of the other model are not used: {_listed(only_there)}"
        return line

    @property
    def facts(self) -> dict[str, Any]:
        """The same for the log."""
        return {
            "model": self._label,
            "sha256": self.source.weights_sha256,
            "taken": len(self.tensors),
            "anew": list(self.anew),
            "unused": list(self.unused),
        }

    @property
    def _label(self) -> str:
        source = self.source
        if not source.assumption:
            return source.label
        kind = "SiT, because diffusion.objective is flow" if source.is_sit else "DiT"
        return f"{source.weights}, read as a {kind}"

    def _described(self, name: str) -> str:
        shapes = f"{self.anew[name]}, there {self.unused[name]}" if name in self.unused else ""
        return f"{name} {shapes}".strip()


def initial_weights(config: Config) -> InitialWeights:
    """The weights of `train.init` that fit the model of a configuration: those of the same name and
    shape, from the averaged weights of the other model.

    Tables of positions are computed from the size of the images, so they fit any. A .pt file does
    not tell whether it is a DiT or a SiT; it is read as the one that predicts what this run does.

    Raises:
        RunError: if there is no such model, if it is damaged, or if nothing of it fits; for a model
            of the mean velocity if it is no flow that predicts its velocity, or another
            network.
    """
    name = config.train.init
    with named_by("train.init", name):
        source = find_run(Path(name))
        if source.assumption and config.diffusion.objective == "flow":
            source = find_run(Path(name), objective="flow")
        theirs = load_model(source).state_dict()
    with torch.device("meta"):
        ours = build_model(config).state_dict()

    taken = {k: theirs[k] for k in ours if k in theirs and theirs[k].shape == ours[k].shape}
    if source.is_sit:  # it knows times from 0 to 1, and ours are timesteps
        taken = {k: tensor for k, tensor in taken.items() if not k.startswith("t_embed.")}
    if not any(tensor.ndim > 1 for tensor in taken.values()):  # a bias may fit by chance
        other = source.config.model
        raise RunError(
            f"train.init: no matrix of {name!r} fits this model, and {len(taken)} of "
            f"{len(ours)} tensors in all; take its model.backbone, {other.backbone}, and its "
            f"model.hidden_size, {other.hidden_size}, or leave train.init empty"
        )

    anew = {k: tuple(v.shape) for k, v in ours.items() if k not in taken}
    if config.diffusion.in_one_step:
        _check_teacher(source, config)
    unused = {k: tuple(v.shape) for k, v in theirs.items() if k not in taken}
    return InitialWeights(source, taken, anew, unused)


def _check_teacher(source: TrainedRun, config: Config) -> None:
    """Raises RunError for a model that cannot be the teacher of one of the mean velocity."""
    d = source.config.diffusion
    if (d.objective, d.predicts) != ("flow", "velocity"):
        predicts = d.objective if d.objective != "flow" else f"the {d.predicts} of a flow"
        raise RunError(
            f"train.init: {source.label} predicts {predicts}; diffusion.predicts=mean_velocity "
            "needs a model with diffusion.objective=flow that predicts its velocity"
        )

    # The whole network, with what no shape of a weight tells.
    names = [("model", f.name) for f in dataclasses.fields(config.model) if f.name != "label_std"]
    for section, name in [*names, ("diffusion", "timesteps")]:
        ours, theirs = (getattr(getattr(c, section), name) for c in (config, source.config))
        if ours != theirs:
            raise RunError(
                f"train.init: {section}.{name} of {source.label} is {theirs!r:.80}, and this run "
                f"has {ours!r:.80}; a model of the mean velocity has the network of its teacher"
            )


def _listed(names: Iterable[str]) -> str:
    """Names with numbers of blocks left out, each kind once, and a count of the rest."""
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    shown = [f"{kind} ({n} times)" if n > 1 else kind for kind, n in kinds.items()][:SHOWN]
    rest = sum(list(kinds.values())[SHOWN:])
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
