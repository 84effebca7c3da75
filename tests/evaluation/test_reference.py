"""Sets of images and reference files: what goes in comes out, whoever made it, and bad ones are one
line.
"""

import numpy as np
import pytest
import torch

from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation import comparison as ev
from diffussm_cli.evaluation.metrics import moments
from diffussm_cli.evaluation.reference import open_reference, write_reference
from diffussm_cli.evaluation.sets import open_images
from tests.evaluation.conftest import gathered


# ---------------------------------------------------------------------------------------- gathering
def test_reference_file_has_the_arrays_adm_reads(pictures, tmp_path, digits):
    images = open_images(str(pictures), 1)
    features = gathered(images, digits)[0]
    target = tmp_path / "ref.npz"
    assert write_reference(target, images, features, digits, count=5, seed=1) == 5
    expected = moments(features.pool)
    with np.load(target, allow_pickle=False) as found:
        assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} <= set(found)
        assert (found["arr_0"].shape, found["arr_0"].dtype) == ((5, 28, 28, 1), np.uint8)
        np.testing.assert_array_equal(found["mu"], expected.mean)
        np.testing.assert_array_equal(found["sigma"], expected.covariance)
        np.testing.assert_array_equal(found["sigma_s"], features.spatial.covariance)
        assert found["extractor"].tobytes().decode() == digits.identity
        kept = found["arr_0"]
    every = torch.cat(list(images.read(range(12), 12))).permute(0, 2, 3, 1).numpy()
    places = [int(np.flatnonzero((every == k).all((1, 2, 3)))[0]) for k in kept]
    assert places == sorted(set(places))


def test_statistics_of_file_are_used(pictures, tmp_path, digits):
    """Of 12 images, though the file holds 5: FID of the 12 against it is 0."""
    images = open_images(str(pictures), 1)
    features = gathered(images, digits)[0]
    write_reference(tmp_path / "ref.npz", images, features, digits, count=5)
    reference = open_reference(str(tmp_path / "ref.npz"), digits)
    assert not ev.needs_images(["fid", "sfid", "is"], reference)
    assert ev.needs_images(["recall"], reference)
    found = dict(ev.evaluate_features(features, reference, ["fid", "sfid"]))
    assert abs(found["fid"]) < 1e-6
    assert abs(found["sfid"]) < 1e-4  # its covariance has a trace of thousands
    with pytest.raises(
        DataError, match="metrics: recall needs images or statistics that .*ref.npz does not hold"
    ):
        dict(ev.evaluate_features(features, reference, ["recall"]))
    reference.complete(gathered(reference.images, digits)[0])
    assert abs(dict(ev.evaluate_features(features, reference, ["fid"]))["fid"]) < 1e-6


def test_adm_file_without_extractor_is_accepted(tmp_path, digits):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 64))
    np.savez(tmp_path / "adm.npz", mu=x.mean(0).astype(np.float32), sigma=np.cov(x.T))
    reference = open_reference(str(tmp_path / "adm.npz"), digits)
    assert reference.images is None
    assert reference.pool[0].dtype == torch.float64


def statistics(d):
    return {"mu": np.zeros(d), "sigma": np.eye(d)}


BAD_REFERENCES = {
    "missing keys": ({"mu": np.zeros(4)}, DataError, "neither arr_0 nor mu and sigma, only mu"),
    "labels only": (
        {"arr_1": np.zeros(4, int)},
        DataError,
        "neither arr_0 nor mu and sigma, only arr_1",
    ),
    "shapes": ({"mu": np.zeros(4), "sigma": np.eye(5)}, DataError, "not \\(d,\\) and \\(d, d\\)"),
    "not finite": ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, DataError, "not finite"),
    "other": (
        statistics(4) | {"extractor": np.frombuffer(b"net-1", np.uint8)},
        ConfigError,
        "made with net-1",
    ),
}


@pytest.mark.parametrize(("arrays", "error", "words"), BAD_REFERENCES.values(), ids=BAD_REFERENCES)
def test_bad_reference_is_one_line_error(tmp_path, digits, arrays, error, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(error, match=words):
        open_reference(str(tmp_path / "bad.npz"), digits)
