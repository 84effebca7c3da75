"""On a GPU that is only pretended: torch's fake tensors carry a CUDA device and a shape but no
values.

An operator that is given tensors of two devices fails as on a real GPU, and so does the host where
it asks a tensor on the device for its value, which would make every step wait. Values are compared
elsewhere; `pytest --device cuda` runs the whole suite where there is a real one.
"""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffussm_cli.config import SampleConfig, load_config
from diffussm_cli.data import text
from diffussm_cli.data import vae as vae_module
from diffussm_cli.data.opening import open_source
from diffussm_cli.data.vae_facts import read_facts
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.evaluation.extractors import load_extractor
from diffussm_cli.machine.hub import load_pretrained
from diffussm_cli.model import build_model
from diffussm_cli.profiling.roofline import MOVES_NOTHING, part_of_step
from diffussm_cli.sampling.generate import generate, make_denoiser
from diffussm_cli.training.batches import make_batch
from diffussm_cli.training.step import Step
from tests.conftest import save_vae
from tests.data.test_text import saved

CUDA = torch.device("cuda", 0)
# tells kept kernels apart
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


def new_parameters(self, function, recurse=True):
    """`nn.Module._apply` with new parameters: torch's own cannot exchange those that are fake."""
    for child in self.children():
        child._apply(function)
    with torch.no_grad():
        for name, p in self._parameters.items():
            self._parameters[name] = p if p is None else nn.Parameter(function(p), p.requires_grad)
        for name, b in self._buffers.items():
            self._buffers[name] = b if b is None else function(b)
    return self


class Dtypes(TorchDispatchMode):
    """The dtypes of all tensors on the pretended device that operators give."""

    def __init__(self):
        super().__init__()
        self.on_device = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        found = function(*arguments, **(named or {}))
        self.on_device |= {
            t.dtype for t in tree_leaves(found) if isinstance(t, torch.Tensor) and t.device == CUDA
        }
        return found


class Counted(TorchDispatchMode):
    """How many operators give something on the pretended device, and how often the host waits for
    it: for a value, or for a copy that is not asynchronous.
    """

    def __init__(self):
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            self.waits += arguments[0].device == CUDA
            # more than any count of finite steps, or a variance
            return 0.5 if arguments[0].is_floating_point() else 1000
        result = function(*arguments, **named)
        name = function.overloadpacket.__name__
        given, made = ([t.device for t in tensors_of(tree)] for tree in (arguments, result))
        if name in ("_to_copy", "copy_") and len({*given, *made}) == 2:
            is_asynchronous = named.get("non_blocking") or any(a is True for a in arguments)
            self.waits += not is_asynchronous
        if CUDA in made and not function.is_view and name not in MOVES_NOTHING:
            self.launches += 1
        return result


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def pretended(monkeypatch):
    """A mode in which CUDA devices are pretended."""
    monkeypatch.setattr(nn.Module, "_apply", new_parameters)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("preset", ["digits", "mnist-dit"])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_runs_on_pretended_gpu(pretended, preset, grad):
    config = load_config(preset, ["model.depth=1", "model.hidden_size=16", "model.heads=2"])
    with pretended, torch.set_grad_enabled(grad):
        model = build_model(config).to(CUDA)
        x = torch.randn(2, 1, *config.data.grid, device=CUDA)
        output = model(
            x,
            torch.zeros(2, dtype=torch.long, device=CUDA),
            torch.ones(2, dtype=torch.long, device=CUDA),
        )
    assert output.device == CUDA


