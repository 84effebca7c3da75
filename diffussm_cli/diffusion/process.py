"""How images are noised and what the model predicts: ADM's Gaussian diffusion with its posterior,
and the flow of SiT.

    B batch   C channels   T timesteps
    x_0 image   x_t noised image   eps noise   v range interpolation

    objective  x_t = a x_0 + s eps             target         x_0 = f x_t - g output
    noise      a^2 = alpha_bar, s^2 = 1 - a^2  eps            f = 1/a, g = s/a
    velocity   a and s as above                a eps - s x_0  f = a, g = s
    flow       a = 1 - t/T, s = t/T            eps - x_0      f = 1, g = s
    its image  a and s as above                x_0            f = 0, g = -1
    its mean   a and s as above                see MeanFlow   f = 1, g = s

    objective            velocity dx_t/dtime  time
    noise and velocity   a eps - s x_0        atan2(s, a)
    flow and its image   eps - x_0            s

Equations: DDPM = Ho et al. 2020 (arXiv 2006.11239), IDDPM = Nichol and Dhariwal 2021 (arXiv
2102.09672). Velocity: arXiv 2202.00512, section 4 and appendix D. Flow: the linear path of SiT,
arXiv 2401.08740, section 2. Predicting the image of a flow: JiT, arXiv 2511.13720.
"""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffussm_cli.config import DiffusionConfig, check_arguments
from diffussm_cli.config.checks import wrong_variances


class Prediction(NamedTuple):
    """A model's p(x_{t-1} | x_t); each field is (B, C, ...)."""

    mean: Tensor
    log_variance: Tensor
    x_0: Tensor


