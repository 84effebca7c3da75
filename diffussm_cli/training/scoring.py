"""The averaged weights measured while they are trained, and the best of them kept."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffussm_cli import runs
from diffussm_cli.config import Config
from diffussm_cli.data.images import to_uint8
from diffussm_cli.data.vae import Decoding
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.distributed import ALONE, Share
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation.evaluate import USUAL, evaluate
from diffussm_cli.evaluation.features import AUTO, doubts, load_extractor, usual_extractor
from diffussm_cli.evaluation.gathering import Gathering
from diffussm_cli.evaluation.reference import check_extractor, open_reference, reference_of
from diffussm_cli.generation import generate, labels_of

BATCH = 64


class Scoring:
    """Extractor and reference of `config.eval`, ready; `warnings` are for the user.

    Raises:
        DiffussmError: where there is none.
    """

    def __init__(self, config: Config, root: Path, process: GaussianDiffusion, decoding: Decoding, dtype: torch.dtype):
        if decoding.warning:
            raise DataError(f"eval.every: {decoding.warning}")
        path, data = reference_of(config), config.data
        if path is None:
            raise ConfigError("eval.every: needs eval.reference, an .npz or a folder of real images")
        self.config, self.root, self.process, self.decoding, self.dtype = config, root, process, decoding, dtype
        name = usual_extractor(data.size, data.is_grey) if config.eval.extractor == AUTO else config.eval.extractor
        self.extractor = load_extractor(name, None, process.signal.device)
        self.warnings = doubts(config.eval.extractor, name, path)
        self.reference = open_reference(path, self.extractor, data.size if not path.endswith(".npz") else None)
        self.metrics = [m for m in USUAL if self.reference.images or m in ("fid", "sfid", "is")]

    def score(self, model: nn.Module, step: int, share: Share = ALONE) -> dict[str, float]:
        """Metrics of a model in eval mode by name, `eval/fid` and so on; the best by FID goes to RUN/best.

        Raises:
            DataError, ConfigError: if reference and extractor do not fit; RunError if the disk is full.
        """
        if self.reference.needs:
            self.reference.complete(self._gather(self.reference.images, share))
        found = self._gather(_Averaged(self, model), share)
        check_extractor(self.reference, found.pool.shape[1], self.extractor)
        if share.rank:
            return {}
        metrics = [m for m in self.metrics if m != "is" or found.classes is not None]
        metrics = [m for m in metrics if m != "sfid" or (found.spatial is not None and self.reference.spatial)]
        values = {f"eval/{name}": value for name, value in evaluate(found, self.reference, metrics)}
        best = self.root / runs.BEST
        if values["eval/fid"] < runs.read_metrics(best).get("eval/fid", float("inf")):
            runs.write_weights(best, self.config, model.state_dict(), step, {"step": step, **values})
        return values

    def _gather(self, images, share: Share):
        work = Gathering(images, self.extractor, BATCH, share=share)
        for _ in work.run():
            pass
        return work.result


class _Averaged:
    """An ImageSet that a model draws when it is read, seeds 0, 1, ..."""

    lossy = False

    def __init__(self, scoring: Scoring, model: nn.Module):
        config = scoring.config
        self.scoring, self.model, self.seeds = scoring, model, range(config.eval.images)
        self.name, self.size = "averaged weights", config.data.size
        classes = config.model.num_classes
        self.labels = labels_of(self.seeds, classes) if classes else None
        self.how = dataclasses.replace(config.sample, steps=min(config.sample.steps, config.eval.steps))

    def __len__(self) -> int:
        return len(self.seeds)

    def read(self, places: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        s, labels = self.scoring, self.labels and [self.labels[i] for i in places]
        for drawn in generate(self.model, s.process, self.how, places, labels, batch_size, s.dtype):
            images = to_uint8(s.decoding.decode(drawn.images))
            yield images.expand(-1, s.extractor.channels, -1, -1)
