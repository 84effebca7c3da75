"""Parquet shards as the hub stores image sets: the same images and labels as folders, and one line
for each fault.
"""

import json
import os
import sys

import numpy as np
import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.data import parquet, text
from diffussm_cli.data.captions import read_captions
from diffussm_cli.data.folder import ImageFolder
from diffussm_cli.data.latents.encoding import encode_images
from diffussm_cli.data.latents.reading import LatentStore
from diffussm_cli.data.listing import list_source, read_entry
from diffussm_cli.data.opening import open_source
from diffussm_cli.errors import DataError
from diffussm_cli.events import finish
from tests.conftest import Letters, save_vae
from tests.data.test_latents import make_encoder, make_source, write_store

pa = pytest.importorskip("pyarrow", reason="needs the extra parquet")
pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")

HUB = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def write(
    path, images, labels=None, features=HUB, image="image", label="label", raw=False, group=2
):
    """A shard; `images` are bytes or None."""
    columns = {image: images if raw else [{"bytes": b, "path": "a.png"} for b in images]}
    columns |= {label: labels} if labels is not None else {}
    metadata = (
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        if features
        else None
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=group)


@pytest.fixture
def both(tmp_path):
    """The same images as class folders and as two shards of the split train."""
    folder = make_source(tmp_path / "folders" / "images")
    entries = list_source(folder).entries
    content, labels = [(folder / e.name).read_bytes() for e in entries], [e.label for e in entries]
    shards = tmp_path / "shards" / "images"
    write(shards / "train-00000-of-00002.parquet", content[:7], labels[:7])
    write(shards / "train-00001-of-00002.parquet", content[7:], labels[7:])
    return folder, shards


def test_store_from_shards_equals_store_from_folders(both):
    folder, shards = both
    stores = []
    for root in (folder.parent, shards.parent):
        save_vae(root / "vae")
        stores.append(write_store(make_encoder(root)))
    names = sorted(p.name for p in stores[0].glob("shard-*.safetensors"))
    assert len(names) == 3
    for name in names:
        assert (stores[0] / name).read_bytes() == (stores[1] / name).read_bytes()
    (skipped,) = json.loads((stores[1] / "shard-00001.json").read_text())["skipped"]
    assert (skipped["index"], skipped["file"]) == (5, "train-00000-of-00002.parquet/0000005")
    assert skipped["reason"] == "not a PNG, JPEG, WEBP, BMP, GIF, TIFF image"


