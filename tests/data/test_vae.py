"""The autoencoder: what is read from its config, encoding and decoding, and what is said without
it.
"""

import json
import os
import re
import unittest.mock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from diffussm_cli.config import load_config
from diffussm_cli.data import vae
from diffussm_cli.data.decoding import open_decoding, preview
from diffussm_cli.data.vae import load_vae
from diffussm_cli.data.vae_facts import read_facts
from diffussm_cli.errors import DataError
from tests.conftest import float32_arithmetic, save_vae, save_vae_of

CPU = torch.device("cpu")


def loaded(folder, dtype=torch.float32):
    return load_vae(read_facts(str(folder)), CPU, dtype)


def test_facts_of_vae_come_from_its_config(tmp_path):
    facts = read_facts(str(save_vae(tmp_path)))
    assert (facts.kind, facts.channels, facts.downsample) == ("AutoencoderKL", 4, 4)
    assert (facts.scale, facts.shift) == ((0.3,) * 4, (0.1,) * 4)
    per_channel = {"latents_mean": [1.0, 2.0], "latents_std": [2.0, 4.0], "shift_factor": None}
    other = read_facts(str(save_vae(tmp_path / "b", latent_channels=2, **per_channel)))
    assert (other.scale, other.shift) == ((0.15, 0.075), (1.0, 2.0))
    assert other.config_sha256 != facts.config_sha256


def test_old_configs_have_the_defaults_of_their_kind(tmp_path):
    path = save_vae(tmp_path) / "config.json"
    values = json.loads(path.read_text())
    del values["scaling_factor"], values["shift_factor"]
    path.write_text(json.dumps(values))
    facts = read_facts(str(tmp_path))
    assert (facts.scale[0], facts.shift[0]) == (0.18215, 0.0)


def as_on_the_hub(folder, **changes):
    """A small VAE in the format of stabilityai/sd-vae-ft-ema: written by diffusers 0.4, weights in
    two formats.
    """
    save_vae(
        folder,
        block_out_channels=(4, 8, 8, 8),
        scaling_factor=0.18215,
        shift_factor=None,
        **changes,
    )
    values = json.loads((folder / "config.json").read_text())
    old = [
        "act_fn",
        "block_out_channels",
        "down_block_types",
        "in_channels",
        "latent_channels",
        "layers_per_block",
    ]
    old += ["norm_num_groups", "out_channels", "sample_size", "up_block_types"]
    old_values = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2"} | {
        k: values[k] for k in old
    }
    (folder / "config.json").write_text(json.dumps(old_values, indent=2))
    weights, names = folder / "diffusion_pytorch_model.safetensors", {}
    for name in load_file(weights):
        names[name] = re.sub(
            r"\.to_([qkv])\.", lambda m: {"q": ".query.", "k": ".key.", "v": ".value."}[m[1]], name
        )
        names[name] = names[name].replace(".to_out.0.", ".proj_attn.")
    save_file({names[k]: v for k, v in load_file(weights).items()}, weights)
    assert {n.split(".")[4] for n in names.values() if ".attentions." in n} == {
        *("group_norm", "query", "key", "value", "proj_attn")
    }
    torch.save(Attack(folder / "owned"), folder / "diffusion_pytorch_model.bin")
    return folder


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_old_format_of_hub_vae_is_read(tmp_path):
    old, new = (
        as_on_the_hub(tmp_path / "old"),
        save_vae(tmp_path / "new", block_out_channels=(4, 8, 8, 8)),
    )
    facts = read_facts(str(old))
    assert (facts.kind, facts.channels, facts.downsample) == ("AutoencoderKL", 4, 8)
    assert (facts.scale, facts.shift) == ((0.18215,) * 4, (0.0,) * 4)
    v, same_weights = loaded(old), loaded(new)
    assert v.weights_sha256 == same_weights.weights_sha256
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    for ours, theirs in zip(v.encode(images), same_weights.encode(images)):
        assert torch.equal(ours, theirs)
    assert v.decode(torch.randn(1, 4, 4, 4)).shape == (1, 3, 32, 32)
    (old / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"cannot load the folder .*safetensors"):
        loaded(old)
    assert not (old / "owned").exists()  # the pickle beside them is not read


