"""The model card and the files for diffusers: read as the hub and diffusers read them."""

import dataclasses
import html
import json

import diffusers
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from diffussm_cli import runs
from diffussm_cli.config import load_config
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.diffusion.samplers import make_scheduler
from diffussm_cli.runs.publish import last_scores

MNIST = load_config("mnist-noise")


def test_card_is_read_by_the_hub():
    text = runs.model_card(
        MNIST, 4000, 602640, {"fid": 0.58512345, "kid": 0.02}, "Of 500 samples.", "Free.", "mit"
    )
    card = ModelCard(text)
    assert (card.data.license, card.data.library_name) == ("mit", "diffusers")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.datasets == ["ylecun/mnist"]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "fid": 0.5851,
        "kid": 0.02,
    }
    for line in (
        "| Training | 4,000 steps of 16 images, learning rate 0.004, seed 0 |",
        "| fid | 0.5851 |",
        "Free.",
    ):
        assert line in text
    assert "samples.png" not in text


def test_card_promises_the_images_of_sample_only_where_diffusers_has_the_sampler():
    promise = "# the same image as `diffussm sample --seed 0 --precision fp32`\n"
    assert promise in runs.model_card(MNIST, 10, 5)
    assert promise in runs.model_card(load_config("mnist-one-step"), 10, 5)
    flow = runs.model_card(load_config("mnist"), 10, 5)
    assert promise not in flow
    assert "# by DPM-Solver++: diffusers does not have heun, by which diffussm draws\n" in flow


def test_card_names_no_folder_of_the_user_and_no_licence_nobody_chose():
    config = load_config(
        "digits", ["model.num_classes=0", "sample.guidance=1"], {"data.path": "/home/me/cats"}
    )
    text = runs.model_card(config, 10, 5)
    assert "| Data | cats, 8x8 pixels |" in text
    assert "/home" not in text
    assert "An unconditional" in text
    assert ModelCard(text).data.license == "unknown"
    assert ModelCard(text).data.eval_results is None


NAME = "a|b <script>x</script> [link](http://x.y) ![i](j) `c` *d* &amp; # <img src=x>"


def test_names_in_card_are_escaped():
    """As a renderer shows them: the preset, the folder of the data and the VAE may have the names
    of a stranger.
    """
    config = load_config(
        "s-256", fields={"data.path": f"/data/{NAME.replace('/', '')}", "data.vae": NAME}
    )
    text = runs.model_card(
        dataclasses.replace(config, preset=f"{NAME}\n# heading"), 10, 5, {"fid": 1.0}
    )
    assert ModelCard(text).data.model_name == f"{NAME}\n# heading"
    usual = runs.model_card(config_named("name"), 10, 5, {"fid": 1.0})
    tags = [
        kinds(MarkdownIt().enable("table").parse(card.split("---\n", 2)[2]))
        for card in (text, usual)
    ]
    assert tags[0] == tags[1]
    shown = MarkdownIt().enable("table").render(text.split("---\n", 2)[2])
    assert shown.count(html.escape(NAME, quote=False)) == 3  # heading, VAE and preset


def config_named(name):
    config = load_config("s-256", fields={"data.path": f"/data/{name}", "data.vae": name})
    return dataclasses.replace(config, preset=name)


def kinds(tokens):
    """The kinds of all tokens of a parsed text but the text itself, which may come in parts."""
    inner = [
        child.type for token in tokens for child in token.children or () if child.type != "text"
    ]
    return [token.type for token in tokens] + inner


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("builtin:mnist", ("ylecun/mnist", "mnist")),
        ("builtin:emoji", ("emoji", "emoji")),
        ("/home/me/cats", ("cats", "cats")),
    ],
)
def test_card_names_data_set_as_the_hub_does(path, names):
    """Where the hub has it; a name of ours means nothing there."""
    data = dataclasses.replace(MNIST.data, path=path)
    card = ModelCard(runs.model_card(dataclasses.replace(MNIST, data=data), 10, 5, {"fid": 1.0}))
    assert [(r.dataset_type, r.dataset_name) for r in card.data.eval_results] == [names]


def test_final_has_the_preview_and_the_scores_of_its_own_step(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-00000004.png").write_bytes(b"png")
    records = [
        {"step": 2, "eval/fid": 9.0},
        {"step": 4, "loss": 1.0, "eval/fid": 3.0, "eval/fid@0.9": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    files = runs.files_to_publish(tmp_path, MNIST, 4, 5)
    assert files["samples.png"] == b"png"
    assert "| fid | 3 |" in files["README.md"].decode()
    assert "Of 5,000 images in 50 steps" in files["README.md"].decode()
    other = runs.files_to_publish(tmp_path, MNIST, 5, 5)
    assert "samples.png" not in other
    assert "fid" not in other["README.md"].decode()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"loss": 1}', "[" * 100_000, '{"step": 4, "eval/fid": null}']
)
def test_damaged_log_gives_no_scores(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert last_scores(tmp_path, 4) == {}


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp", "unipc"])
def test_scheduler_is_that_of_the_sampler(tmp_path, sampler):
    files = runs.pipeline_files(load_config("mnist-noise", [f"sample.sampler={sampler}"]))
    (tmp_path / "scheduler_config.json").write_bytes(files["scheduler/scheduler_config.json"])
    library, kind = json.loads(files["model_index.json"])["scheduler"]
    stored = getattr(diffusers, kind).from_pretrained(tmp_path)
    own = make_scheduler(sampler, make_objective(MNIST.diffusion), 10, MNIST.model.learn_sigma)
    assert library == "diffusers"
    assert type(stored) is type(own)
    assert {k: v for k, v in stored.config.items() if k[0] != "_"} == {
        k: v for k, v in own.config.items() if k[0] != "_"
    }


def test_samplers_that_diffusers_lacks_become_dpm_solver():
    files = runs.pipeline_files(
        load_config(
            "digits",
            ["diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=euler"],
        )
    )
    settings = json.loads(files["scheduler/scheduler_config.json"])
    assert settings["_class_name"] == "DPMSolverMultistepScheduler"
    assert settings["prediction_type"] == "flow_prediction"