def test_training_reads_the_same_images_in_any_order(both):
    ours, theirs = (ImageFolder(root, (16, 24), 3) for root in reversed(both))
    assert ours.class_names == theirs.class_names == ("cat", "dog")
    indices = [10, 0, 7, 3, 6, 9, 1, 8, 2]
    generators = [torch.Generator() for _ in indices]
    for a, b in zip(ours.read(indices, generators), theirs.read(indices, generators)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_rows_are_checked_and_skipped_as_files(both):
    source = open_source(
        load_config(
            "digits",
            [
                f"data.path={both[1]}",
                "data.channels=3",
                "data.resolution=16",
                "model.num_classes=2",
            ],
        )
    )
    reasons = {i: why for _, found in source.check(range(len(source))) for i, why in found.items()}
    assert reasons == {5: "not a PNG, JPEG, WEBP, BMP, GIF, TIFF image"}
    source.leave_out({5: "train-00000-of-00002.parquet/0000005"})
    assert len(source) == 10


def test_split_is_chosen_by_pattern(both):
    _, shards = both
    write(shards / "test-00000-of-00001.parquet", [b"x"], [-1])
    with pytest.raises(
        DataError, match=r"^SOURCE: the shards are of test, train; choose one: 'train-\*.parquet'$"
    ):
        list_source(shards)
    assert len(list_source(shards / "train-*.parquet").entries) == 11
    assert len(list_source(shards / "train-00001-of-00002.parquet").entries) == 4
    with pytest.raises(DataError, match="no images in .*/dev-.*parquet"):
        list_source(shards / "dev-*.parquet")


def test_changed_shard_is_another_source(both):
    before = list_source(both[1]).sha256()
    assert list_source(both[1]).sha256() == before
    read_entry(both[1], list_source(both[1]).entries[7], None)  # its row group is kept
    path = both[1] / "train-00001-of-00002.parquet"
    write(path, [b"other"] * 4, [1] * 4)
    assert list_source(both[1]).sha256() != before
    with pytest.raises(DataError, match="0000000: not a PNG"):
        read_entry(both[1], list_source(both[1]).entries[7], None)


def test_raw_bytes_and_integer_classes_are_read_under_other_names(both, tmp_path):
    content = [(both[0] / "cat" / "00.png").read_bytes()] * 3
    options = {"features": None, "image": "img", "label": "labels", "raw": True}
    write(tmp_path / "raw" / "a.parquet", content, [2, 0, 1], **options)
    (tmp_path / "raw" / "README.md").write_text("words")
    found = list_source(tmp_path / "raw")
    assert found.class_names == ("0", "1", "2")
    assert [e.label for e in found.entries] == [2, 0, 1]
    assert found.ignored == [("README.md", "a file next to parquet shards")]
    assert read_entry(found.root, found.entries[2], (8, 8)).shape == (8, 8, 3)
    write(tmp_path / "flat.parquet", content, features=None)
    assert list_source(tmp_path / "flat.parquet").class_names == ()


def test_row_group_is_decoded_once_for_all_threads(both, monkeypatch):
    decoded, original = [], pq.ParquetFile.iter_batches

    def counted(self, size, groups, columns):
        decoded.extend(groups)
        return original(self, size, groups, columns)

    source = ImageFolder(both[1], (16, 24), 3)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    source.read(range(5), [torch.Generator() for _ in range(5)])
    assert decoded == [0, 1, 2]


FAULTS = {
    "has label 2, which must be a number from 0 to 1": {"labels": [0, 2]},
    "has label -1, which must be a number of at least 0": {"labels": [0, -1], "features": None},
    "has label None, which must be a number from 0 to 1": {"labels": [0, None]},
    "row 1 has label None, which must be a name of at most 255 characters": {"labels": ["a", None]},
    "which must be a name of at most 255 characters": {"labels": ["a", "x" * 300]},
    "none of its columns is image, img, jpg, png: picture, label; name one by image=": {
        "labels": [0, 1],
        "image": "picture",
    },
}


@pytest.mark.parametrize("line", FAULTS)
def test_bad_shard_is_one_line_error(tmp_path, line):
    write(tmp_path / "a.parquet", [b"x", b"y"], **FAULTS[line])
    with pytest.raises(DataError, match="^SOURCE: a.parquet: ") as error:
        list_source(tmp_path)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def named(both):
    """One shard whose columns have names of their own; the title of the second image is a list."""
    content = [(both[0] / name).read_bytes() for name in ("cat/00.png", "dog/07.png")]
    table = pa.table(
        {"photo": content, "breed": [1, 0], "title": [["a dog"], ["cats", "two cats"]]}
    )
    folder = both[0].parent / "named"
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet", row_group_size=1)
    return folder


COLUMNS = {"image": "photo", "label": "breed", "text": "title"}


def test_named_columns_are_read(named, both):
    found = list_source(named, columns=COLUMNS)
    assert ([e.label for e in found.entries], found.class_names) == ([1, 0], ("0", "1"))
    dog = next(e for e in list_source(both[0]).entries if e.name == "dog/07.png")
    np.testing.assert_array_equal(
        read_entry(named, found.entries[1], None), read_entry(both[0], dog, None)
    )
    with pytest.raises(
        DataError, match=r"columns photo are named, but .* holds no parquet shards or \.npz files$"
    ):
        list_source(both[0], columns={"image": "photo"})


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (
            {"image": "pixels"},
            "none of its columns is pixels: photo, breed, title; name one by image=NAME",
        ),
        (
            {"image": "photo", "label": "title"},
            "none of its columns is title with integers or names: photo, breed, title; name",
        ),
    ],
)
def test_missing_column_is_one_line_error(named, columns, line):
    with pytest.raises(DataError, match="^data.path: a.parquet: ") as error:
        list_source(named, "data.path", columns)
    assert line in str(error.value)


def test_captions_come_from_column(named):
    texts = {"a.parquet/0000000": ("a dog",), "a.parquet/0000001": ("cats", "two cats")}
    assert read_captions(list_source(named, columns=COLUMNS)) == texts
    columns = {"image": "photo", "label": "breed"}
    with pytest.raises(
        DataError,
        match="^data.text: a.parquet: none of its columns is text, caption, captions: photo",
    ):
        read_captions(list_source(named, columns=columns))
    with pytest.raises(
        DataError, match="^data.text: a.parquet/0000000: a caption must be text, not 1$"
    ):
        read_captions(list_source(named, columns=columns | {"text": "breed"}))