class Objective(ABC):
    """How x_0 is noised and what the model predicts: a row of the table. Losses and samplers use
    only this interface. t is (B,); images and outputs (without v) are (B, C, ...).

    `name` is that of the configuration. `schedule`: the equivalent keyword arguments of a diffusers
    scheduler; `check_fit` refuses those that give other noise levels. `continuous`: t is anywhere
    in 0..T, not one of 0..T-1.
    """

    name: str
    T: int
    device: torch.device
    schedule: dict[str, Any]
    continuous = False

    @classmethod
    @abstractmethod
    def from_config(
        cls, config: DiffusionConfig, device: torch.device | str = "cpu"
    ) -> "Objective":
        """The objective of a configuration's `diffusion` section, with its tables on `device`."""

    @abstractmethod
    def factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a, s, f and g, each (B, 1, ...), in the dtype of `like`."""

    @abstractmethod
    def velocity(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The derivative of x_t with respect to `time`; also the target, if a class does not
        override that.
        """

    @abstractmethod
    def time(self, t: float) -> float:
        """The time of a timestep; 0 is the image."""

    @abstractmethod
    def timesteps(self, steps: int) -> Sequence[float]:
        """`steps` evenly spaced timesteps, descending from the noisiest one; the step after the
        last ends at time 0.

        Raises:
            ValueError: if `steps` is not a whole number in 1..T.
        """

    def check_steps(self, steps: int) -> None:
        """Raises ValueError for a number of steps that is not whole or does not lie in 1..T."""
        is_whole = isinstance(steps, numbers.Integral) and not isinstance(steps, bool)
        if not is_whole or not 1 <= steps <= self.T:
            raise ValueError(f"steps must be a whole number in 1..{self.T}, got {steps!r}")

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the model should predict."""
        return self.velocity(x_0, t, noise)

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0)."""
        a, s, _, _ = self.factors(t, x_0)
        return a * x_0 + s * noise

    def predict_x_0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The x_0 implied by x_t and the model's output."""
        _, _, f, g = self.factors(t, x_t)
        return f * x_t - g * output

    def output_for(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """The output from which `predict_x_0` gives this x_0."""
        _, _, f, g = self.factors(t, x_t)
        return (f * x_t - x_0) / g

    def predict_noise(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The noise implied by x_t and the model's output."""
        a, s, _, _ = self.factors(t, x_t)
        return (x_t - a * self.predict_x_0(x_t, t, output)) / s

    def predict_velocity(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The velocity implied by x_t and the model's output."""
        return self.velocity(
            self.predict_x_0(x_t, t, output), t, self.predict_noise(x_t, t, output)
        )

    def loss_weight(self, t: Tensor) -> Tensor:
        """The weight (B,) of the target's MSE in the loss."""
        return torch.ones_like(t, dtype=torch.float32)

    def loss(
        self,
        model: Callable[..., Tensor],
        x_0: Tensor,
        y: Tensor | Sequence[int] | None = None,
        text: Tensor | None = None,
        *,
        label_dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The training loss of each image, (B,), at timesteps and with noise that are drawn here.

        Args:
            model: (x_t, t, y, text) -> what this objective predicts, (B, C or 2C, H, W).
            x_0: images or latents, (B, C, H, W), about in [-1, 1].
            y: a label for each image, for a model of classes.
            text: captions (B, 1 + K, E), for a model with text; rows of zeros stand for none.
            label_dropout: the share of labels that become `model.null_class`, and of captions that
                become zeros, so that sampling can guide.
            generator: on the CPU; the default one if None.

        Raises:
            ValueError: for images that are no floats, another number of labels than of images, and
                labels that the model cannot take.
        """
        from diffussm_cli.diffusion.losses import training_losses

        if not x_0.is_floating_point():
            raise ValueError(f"x_0: {x_0.dtype} must be floats, such as x_0.float() / 127.5 - 1")

        # timesteps and noise
        B = len(x_0)
        share = torch.rand(B, generator=generator).to(x_0.device)
        t = share * self.T if self.continuous else (share * self.T).long()
        noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)

        # labels and captions, some of them dropped
        dropped = (torch.rand(B, generator=generator) < label_dropout).to(x_0.device)
        if y is not None:
            _check_has_classes(model)
            y = torch.as_tensor(y, device=x_0.device)
            if y.shape != (B,):
                raise ValueError(f"y: labels of shape {tuple(y.shape)} for {B} images")
            y = torch.where(dropped, model.null_class, y)  # type: ignore[attr-defined]
        if text is not None:
            text = text * ~dropped[:, None, None]

        x_t = self.q_sample(x_0, t, noise)
        return training_losses(self, model(x_t, t, y, text), x_0, x_t, t, noise)["loss"]

    def sample(
        self,
        model: Callable[..., Tensor],
        n: int,
        y: Tensor | Sequence[int] | int | None = None,
        *,
        steps: int = 25,
        guidance: float = 1.0,
        sampler: str = "heun",
        seed: int = 0,
        shape: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """Draw n images or latents, (n, C, H, W), float32. Image i depends on the seed `seed` + i
        alone.

        Args:
            model: a network of this package in eval mode, or with `shape` any (x_t, t, y) ->
                prediction.
            y: a label for all images, or one for each.
            guidance: scale of classifier-free guidance; 1 for none. It needs `y` and
                `model.null_class`.
            sampler: a name that `sample_by_name` takes.
            shape: (C, H, W); by default, that of the model's input.

        Raises:
            ValueError: if the number of labels is not n, if the model has no classes, or if
                guidance has no labels, or no class to lead away from.
        """
        from diffussm_cli.diffusion.denoiser import guided, labelled
        from diffussm_cli.diffusion.samplers import sample_by_name

        # the starting noise, in float64 as the steps are
        C, H, W = shape or (model.in_channels, *model.input_size)  # type: ignore[attr-defined]
        generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
        empty = torch.empty(0, C, H, W, dtype=torch.float64)
        noise = [torch.randn(1, C, H, W, generator=g, dtype=torch.float64) for g in generators]
        x = torch.cat([empty, *noise]).to(self.device)

        # the denoiser
        def predict(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            return model(x.float(), t, y).to(x.dtype)

        if y is None:
            if guidance != 1:
                raise ValueError(f"guidance: {guidance} needs y, the labels that it leads to")
            denoise = labelled(predict, None)
        else:
            _check_has_classes(model)
            labels = torch.as_tensor(y, device=self.device)
            if labels.ndim and len(labels) not in (1, n):
                raise ValueError(f"y: {len(labels)} labels for n = {n} images")
            labels = labels.expand(n)
            null = getattr(model, "null_class", None)
            if null is None and guidance != 1:
                raise ValueError(
                    f"guidance: {guidance} leads away from the class model.null_class, which this "
                    "model does not have; set it, or guidance=1"
                )
            denoise = guided(predict, labels, null or 0, guidance)

        covariance = getattr(model, "learn_sigma", False)
        return sample_by_name(sampler, denoise, self, x, steps, generators, covariance).float()

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR weight w (B,): w * MSE(target) = min(SNR, gamma) * MSE(x_0), arXiv 2303.09556,
        section 3.4.
        """
        a, s, _, g = self.factors(t, t.float())
        return (a / s).square().clamp(max=gamma) * g.square()


def _check_has_classes(model: Callable[..., Tensor]) -> None:
    """Raises ValueError for labels of a network of this package that would not use them."""
    if getattr(model, "num_classes", None) == 0:
        raise ValueError("y: labels were given, and the model has no classes (num_classes=0)")


class GaussianDiffusion(Objective):
    """Linear schedule of T variances from `beta_start` to `beta_end`, and a model that predicts the
    noise.

    Tables are (T,), on `device`. They are computed in float64 and kept in float32, as ADM uses
    them; `alpha_bar64` stays in float64, on the CPU. `zero_snr` rescales them so that x_{T-1} is
    pure noise.

    Raises:
        ValueError: for an argument that its field of the configuration could not be.
    """

    name, prediction_type = "noise", "epsilon"

    def __init__(
        self,
        T: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        device: torch.device | str = "cpu",
        zero_snr: bool = False,
    ):
        # The variances, which must leave something of the image.
        check_arguments(DiffusionConfig, locals(), {"T": "timesteps"})
        wrong = wrong_variances(T, beta_start, beta_end)
        if wrong:
            raise ValueError(wrong)

        # The tables.
        beta = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - beta, dim=0)
        if zero_snr:  # arXiv 2305.08891, algorithm 1
            a = alpha_bar.sqrt()
            alpha_bar = ((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        beta = 1 - alpha_bar / previous if zero_snr else beta
        posterior_variance = beta * (1 - previous) / (1 - alpha_bar)  # DDPM (7)
        # the variance is 0 at t = 0
        clipped = torch.cat([posterior_variance[1:2], posterior_variance[1:]])

        self.T, self.device = T, torch.device(device)
        self.schedule = {
            "num_train_timesteps": T,
            "beta_schedule": "linear",
            "prediction_type": self.prediction_type,
        }
        self.schedule |= {
            "beta_start": beta_start,
            "beta_end": beta_end,
            "rescale_betas_zero_snr": zero_snr,
        }

        def table(x: Tensor) -> Tensor:
            return x.float().to(device)

        self.alpha_bar64 = alpha_bar
        self.signal, self.noise = table(alpha_bar.sqrt()), table((1 - alpha_bar).sqrt())
        self.inv_signal, self.noise_to_signal = (
            table(alpha_bar.rsqrt()),
            table((1 / alpha_bar - 1).sqrt()),
        )
        # DDPM (7), factor of x_0
        self.posterior_x_0 = table(beta * previous.sqrt() / (1 - alpha_bar))
        # factor of x_t
        self.posterior_x_t = table((1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar))
        self.posterior_log_variance = table(clipped.log())
        self.log_beta = table(beta.log())

    @classmethod
    def from_config(
        cls, config: DiffusionConfig, device: torch.device | str = "cpu"
    ) -> "GaussianDiffusion":
        return cls(
            config.timesteps, config.beta_start, config.beta_end, device, config.zero_terminal_snr
        )

    def factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, s, f, g = (
            _at(x, t, like)
            for x in (self.signal, self.noise, self.inv_signal, self.noise_to_signal)
        )
        return a, s, f, g

    def velocity(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return _at(self.signal, t, x_0) * noise - _at(self.noise, t, x_0) * x_0

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        return noise

    def time(self, t: float) -> float:
        alpha_bar = self.alpha_bar64[int(t)].item()
        return math.atan2(math.sqrt(1 - alpha_bar), math.sqrt(alpha_bar))

    def timesteps(self, steps: int) -> list[int]:
        """Evenly spaced in 0..T-1, both ends included, descending: ADM's respacing with one
        section.

        A single step begins at T-1, the noisiest timestep; ADM's would begin at 0, where nothing is
        left to denoise.
        """
        self.check_steps(steps)
        if steps == 1:
            return [self.T - 1]
        stride = (self.T - 1) / (steps - 1)
        position, kept = 0.0, []
        # like ADM, which adds up the stride: the rounding of the sum decides some steps
        for _ in range(steps):
            kept.append(round(position))
            position += stride
        return kept[::-1]

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, ...) and log variance (B, 1, ...) of q(x_{t-1} | x_t, x_0), DDPM (6)."""
        mean = _at(self.posterior_x_0, t, x_t) * x_0 + _at(self.posterior_x_t, t, x_t) * x_t
        return mean, _at(self.posterior_log_variance, t, x_t)

    def inverse_signal_share(self, t: Tensor) -> Tensor:
        """1 / alpha_bar = 1 + 1/SNR at t (B,) -> (B,)."""
        return self.inv_signal[t] ** 2

    def p_mean_variance(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """p(x_{t-1} | x_t) from a model's output (B, 2C, ...); log variance by range interpolation,
        IDDPM (15).
        """
        output, v = model_output.chunk(2, dim=1)
        x_0 = self.predict_x_0(x_t, t, output)
        mean, lowest = self.q_posterior(x_0, x_t, t)
        share = (v + 1) / 2
        return Prediction(mean, share * _at(self.log_beta, t, x_t) + (1 - share) * lowest, x_0)


class VelocityDiffusion(GaussianDiffusion):
    """The same process, and a model that predicts the velocity. It keeps the bound, whose mean
    comes from x_0.
    """

    name, prediction_type = "velocity", "v_prediction"
    target = Objective.target

    def factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, s = _at(self.signal, t, like), _at(self.noise, t, like)
        return a, s, a, s


def timestep_batch(t: float, x: Tensor) -> Tensor:
    """One timestep for all images of x, (B,)."""
    return torch.full(
        (len(x),), t, device=x.device, dtype=x.dtype if isinstance(t, float) else torch.long
    )


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t], shaped (B, 1, ...) to multiply `like` (B, C, ...)."""
    return table[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))