def test_encoding_and_decoding_are_in_full_float32(tmp_path, monkeypatch):
    v, before, seen = loaded(save_vae(tmp_path)), float32_arithmetic(), []
    for name in ("encode", "decode"):
        own = getattr(v.model, name)
        monkeypatch.setattr(
            v.model, name, lambda x, own=own: seen.append(float32_arithmetic()) or own(x)
        )
    v.decode(v.encode(torch.zeros(1, 3, 8, 8))[0])
    assert not before["convolutions"]  # torch's default
    assert seen == [{"products": True, "convolutions": True}] * 2
    assert float32_arithmetic() == before


@pytest.mark.parametrize("channels", [4, 16])
def test_encode_and_decode_equal_diffusers(tmp_path, channels):
    v = loaded(save_vae(tmp_path, latent_channels=channels))
    images = torch.rand(3, 3, 16, 24) * 2 - 1
    mean, std = v.encode(images)
    with torch.no_grad():
        posterior = v.model.encode(images).latent_dist
        torch.testing.assert_close(mean, posterior.mean)
        torch.testing.assert_close(std, posterior.std)
        expected = v.model.decode(mean).sample
    assert mean.shape == (3, channels, 4, 6)
    model_space = (mean - v.shift) * v.scale
    torch.testing.assert_close(v.decode(model_space), expected, rtol=1e-4, atol=1e-5)


def test_tiny_autoencoder_has_no_deviation(tmp_path, monkeypatch):
    import diffusers

    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    diffusers.AutoencoderTiny(**widths, **blocks).save_pretrained(tmp_path)
    v = loaded(tmp_path)
    mean, std = v.encode(torch.zeros(1, 3, 16, 16))
    assert v.facts.downsample == 4
    assert mean.shape == (1, 4, 4, 4)
    assert not std.any()
    assert v.decode(mean).shape == (1, 3, 16, 16)
    monkeypatch.setattr(vae, "TILE", 16)
    assert v.decode(torch.randn(1, 4, 8, 12)).shape == (1, 3, 32, 48)  # in tiles