def test_unneeded_captions_may_be_missing(named):
    """As for a reference; a column that is named is wanted all the same."""
    columns = {kind: COLUMNS[kind] for kind in ("image", "label")}
    assert read_captions(list_source(named, columns=columns), needed=False) == {}
    with pytest.raises(DataError, match="none of its columns is texts"):
        read_captions(list_source(named, columns=columns | {"text": "texts"}), needed=False)


def test_training_reads_the_text_of_named_columns(named, monkeypatch):
    monkeypatch.setattr(text, "open_encoder", lambda name: Letters())
    settings = ["model.num_classes=2", "model.text_width=4", "data.text=letters", "data.channels=3"]
    columns = "data.columns=image=photo,label=breed,text=title"
    config = load_config("digits", [f"data.path={named}", "data.resolution=16", *settings, columns])
    vectors = open_source(config).text([0], [torch.Generator()])
    torch.testing.assert_close(vectors, text.Texts(Letters(), config.model)(["a dog"]))


def test_store_keeps_the_columns_it_was_made_from(named):
    store, vae = named.parent / "store", save_vae(named.parent / "vae")
    columns = ["image=photo", "label=breed"]

    def encode(asked):
        return finish(
            encode_images(named, store, (16, 16), str(vae), workers=0, columns=asked, flip=False)
        )

    assert encode(columns).settings.columns == tuple(columns)
    with pytest.raises(DataError, match="^SOURCE: a.parquet: none of its columns is image"):
        encode([])
    with pytest.raises(
        DataError,
        match=r"columns was \('image=photo', 'label=breed'\) and is now \('label=breed', ",
    ):
        encode(columns[::-1])
    shard = store / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    encode(columns)
    assert shard.read_bytes() == whole


def test_broken_shard_is_one_line_error(both):
    path = both[1] / "train-00001-of-00002.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(
        DataError, match="^SOURCE: train-00001-of-00002.parquet: not a readable parquet file: "
    ) as error:
        list_source(both[1])
    assert "\n" not in str(error.value)
    # the header of the first images; labels and footer are whole
    path.write_bytes(whole[:4] + bytes(60) + whole[64:])
    found = list_source(both[1])
    with pytest.raises(DataError, match="^train-00001-of-00002.parquet/0000000: "):
        read_entry(both[1], found.entries[7], None)