RECIPES = {
    "s4d": [],
    "axial": ["model.mixer=axial"],
    "axial, muon": ["model.mixer=axial", "train.optimizer=muon"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_update_neither_mixes_devices_nor_waits_for_the_host(pretended, tiny, monkeypatch, recipe):
    settings = ["train.precision=fp32", "train.accumulate=2", "train.grad_clip=1"]
    config = tiny(*settings, *RECIPES[recipe])
    batch = make_batch(open_source(config), config, 0)

    def backward(loss):  # the engine wants a real device
        for p in step.model.parameters():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pretended:
        step = Step(config, CUDA)
        with Dtypes() as seen, Counted() as counted:
            step.update(batch)
        assert counted.waits == 0
        assert torch.float64 not in seen.on_device  # 64 times slower than float32 on many GPUs
        assert torch.float32 in seen.on_device
        assert {p.device for p in step.ema.model.parameters()} == {CUDA}
        # records do wait, so the pretence sees it
        with pytest.raises(DataDependentOutputException):
            step.meter.flush()


def test_guided_and_clipped_denoiser_runs_on_pretended_gpu(pretended):
    """What the samplers call; diffusers' schedulers themselves ask for values at each step."""
    config = load_config("digits", ["model.depth=1", "model.hidden_size=16"])
    request = SampleConfig(guidance=2.0, clip=True)
    with pretended, torch.no_grad():
        model = build_model(config).to(CUDA).eval()
        process = GaussianDiffusion.from_config(config.diffusion, CUDA)
        denoise = make_denoiser(
            model, process, request, torch.zeros(2, dtype=torch.long, device=CUDA)
        )
        assert (
            denoise(torch.randn(2, 1, 8, 8, device=CUDA, dtype=torch.float64), 500).device == CUDA
        )


@pytest.mark.parametrize(
    ("preset", "sampler", "waits"),
    [
        ("mnist", "euler", 0),
        ("mnist", "heun", 0),
        ("mnist", "sde", 1),  # its noise is drawn on the CPU, so that it is that of the seed
        ("digits", "euler", 0),
        ("digits", "heun", 0),
    ],
)
def test_step_of_a_sampler_waits_for_its_noise_alone(pretended, preset, sampler, waits):
    """Counted as the difference between six steps and three; the end of a batch waits too."""
    config = load_config(preset, ["model.depth=1", "model.hidden_size=16"])
    counts = {}
    with pretended:
        model = build_model(config).to(CUDA).eval()
        objective = make_objective(config.diffusion, CUDA)
        for steps in (3, 6):
            request = SampleConfig(sampler=sampler, steps=steps, guidance=2.0, clip=True)
            with Counted() as counts[steps]:
                for _, images in generate(model, objective, request, range(2)):
                    assert images.device.type == "cpu"
    assert counts[6].waits - counts[3].waits == 3 * waits
    assert counts[3].waits > 3 * waits, "the pretence sees the end of a batch"


def test_digits_extractor_runs_on_pretended_gpu(pretended):
    with pretended:
        features = load_extractor("digits", None, CUDA)(
            torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
        )
    assert {f.device for f in features} == {CUDA}


def test_vae_runs_on_pretended_gpu(pretended, tmp_path, monkeypatch):
    monkeypatch.setattr(vae_module, "weights_sha256", lambda model: "")  # of values
    facts = read_facts(str(save_vae(tmp_path / "vae")))
    with pretended:
        model = AutoencoderKL.from_config(AutoencoderKL.load_config(tmp_path / "vae"))
        vae = vae_module.VAE(model, facts, CUDA, torch.float32)
        mean, std = vae.encode(torch.zeros(2, 3, 16, 16))
        assert mean.device == std.device == CUDA
        assert vae.decode(torch.zeros(2, 4, 4, 4)).device.type == "cpu"


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_captions_are_encoded_on_the_device_and_come_back_to_the_cpu(
    pretended, tmp_path, monkeypatch, kind
):
    saved(tmp_path, kind)
    parts = load_pretrained(str(tmp_path), "data.text", {"clip": "CLIPTextModel"}, "AutoTokenizer")
    monkeypatch.setattr(text, "load_pretrained", lambda *_: parts)
    monkeypatch.setattr(text, "weights_sha256", lambda model: "")  # of values
    with pretended:
        encoder = text.Pretrained(str(tmp_path), CUDA)
        with Dtypes() as seen:
            encoded = encoder.encode(["red heart", "blue"])
    assert torch.float32 in seen.on_device
    assert {t.device.type for t in encoded} == {"cpu"}


def launches(batch_size):
    """Kernels of a training step of XL with one block, counted on the meta device."""
    settings = ["model.depth=1", "train.precision=bf16", "train.accumulate=1"]
    config = load_config("xl-256", [*settings, f"train.batch_size={batch_size}"])
    with torch.device("meta"):
        model = build_model(config)
    return sum(work.kernels for _, work in part_of_step(model, config))


def test_block_of_xl_launches_as_many_kernels_at_any_batch():
    """The host launches them one by one, so a GPU waits for it if there are many small ones."""
    assert launches(2) == launches(64) <= 470
