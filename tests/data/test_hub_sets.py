"""Data sets of the hub by name, from a faked cache and without a network."""

import io
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.data.listing import list_source, read_entry
from diffussm_cli.data.listing.hub import choose_shards
from diffussm_cli.errors import DataError
from tests.conftest import save_vae
from tests.helpers import SETTINGS, line_of, only_cached, run

HASH, NEWER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)


def write_shard(path, seed):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    files = []
    for image in pixels(seed):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"image": files, "label": [i % 3 for i in range(8)]}), path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache with two revisions of the training set of owner/pets, and no network."""
    home = tmp_path / "cache" / "datasets--owner--pets"
    for revision, seed in {HASH: 1, NEWER: 2}.items():
        write_shard(home / "snapshots" / revision / "data" / "train-00000-of-00001.parquet", seed)
    only_cached(home, {"main": NEWER, "v1": HASH}, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return home


@pytest.mark.parametrize(
    ("name", "seed"),
    [("", 2), ("@v1", 1), (f"@{HASH}", 1), (f"@{HASH}:data/train-*.parquet", 1)],
)
def test_set_is_read_from_the_cache_at_its_revision(cache, name, seed):
    listing = list_source(f"hub:owner/pets{name}")
    assert len(listing.entries) == 8
    for entry, image in zip(listing.entries, pixels(seed)):
        assert np.array_equal(read_entry(listing.root, entry, None), image)


def test_run_records_the_revision_and_keeps_it(cache, tmp_path):
    result = run("train", "--data", "hub:owner/pets", "--out", "run", *SETTINGS)
    assert result.exit_code == 0, result.output
    pinned = f"hub:owner/pets@{NEWER}:data/train-*.parquet"
    assert f"read from {pinned!r}: data.resolution=16, " in result.stderr
    assert runs.read_config(tmp_path / "run", "x").data.path == pinned
    assert runs.read_data(tmp_path / "run")["path"] == pinned

    (cache / "refs" / "main").write_text(HASH)  # the set changes on the hub
    more = ("--out", "run", "--resume", "--set", "train.steps=6")
    again = run("train", "--data", "hub:owner/pets", *more)
    assert again.exit_code == 0, again.output
    assert runs.read_config(tmp_path / "run", "x").data.path == pinned


def test_encode_takes_a_set_and_says_its_revision(cache, tmp_path):
    options = ("--vae", save_vae(tmp_path / "vae"), "--resolution", 16, "--workers", 0)
    result = run("encode", "hub:owner/pets@v1", tmp_path / "store", *options)
    assert result.exit_code == 0, result.output
    assert f"read from hub:owner/pets@{HASH}:data/train-*.parquet" in result.stderr
    assert "8 images of 3 classes" in result.stderr


@pytest.mark.parametrize("name", ["owner/nothing", "owner/pets@v2", f"owner/pets@{'e' * 40}"])
def test_unreachable_set_is_one_line(cache, name):
    line = line_of(run("train", "--data", f"hub:{name}"))
    assert f"data.path: the data set 'hub:{name}' cannot be fetched from the hub: check its" in line


def test_only_the_chosen_files_are_fetched(cache, monkeypatch):
    """A hub that answers: the revision it names is fetched, and no other split."""
    names = ["README.md", "data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
    info = SimpleNamespace(sha=HASH, siblings=[SimpleNamespace(rfilename=n) for n in names])
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    asked = []

    def download(repository, **options):
        asked.append((repository, options))
        return str(cache / "snapshots" / HASH)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(list_source("hub:owner/pets").entries) == 8
    options = {"repo_type": "dataset", "revision": HASH, "allow_patterns": ["data/train-*.parquet"]}
    assert asked == [("owner/pets", options)]


CHOSEN = {  # files of a repository, FILES, what is read or the error
    "the split train": (
        [
            "a/test-00000-of-00001.parquet",
            "a/train-00000-of-00002.parquet",
            "a/train-00001-of-00002.parquet",
        ],
        None,
        "a/train-*.parquet",
    ),
    "splits as folders, as the hub converts": (
        ["default/test/0000.parquet", "default/train/0000.parquet", "default/train/0001.parquet"],
        None,
        "default/train/*.parquet",
    ),
    "no splits": (["README.md", "x.parquet", "y.parquet"], None, "*.parquet"),
    "some of a series, by name": (
        ["train-00001-of-00002.parquet"],
        "train-*.parquet",
        "train-*.parquet",
    ),
    "files that are named": (["a/test-0.parquet", "a/train-0.parquet"], "a/test-*", "a/test-*"),
}
REFUSED = {
    "no parquet": (["a.zip"], None, "holds no parquet files; .*: hub:o/n@refs/convert/parquet"),
    "several subsets": (
        ["a/train-0.parquet", "b/train-0.parquet"],
        None,
        r"the set has 2 parts; choose one: 'hub:o/n@v:a/train-\*.parquet', 'hub:o/n@v:b/train",
    ),
    "no split train": (
        ["validation-0.parquet", "test-0.parquet"],
        None,
        r"the set has 2 parts; choose one: 'hub:o/n@v:test-\*.parquet', 'hub:o/n@v:validation",
    ),
    "a cache that holds some of a series": (
        ["a/train-00001-of-00003.parquet"],
        None,
        r"^of the 3 shards 'hub:o/n@v:a/train-\*.parquet', 2 are missing: 00000, 00002; fetch what",
    ),
    "files that are not there": (
        ["a.parquet"],
        "b*",
        "'hub:o/n@v:b.' fits no parquet file.* has a.parquet",
    ),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_shards_are_chosen(case):
    names, files, pattern = CHOSEN[case]
    assert choose_shards(names, files, "hub:o/n@v") == pattern


@pytest.mark.parametrize("case", REFUSED)
def test_doubtful_choice_is_one_line(case):
    names, files, line = REFUSED[case]
    with pytest.raises(DataError, match=line):
        choose_shards(names, files, "hub:o/n@v")


def test_wrong_name_is_one_line(cache):
    line = line_of(run("train", "--data", "hub:pets"))
    assert "data.path: 'hub:pets' must read hub:OWNER/NAME or hub:OWNER/NAME@REVISION:FILES" in line