def test_null_and_absent_images_are_named(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array(
        [{"bytes": None, "path": "cat/a.png"}, {"bytes": None, "path": None}, None], kind
    )
    write(tmp_path / "a.parquet", images, features=None, raw=True)
    found = list_source(tmp_path / "a.parquet")
    stored = (
        "the image is stored as a path, 'cat/a.png'; save the data set with the images embedded "
        "as bytes"
    )
    for row, line in enumerate((stored, "the image is null", "the image is null")):
        with pytest.raises(DataError, match=f"^a.parquet/000000{row}: {line}$"):
            read_entry(tmp_path, found.entries[row], None)


@pytest.mark.parametrize(
    ("images", "kind"),
    [
        (["cat/a.png"], "string"),
        ([[1, 2, 3]], "list<"),
        ([[[1.0, 2.0]]], "list<"),
        ([{"path": "a.png"}], "struct<path: string>"),
        ([{"bytes": "text", "path": "a.png"}], "struct<bytes: string, path: string>"),
        ([7], "int64"),
    ],
)
def test_images_of_another_type_are_rejected_when_listed(tmp_path, images, kind):
    write(tmp_path / "a.parquet", images, features=None, raw=True)
    line = (
        f"^SOURCE: a.parquet: the column image holds {kind}.*, not image files as bytes; save "
        "the data set with"
    )
    with pytest.raises(DataError, match=line):
        list_source(tmp_path / "a.parquet")


def test_column_with_bytes_is_taken_before_one_with_paths(tmp_path):
    pq.write_table(pa.table({"image": ["a.png"], "jpg": [b"content"]}), tmp_path / "a.parquet")
    assert list_source(tmp_path).entries[0].column == "jpg"


@pytest.mark.parametrize(
    "stored", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_labels_of_text_are_classes_sorted_by_name(tmp_path, stored):
    """Over all shards, of which none holds every name."""
    write(
        tmp_path / "0.parquet",
        [b"x"] * 3,
        pa.array(["dog", "ant", "dog"]).cast(stored),
        features=None,
    )
    write(tmp_path / "1.parquet", [b"x"] * 2, pa.array(["cat", "ant"]).cast(stored), features=None)
    found = list_source(tmp_path)
    assert found.class_names == ("ant", "cat", "dog")
    assert [e.label for e in found.entries] == [2, 0, 2, 1, 0]


def test_integers_are_taken_before_text(tmp_path):
    table = {"image": [b"x"] * 2, "label": ["a", "b"], "cls": [3, 0]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert [e.label for e in list_source(tmp_path).entries] == [3, 0]
    assert list_source(tmp_path, columns={"label": "label"}).class_names == ("a", "b")


def test_numbers_as_names_in_the_schema_become_text(both):
    features = HUB | {"label": {"names": [7, 8], "_type": "ClassLabel"}}
    for path in sorted(both[1].iterdir()):
        table = pq.read_table(path)
        metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)
    assert list_source(both[1]).class_names == ("7", "8")
    save_vae(both[1].parent / "vae")
    assert LatentStore(write_store(make_encoder(both[1].parent)), flip=True).class_names == (
        "7",
        "8",
    )


def not_utf8(values):
    return pa.array(values, pa.binary()).view(pa.string())


def test_text_that_is_not_utf8_is_counted(tmp_path):
    captions = not_utf8([b"ok", b"\xff", b"caf\xe9", None, b"ok"])
    pq.write_table(
        pa.table({"image": [b"x"] * 5, "text": captions}), tmp_path / "a.parquet", row_group_size=2
    )
    with pytest.raises(
        DataError, match="^data.text: a.parquet: 2 of 5 rows of text are not UTF-8, such as row 1$"
    ):
        read_captions(list_source(tmp_path))
    write(tmp_path / "b" / "b.parquet", [b"x"] * 2, not_utf8([b"ok", b"\xff"]), features=None)
    with pytest.raises(
        DataError, match="^SOURCE: b.parquet: 1 of 2 rows of label are not UTF-8, such as row 1$"
    ):
        list_source(tmp_path / "b")


def test_compressed_bomb_is_rejected_before_it_unfolds(tmp_path, monkeypatch):
    """Dictionary and compression make a shard of a few bytes from a gigabyte; here from 16 MiB."""
    images = pa.array([bytes(1 << 16)] * 256)
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", compression="zstd")
    found = list_source(tmp_path)
    assert (tmp_path / "a.parquet").stat().st_size < 2000
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1 << 23)
    with pytest.raises(DataError, match="row group 0 is larger than the limit of 8388608 bytes"):
        read_entry(tmp_path, found.entries[0], None)


def test_shard_with_more_rows_than_bytes_is_rejected(tmp_path):
    pq.write_table(
        pa.table({"image": pa.nulls(100_000, pa.binary())}),
        tmp_path / "a.parquet",
        compression="zstd",
    )
    with pytest.raises(
        DataError, match=r"a.parquet: 100000 rows in \d+ bytes cannot be images of their own"
    ):
        list_source(tmp_path)


def test_pipe_is_rejected_without_opening(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet.*not a regular file"):
        list_source(tmp_path / "a.parquet")


def test_shards_of_two_data_sets_are_rejected(both):
    write(both[1] / "more.parquet", [b"x"], [0], features=None)
    with pytest.raises(DataError, match="have different classes; take those of one data set$"):
        list_source(both[1])


def test_huge_row_group_is_rejected(both, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(DataError, match="row group 0 is larger than the limit of 100 bytes"):
        read_entry(both[1], list_source(both[1]).entries[0], None)


def test_missing_pyarrow_names_the_extra(both, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        DataError, match=r"^SOURCE: parquet shards need pyarrow: pip install '\.\[parquet\]' "
    ):
        list_source(both[1])


def test_pixels_equal_those_of_the_file(both):
    found = list_source(both[1])
    ours = read_entry(both[1], found.entries[8], None)
    theirs = read_entry(both[0], list_source(both[0]).entries[8], None)
    np.testing.assert_array_equal(ours, theirs)
