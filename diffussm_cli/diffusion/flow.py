"""The flow of SiT, and what else a model of its lines may predict: the image, or the mean velocity.

B batch   C channels   T timesteps   t (B,) timesteps

SiT: arXiv 2401.08740, section 2. Predicting the image: JiT, arXiv 2511.13720. Mean velocity:
MeanFlow, arXiv 2505.13447; its shrinking intervals: AlphaFlow, arXiv 2510.20771.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffussm_cli.config import DiffusionConfig
from diffussm_cli.diffusion.process import Objective

LEAST_SHARE = 0.1  # of the way to the image that the teacher walks
LARGE_ERROR = 0.01  # mean squares above which errors count by their root


class LinearFlow(Objective):
    """Straight lines from image to noise. The model's timestep embedding sees t, so T is 1000 as in
    ADM.

    Raises:
        ValueError: if T is less than 1.
    """

    name, continuous = "flow", True

    def __init__(self, T: int = 1000, device: torch.device | str = "cpu"):
        if T < 1:
            raise ValueError(f"T: {T} must be at least 1")
        self.T, self.device = T, torch.device(device)
        self.schedule = {
            "num_train_timesteps": T,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }

    @classmethod
    def from_config(
        cls, config: DiffusionConfig, device: torch.device | str = "cpu"
    ) -> "LinearFlow":
        return cls(config.timesteps, device)

    def factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s = (t.to(like.dtype) / self.T).view(-1, *[1] * (like.ndim - 1))
        return 1 - s, s, torch.ones_like(s), s

    def velocity(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        return noise - x_0

    def time(self, t: float) -> float:
        return t / self.T

    def timesteps(self, steps: int) -> list[float]:
        """`steps` times, evenly spaced from T down to T/steps."""
        self.check_steps(steps)
        return [self.T * (1 - i / steps) for i in range(steps)]


class ImageFlow(LinearFlow):
    """The same lines, and a model that predicts the image; the loss is the MSE of the velocity that
    it implies.

    That velocity is (x_t - x_0) / s, so the weight of the image's MSE is 1 / s^2. Below s = 0.05
    the weight is that of 0.05, as in JiT: it would grow without bound.
    """

    least_noise = 0.05

    def __init__(self, T: int = 1000, device: torch.device | str = "cpu"):
        super().__init__(T, device)
        self.schedule = self.schedule | {"prediction_type": "sample"}

    def factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, s, one, _ = super().factors(t, like)
        return a, s, torch.zeros_like(one), -one

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        return x_0

    def loss_weight(self, t: Tensor) -> Tensor:
        return (t.float() / self.T).clamp(min=self.least_noise) ** -2


class MeanFlow(LinearFlow):
    """The same lines, and a model u(x_t, t) of the mean velocity on the path from x_t to its image:
    x_0 = x_t - s u. So one step of Euler draws, and no other number of steps does.

    It is learned from a flow, the teacher, whose paths it takes the ends of.
    """

    def check_steps(self, steps: int) -> None:
        """Raises ValueError for more steps than one."""
        if steps != 1:
            raise ValueError(f"steps must be 1 for a model that draws in one step, got {steps!r}")

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        """Raises TypeError: no single image and noise tell the end of a path; see `losses`."""
        raise TypeError("the mean velocity is learned from a teacher: use MeanFlow.losses")

    def losses(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        teacher: Callable[[Tensor, Tensor], Tensor],
        x_t: Tensor,
        t: Tensor,
        progress: float,
    ) -> dict[str, Tensor]:
        """The losses of each image, (B,): `mse` to the target, and `loss`, whose gradient is
        that of the MSE, divided by its root where it is large.

        The target goes the first share of the way to the image along the teacher's velocity v, and
        the rest as the model itself says, at x_t' = x_t - share s v:

            share v + (1 - share) u(x_t', (1 - share) t)

        At the beginning of training the teacher goes all the way, which is one Euler step of it;
        the share falls to LEAST_SHARE in the first half.

        Args:
            model, teacher: (x_t, t) -> mean velocity, and velocity, (B, C, H, W).
            progress: the share of training that is done, in 0..1.
        """
        share = max(LEAST_SHARE, LEAST_SHARE ** (2 * progress))
        with torch.no_grad():
            v = teacher(x_t, t)
            _, s, _, _ = self.factors(t, x_t)
            rest = model(x_t - share * s * v, (1 - share) * t)
            target = share * v + (1 - share) * rest

        mse = (model(x_t, t) - target).square().flatten(1).mean(1)
        return {"mse": mse, "loss": mse / (mse.detach() + LARGE_ERROR).sqrt()}
