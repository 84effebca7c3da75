"""Images in .npz files and in CIFAR's binary version: the pixels of item i are those written."""

import pickle

import numpy as np
import pytest

from diffussm_cli import runs
from diffussm_cli.data.captions import read_captions
from diffussm_cli.data.folder import ImageFolder
from diffussm_cli.data.listing import entry_size, list_source, read_entry
from diffussm_cli.errors import DataError
from tests.conftest import save_vae
from tests.helpers import SETTINGS, line_of, run


def images(n=5, height=6, width=8, channels=3, seed=0):
    shape = (n, height, width, channels) if channels else (n, height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def left_out(found):
    return [tuple(part) for part in found.left_out()]


LABELS = np.array([2, 0, 1, 1, 0])
GREY, COLOUR = images(channels=0), images()
NOT_READ = "of each .npz file, only one array of images and its labels are read"
HELD = {  # arrays; the images, class names, labels; what is left out
    "images and labels": ({"images": COLOUR, "labels": LABELS}, COLOUR, "012", LABELS, []),
    "as ADM's samples": ({"arr_0": COLOUR, "arr_1": LABELS}, COLOUR, "012", LABELS, []),
    "as Keras": (
        {"x_train": GREY, "y_train": LABELS, "x_test": GREY, "y_test": LABELS},
        GREY[..., None],
        "012",
        LABELS,
        [(2, "array", NOT_READ, "set.npz: x_test")],
    ),
    "as MedMNIST, labels in a column": (
        {"train_images": GREY, "train_labels": LABELS[:, None].astype(np.uint8)},
        GREY[..., None],
        "012",
        LABELS,
        [],
    ),
    "one channel": ({"images": GREY[..., None]}, GREY[..., None], "", [0] * 5, []),
    "names": (
        {"images": COLOUR, "labels": np.array(["dog", "cat", "dog", "ant", "cat"])},
        COLOUR,
        ("ant", "cat", "dog"),
        [2, 1, 2, 0, 1],
        [],
    ),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("case", HELD)
def test_npz_holds_what_was_written(tmp_path, case, save):
    arrays, pixels, names, labels, rest = HELD[case]
    save(tmp_path / "set.npz", **arrays)
    for source in (tmp_path, tmp_path / "set.npz"):
        found = list_source(source)
        assert [e.label for e in found.entries] == list(labels)
        assert found.class_names == tuple(names)
        assert left_out(found) == rest
        for entry, expected in zip(found.entries, pixels):
            channels = expected.shape[2]
            read = read_entry(found.root, entry, None, channels)
            assert np.array_equal(read, expected)
            assert entry_size(found.root, entry) == expected.shape[:2]
    assert read_captions(found) == {}


def test_several_npz_files_are_one_set_in_order(tmp_path):
    np.savez(tmp_path / "b.npz", images=images(3, seed=1), labels=np.array([0, 1, 4]))
    np.savez_compressed(tmp_path / "a.npz", images=images(2, 9, 9), labels=np.array([3, 3]))
    found = list_source(tmp_path)
    assert [e.label for e in found.entries] == [3, 3, 0, 1, 4]
    assert found.class_names == tuple("01234")
    assert np.array_equal(read_entry(tmp_path, found.entries[4], None), images(3, seed=1)[2])


def test_named_arrays_are_read(tmp_path):
    np.savez(tmp_path / "set.npz", faces=COLOUR, breed=LABELS, images=GREY)
    found = list_source(tmp_path, columns={"image": "faces", "label": "breed"})
    assert np.array_equal(read_entry(tmp_path, found.entries[1], None), COLOUR[1])
    assert [e.label for e in found.entries] == LABELS.tolist()
    assert left_out(found) == [(1, "array", NOT_READ, "set.npz: images")]


def test_images_are_read_before_arrays_beside_them(tmp_path):
    from PIL import Image

    np.savez(tmp_path / "samples.npz", arr_0=COLOUR)
    Image.fromarray(COLOUR[0]).save(tmp_path / "a.png")
    found = list_source(tmp_path)
    assert [e.name for e in found.entries] == ["a.png"]
    why = "arrays beside images or shards, which are read instead"
    assert left_out(found) == [(1, "file", why, "samples.npz")]


def packed(**arrays):
    def write(path):
        np.savez(path, **arrays)

    return write


WRONG = {
    "floats": (
        packed(images=COLOUR / 255),
        "images holds float64, not uint8: save floor(255 x + 0.5) if x lies in [0, 1], "
        "floor(127.5 x + 128) if x lies in [-1, 1]",
    ),
    "planes first": (packed(images=images(3, 3, 8, 8)), "not uint8 (n, H, W, 3)"),
    "no usual name": (packed(pictures=COLOUR), "holds pictures, not images, image, x"),
    "too few labels": (
        packed(images=COLOUR, labels=LABELS[:4]),
        "not one integer or name for each",
    ),
    "one-hot labels": (packed(images=COLOUR, labels=np.eye(5)), "not one integer or name for each"),
    "negative labels": (
        packed(images=COLOUR, labels=LABELS - 1),
        "from -1 to 1; labels begin at 0",
    ),
    "objects": (packed(images=COLOUR, labels=np.array([{}] * 5)), "labels.npy holds objects"),
    "no zip": (lambda path: path.write_bytes(b"text" * 99), "cannot be read as .npz"),
    "no images": (packed(images=COLOUR[:0]), "not uint8 (n, H, W, 3)"),
    "some labelled": (
        lambda path: (
            np.savez(path, images=COLOUR),
            np.savez(path.with_name("b.npz"), images=COLOUR, labels=LABELS),
        ),
        "some have labels and others none",
    ),
    "two splits": (
        lambda path: [
            np.savez(path.with_name(f"{s}.npz"), images=COLOUR) for s in ("train", "test")
        ],
        "the shards are of test, train; choose one: 'train.npz'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_npz_is_one_line(tmp_path, case):
    write, line = WRONG[case]
    write(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"^data\.path: ") as refused:
        list_source(tmp_path, "data.path")
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_large_compressed_arrays_are_refused_before_they_are_read(tmp_path, monkeypatch):
    from diffussm_cli.data import arrays

    np.savez_compressed(tmp_path / "a.npz", images=COLOUR)
    np.savez(tmp_path / "b.npz", images=COLOUR)
    monkeypatch.setattr(arrays, "MOST_UNPACKED", COLOUR.nbytes - 1)
    with pytest.raises(DataError, match=r"720 bytes, and at most 719 are kept .* numpy.savez"):
        list_source(tmp_path)
    (tmp_path / "a.npz").unlink()
    assert len(list_source(tmp_path).entries) == 5


def test_npz_that_is_cut_off_or_gone_is_an_error_that_names_the_image(tmp_path):
    np.savez(tmp_path / "a.npz", images=COLOUR)
    found = list_source(tmp_path)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    with pytest.raises(DataError, match=r"^a.npz/0000001: .*cannot be read"):
        read_entry(tmp_path, found.entries[1], None)


# -------------------------------------------------------------------------------------------- CIFAR
def write_cifar(root, hundred=False, named=True):
    """As the authors publish it, with four images a file. Returns pixels and labels by file."""
    root.mkdir(exist_ok=True)
    files = (
        ["train.bin", "test.bin"]
        if hundred
        else ["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"]
    )
    classes, made = 100 if hundred else 10, {}
    for i, name in enumerate(files):
        pixels = images(4, 32, 32, seed=i)
        labels = (np.arange(4) * 7 + i) % classes
        coarse = [np.full((4, 1), 5)] if hundred else []
        planes = pixels.transpose(0, 3, 1, 2).reshape(4, -1)
        np.concatenate([*coarse, labels[:, None], planes], 1).astype(np.uint8).tofile(root / name)
        made[name] = pixels, labels.tolist()
    if named:
        name = "fine_label_names.txt" if hundred else "batches.meta.txt"
        (root / name).write_text("".join(f"c{i}\n" for i in range(classes)) + "\n")
        if hundred:
            (root / "coarse_label_names.txt").write_text("a\nb\n")
    (root / "readme.html").write_text("<html>")
    return made


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_cifar_as_it_is_published(tmp_path, hundred, named):
    made = write_cifar(tmp_path, hundred, named)
    found = list_source(tmp_path)
    training = [name for name in made if not name.startswith("test")]
    assert [e.name for e in found.entries] == [f"{n}/{i:05d}" for n in training for i in range(4)]
    assert [e.label for e in found.entries] == [x for n in training for x in made[n][1]]
    letter = "c" if named else ""
    assert found.class_names == tuple(f"{letter}{i}" for i in range(100 if hundred else 10))
    pixels = np.concatenate([made[name][0] for name in training])
    for entry, expected in zip(found.entries, pixels):
        assert np.array_equal(read_entry(tmp_path, entry, None), expected)
    test = next(name for name in made if name.startswith("test"))
    set_name = "CIFAR-100" if hundred else "CIFAR-10"
    assert (test, f"the test set of {set_name}; give the file to read it") in found.ignored

    single = list_source(tmp_path / test)
    assert [e.label for e in single.entries] == made[test][1]
    assert np.array_equal(read_entry(tmp_path, single.entries[3], None), made[test][0][3])


def test_damaged_cifar_is_one_line(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "batches.meta.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"batches.meta.txt: holds 1 names, not 10 different ones"):
        list_source(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(b"\x0a" * 3073)
    with pytest.raises(DataError, match="holds the label 10, but CIFAR-10 has 10 classes"):
        list_source(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(5000))
    with pytest.raises(DataError, match="5000 bytes are no records of 3073; it is cut off"):
        list_source(tmp_path)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_python_version_of_cifar_is_never_loaded(tmp_path):
    for name in ("data_batch_1", "data_batch_2", "test_batch", "batches.meta"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(
        DataError, match=r"no images in .* 4 files \(CIFAR's Python version is pickles"
    ):
        list_source(tmp_path)


# ----------------------------------------------------------------------------------------- commands
def test_train_and_encode_take_arrays(tmp_path):
    made = write_cifar(tmp_path / "cifar-10-batches-bin")
    pixels = np.concatenate([made[f"data_batch_{i}.bin"][0] for i in (1, 2)])
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.arange(8) % 2)
    x, labels = ImageFolder(tmp_path / "set.npz", (32, 32), 3).read([5, 2], [None, None])
    assert np.array_equal(((x + 1) * 127.5).round().permute(0, 2, 3, 1).numpy(), pixels[[5, 2]])
    assert labels.tolist() == [1, 0]

    for name, classes in (("cifar-10-batches-bin", 10), ("set.npz", 2)):
        result = run(
            "train", "--data", tmp_path / name, "--out", tmp_path / f"run-{classes}", *SETTINGS
        )
        assert result.exit_code == 0, result.output
        assert f"data.resolution=32, data.channels=3, model.num_classes={classes};" in result.stderr
        assert len(runs.read_config(tmp_path / f"run-{classes}", "x").data.class_names) == classes

    options = ("--vae", save_vae(tmp_path / "vae"), "--resolution", 16, "--workers", 1)
    result = run("encode", tmp_path / "set.npz", tmp_path / "store", *options)
    assert result.exit_code == 0, result.output
    assert "8 images of 2 classes" in result.stderr
    named = (tmp_path / "cifar-10-batches-bin", tmp_path / "s", *options, "--columns", "image=a")
    assert "the columns a are named, but" in line_of(run("encode", *named))