def test_vae_of_deep_compression_equals_diffusers(tmp_path, monkeypatch):
    """It gives no deviation, and one scale; large images are decoded in tiles."""
    v = loaded(save_vae_of("AutoencoderDC", tmp_path))
    assert (v.facts.kind, v.facts.channels, v.facts.downsample) == ("AutoencoderDC", 4, 4)
    assert (v.facts.scale, v.facts.shift) == ((0.4,) * 4, (0.0,) * 4)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, std = v.encode(images)
    with torch.no_grad():
        torch.testing.assert_close(mean, v.model.encode(images).latent)
        expected = v.model.decode(mean).sample
    assert mean.shape == (2, 4, 4, 6)
    assert not std.any()
    torch.testing.assert_close(v.decode(0.4 * mean), expected, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(vae, "TILE", 32)
    tiled = v.decode(torch.randn(1, 4, 12, 20))
    assert tiled.shape == (1, 3, 48, 80)


def test_vae_of_flux_2_folds_neighbours_and_uses_its_statistics(tmp_path, monkeypatch):
    """As diffusers' pipeline of FLUX.2 does it: rearranged, then normalised."""
    v = loaded(save_vae_of("AutoencoderKLFlux2", tmp_path))
    assert (v.facts.channels, v.facts.downsample, v.facts.folded) == (16, 4, 2)
    before = read_facts(str(tmp_path))  # before its weights are loaded
    assert (before.channels, before.downsample) == (16, 4)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, std = v.encode(images)

    def folded(z):  # (B, C, H, W) to (B, 4C, H/2, W/2): each channel's four neighbours in a row
        parts = [z[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return torch.stack(parts, 2).flatten(1, 2)

    with torch.no_grad():
        posterior = v.model.encode(images).latent_dist
        expected = v.model.decode(posterior.mean).sample
    torch.testing.assert_close(mean, folded(posterior.mean))
    torch.testing.assert_close(std, folded(posterior.std))

    bn = v.model.bn
    spread = (bn.running_var + v.model.config.batch_norm_eps).sqrt()
    normalised = (mean - bn.running_mean.view(1, -1, 1, 1)) / spread.view(1, -1, 1, 1)
    torch.testing.assert_close((mean - v.shift) * v.scale, normalised)
    torch.testing.assert_close(v.decode(normalised), expected, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(vae, "TILE", 16)
    assert v.decode(torch.randn(1, 16, 8, 12)).shape == (1, 3, 32, 48)  # in tiles


REFUSED = {
    "holds VQModel, not AutoencoderKL, .* or AutoencoderKLFlux2": {"_class_name": "VQModel"},
    "patch_size is 2 x 3, and not a square": {"patch_size": [2, 3]},
    "patch_size is 64 x 64, and not a square of up to 8": {"patch_size": [64, 64]},
    "patch_size is 0 x 0": {"patch_size": [0, 0]},
}


@pytest.mark.parametrize("words", REFUSED)
def test_vae_that_cannot_be_used_is_refused_by_its_config(tmp_path, words):
    path = save_vae_of("AutoencoderKLFlux2", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | REFUSED[words]))
    with pytest.raises(DataError, match=f"^--vae: .*{words}"):
        read_facts(str(tmp_path))


def test_absurd_lists_in_lists_are_rejected(tmp_path):
    path = save_vae_of("AutoencoderDC", tmp_path) / "config.json"
    values = json.loads(path.read_text())
    values["encoder_qkv_multiscales"] = [[], [], [1 << 20]]
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="encoder_qkv_multiscales is 1048576, more than 16384"):
        read_facts(str(tmp_path))


def test_statistics_among_weights_must_be_finite(tmp_path):
    weights = save_vae_of("AutoencoderKLFlux2", tmp_path) / "diffusion_pytorch_model.safetensors"
    kept = load_file(weights)
    kept["bn.running_var"][3] = -1
    save_file(kept, weights)
    with pytest.raises(DataError, match="its scale or shift is not a finite number"):
        loaded(tmp_path)


def test_decoding_is_bounded_and_tiled(tmp_path, monkeypatch):
    v = loaded(save_vae(tmp_path))
    z, sizes = torch.randn(5, 4, 8, 8), []
    whole, decode = v.decode(z), v.model.decode
    monkeypatch.setattr(vae, "DECODE_PIXELS", 2 * 32 * 32)
    monkeypatch.setattr(v.model, "decode", lambda z: sizes.append(len(z)) or decode(z))
    torch.testing.assert_close(v.decode(z), whole, rtol=1e-4, atol=1e-5)
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(vae, "TILE", 16)
    tiled = v.decode(z)
    assert tiled.shape == whole.shape
    assert not torch.allclose(tiled, whole, atol=1e-4)
    monkeypatch.setattr(vae, "TILE", 32)
    torch.testing.assert_close(v.decode(z), whole, rtol=1e-4, atol=1e-5)


def test_identity_of_vae_is_hash_of_config_and_weights(tmp_path):
    one, two = loaded(save_vae(tmp_path / "1")), loaded(save_vae(tmp_path / "2", seed=1))
    assert one.identity["name"] == str(tmp_path / "1")
    assert one.identity["config_sha256"] == two.identity["config_sha256"]
    assert one.identity["weights_sha256"] != two.identity["weights_sha256"]
    half = loaded(tmp_path / "1", torch.bfloat16)
    assert half.identity == one.identity
    assert half.encode(torch.zeros(1, 3, 8, 8))[0].dtype == torch.float32


def test_bad_folder_is_named(tmp_path):
    def refused(words):
        with pytest.raises(DataError, match=words):
            loaded(tmp_path)

    refused("--vae: cannot load the folder .*config.json")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    refused("holds UNet2DModel, not AutoencoderKL, AutoencoderTiny, AutoencoderDC or")
    save_vae(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("--vae: cannot load the folder")
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")  # pickled weights are not even tried
    refused("--vae: cannot load the folder .*safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"norm_num_groups": 5}))
    refused("the config of .* is damaged")
    (tmp_path / "config.json").write_text(json.dumps(config | {"in_channels": 1}))
    refused("does not map between RGB images and 4 channels")


def test_incomplete_or_damaged_weights_are_rejected(tmp_path):
    weights = save_vae(tmp_path) / "diffusion_pytorch_model.safetensors"
    kept = load_file(weights)
    del kept["decoder.conv_in.bias"]
    save_file(kept, weights)
    with pytest.raises(DataError, match="the weights of .* lack decoder.conv_in.bias"):
        loaded(tmp_path)
    save_file(kept | {"decoder.conv_in.bias": torch.full((8,), torch.nan)}, weights)
    with pytest.raises(DataError, match="are damaged: decoder.conv_in.bias holds numbers that"):
        loaded(tmp_path)
    save_file(kept | {"decoder.conv_in.bias": torch.zeros(3)}, weights)
    with pytest.raises(
        DataError, match="cannot load the folder .* size mismatch for decoder.conv_in.bias"
    ):
        loaded(tmp_path)


def answering(monkeypatch, answer):
    """Requests for what is on the hub end in `answer`; gives the list of the addresses."""
    asked = []

    def head(url, **options):
        asked.append(url)
        answer()

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", head)
    return asked


def test_hub_names_may_have_a_subfolder(monkeypatch):
    import diffusers

    answering(monkeypatch, lambda: None)
    asked = []
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "load_config", lambda **where: asked.append(where) or {}
    )
    for name in ("owner/name", "owner/name/vae"):
        with pytest.raises(DataError, match="holds None, not AutoencoderKL"):
            read_facts(name)
    assert asked == [
        {"pretrained_model_name_or_path": "owner/name"},
        {"pretrained_model_name_or_path": "owner/name", "subfolder": "vae"},
    ]


def test_name_of_neither_folder_nor_hub_is_rejected():
    with pytest.raises(
        DataError, match="--vae: no folder 'nowhere/a/b/c', and it is not a hub name"
    ):
        read_facts("nowhere/a/b/c")
    with pytest.raises(DataError, match="no folder './vae'"):
        read_facts("./vae")
    with pytest.raises(DataError, match=r"^data.vae: no folder './a/b'"):
        read_facts("./a/b", "data.vae")
    # from a manifest, say: longer than a name may be
    with pytest.raises(DataError, match="no folder 'xxx"):
        read_facts("x" * 300)


def test_relative_folders_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    """Neither one that exists, nor a mistake in the path of one."""
    asked = answering(monkeypatch, lambda: pytest.fail("the hub is asked"))
    save_vae(tmp_path / "vaes" / "x")
    monkeypatch.chdir(tmp_path)
    # which is valid in every folder
    assert read_facts("vaes/x").name == str(tmp_path / "vaes" / "x")
    for name in ("vaes/y", "vaes/y/vae", "./vaes/y"):
        with pytest.raises(DataError, match=f"^--vae: no folder '{name}'"):
            read_facts(name)
    assert asked == []


def test_vae_other_than_that_of_run_is_reported(tmp_path):
    """Though it lies in the same place and has the same config."""
    recorded = loaded(save_vae(tmp_path)).weights_sha256
    given = [f"data.vae={tmp_path}", "data.downsample=4"]
    for sha256 in (recorded, ""):
        assert (
            open_decoding(load_config("s-256", [*given, f"data.vae_sha256={sha256}"]), CPU).warning
            is None
        )
    save_vae(tmp_path, seed=1)
    decoding = open_decoding(load_config("s-256", [*given, f"data.vae_sha256={recorded}"]), CPU)
    assert f"{str(tmp_path)!r} is not the VAE that made the latents of this run" in decoding.warning
    assert recorded[:12] in decoding.warning
    assert decoding.record["decoded_by"] == "vae"


ABSURD = {
    "layers_per_block is 2000000, more than 64": {"layers_per_block": 2_000_000},
    "latent_channels is 100000000, more than 16384": {"latent_channels": 100_000_000},
    "block_out_channels is 1048576, more than 16384": {"block_out_channels": [1 << 20]},
    "block_out_channels has 10000 parts": {"block_out_channels": [8] * 10_000},
    "parameters are more than the limit of 1,073,741,824": {"block_out_channels": [1 << 14] * 3},
    "its scale or shift is not a finite number": {"scaling_factor": float("nan")},
    "its scale or shift is not a finite number, or its scale is 0": {"scaling_factor": 0},
    "its scale or shift is not a finite": {"shift_factor": 1e300},
}


@pytest.mark.parametrize("words", ABSURD)
def test_absurd_config_is_rejected_before_network_is_built(tmp_path, words):
    """As soon as the run of a stranger names them, too."""
    path = save_vae(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ABSURD[words]))
    with pytest.raises(DataError, match=f"^--vae: the config of .* is damaged: .*{words}"):
        read_facts(str(tmp_path))
    warning = open_decoding(load_config("s-256", [f"data.vae={tmp_path}"]), CPU).warning
    assert "data.vae: the config of" in warning


def test_network_larger_than_its_weights_takes_no_memory(tmp_path):
    path = save_vae(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [1024] * 3}))
    with pytest.raises(
        DataError,
        match=r"its config describes [\d,]+ parameters, but its weights have [\d,]+ bytes",
    ):
        loaded(tmp_path)


def test_config_is_read_only_as_a_small_file(tmp_path):
    path = save_vae(tmp_path) / "config.json"
    path.write_text(path.read_text() + " " * (1 << 20))
    with pytest.raises(
        DataError, match="--vae: cannot load the folder .*: it has more than 1048576 bytes"
    ):
        read_facts(str(tmp_path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="--vae: cannot load the folder .*: not a regular file"):
        read_facts(str(tmp_path))


def without_network(monkeypatch):
    import diffusers

    def unreachable(*args, **options):
        raise OSError("it does not appear to have a file named config.json") from OSError(
            "Name not known\nby anyone"
        )

    answering(monkeypatch, lambda: None)
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", unreachable)


def test_missing_network_is_one_line_error_with_remedy(monkeypatch):
    without_network(monkeypatch)
    with pytest.raises(DataError) as e:
        read_facts("stabilityai/sd-vae-ft-ema")
    assert str(e.value) == (
        "--vae: cannot load 'stabilityai/sd-vae-ft-ema' from the hub, and there is no such "
        "folder here: download its config.json and diffusion_pytorch_model.safetensors into a "
        "folder and pass --vae FOLDER (Name not known)"
    )


def test_unreachable_hub_is_asked_once(tmp_path, monkeypatch):
    """Its client would repeat the request for 23 seconds; where it answers, though with an error,
    it may.
    """
    import diffusers

    def fail():
        raise OSError("Name not known")

    def say_404():
        raise HfHubHTTPError("404 for this file", response=unittest.mock.Mock())

    loaded_by = []
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "load_config", lambda **where: loaded_by.append(where) or {}
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = answering(monkeypatch, fail)
    with pytest.raises(
        DataError, match="cannot load 'owner/name/vae' from the hub, .* .Name not known."
    ):
        read_facts("owner/name/vae")
    assert [a.partition("owner")[2] for a in asked] == ["/name/resolve/main/vae/config.json"]
    assert loaded_by == []
    answering(monkeypatch, say_404)
    with pytest.raises(DataError, match="holds None"):
        read_facts("owner/name/vae")
    kept = tmp_path / "models--owner--name"
    for name, text in {"refs/main": "abc", "snapshots/abc/vae/config.json": "{}"}.items():
        (kept / name).parent.mkdir(parents=True)
        (kept / name).write_text(text)
    asked = answering(monkeypatch, fail)
    with pytest.raises(DataError, match="holds None"):
        read_facts("owner/name/vae")
    assert asked == []


def test_decoding_without_vae_falls_back_to_preview(tmp_path, monkeypatch):
    other = open_decoding(load_config("s-256", [f"data.vae={save_vae(tmp_path)}"]), CPU)
    assert "has 4 channels and downsampling 4, but the run has 4 and 8" in other.warning
    without_network(monkeypatch)
    decoding = open_decoding(load_config("s-256"), CPU)
    assert decoding.warning.startswith(
        "the images are only previews of the latents, because the VAE cannot be used: data.vae: "
        "cannot load"
    )
    assert (
        "name it by data.vae: in training by --set, in a finished run in the config.yaml"
        in decoding.warning
    )
    assert "--vae" not in decoding.warning
    assert decoding.record == {"vae": "stabilityai/sd-vae-ft-ema", "decoded_by": "linear preview"}
    assert decoding.decode(torch.randn(2, 4, 5, 6)).shape == (2, 3, 40, 48)


def test_pixels_of_image_models_pass_unchanged():
    decoding = open_decoding(load_config("digits"), CPU)
    x = torch.randn(2, 1, 8, 8)
    assert decoding.decode(x) is x
    assert decoding.warning is None


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_preview_is_linear_within_its_range(channels):
    x = torch.rand(2, channels, 3, 4) * 0.2
    out = preview(x, 2)
    assert out.shape == (2, 3, 6, 8)
    torch.testing.assert_close(preview(0.5 * x, 2), 0.5 * out)
    assert all(
        preview(x * (torch.arange(channels) == c).view(-1, 1, 1), 2).any() for c in range(channels)
    )
