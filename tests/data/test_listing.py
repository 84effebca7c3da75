"""What a source holds, in which order, and what becomes of files that are no images."""

import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffussm_cli.data import images, listing
from diffussm_cli.data.images import read_image
from diffussm_cli.data.listing import list_source, read_entry
from diffussm_cli.errors import DataError


def picture(width=8, height=8, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def content(format="PNG", **options):
    file = io.BytesIO()
    picture().save(file, format, **options)
    return file.getvalue()


def write(root, **files):
    """Files by name; None is a small picture."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content() if data is None else data)
    return root


def names(found):
    return [e.name for e in found.entries]


def test_class_folders_are_listed_in_order_with_reasons_for_the_rest(tmp_path):
    write(tmp_path, **dict.fromkeys(["b/2.png", "a/1.JPG", "b/c/1.png", "b-/1.png", "stray.png"]))
    write(tmp_path, **{"a/notes.txt": b"text", "a/.hidden.png": b"", "b/photo": content("JPEG")})
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path)
    found = list_source(tmp_path)
    assert names(found) == ["a/1.JPG", "b/2.png", "b/c/1.png", "b/photo", "b-/1.png"]
    assert found.class_names == ("a", "b", "b-")
    assert [e.label for e in found.entries] == [0, 1, 1, 1, 2]
    assert found.entries[1].size == len(content())
    assert dict(found.ignored) == {
        "a/notes.txt": "not an image by its name or first bytes",
        "a/.hidden.png": "a hidden file",
        "b/link": "a link to a folder, not followed",
        "c": "a link to a folder that contains it",
        "stray.png": "not in a class folder",
    }


def test_flat_folder_is_listed_without_labels(tmp_path):
    found = list_source(write(tmp_path, **{"2.png": None, "10.png": None, "x.md": b""}))
    assert (names(found), found.class_names) == (["10.png", "2.png"], ())
    assert found.ignored == [("x.md", "not an image by its name or first bytes")]


def test_hash_follows_names_labels_and_sizes(tmp_path):
    write(tmp_path, **{"a/1.png": None, "b/2.png": None})
    first = list_source(tmp_path).sha256()
    assert list_source(tmp_path).sha256() == first
    (tmp_path / "a" / "1.png").write_bytes(content() + b"\0")
    longer = list_source(tmp_path).sha256()
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "3.png")
    assert len({first, longer, list_source(tmp_path).sha256()}) == 3


def write_tar(path, members, **special):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in special.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    return path


def test_tar_shards_are_read_in_place(tmp_path):
    jpg = content("JPEG")
    first = {
        "x/1.png": content(),
        "x/1.cls": b"2\n",
        "x/1.json": b"{}",
        "2.jpg": jpg,
        "2.cls": b"0",
        "2.txt": b"",
    }
    write_tar(
        tmp_path / "1.tar",
        {"3.webp": content("WEBP"), "3.cls": b"1", "3.seg.png": content()},
        link="/etc/passwd",
    )
    write_tar(tmp_path / "0.tar", first)
    found = list_source(write(tmp_path, **{"readme": b""}))
    assert names(found) == ["0.tar/x/1.png", "0.tar/2.jpg", "1.tar/3.webp"]
    assert ([e.label for e in found.entries], found.class_names) == ([2, 0, 1], ("0", "1", "2"))
    assert dict(found.ignored) == {
        "readme": "a file next to tar shards",
        "1.tar/3.seg.png": "not an image by its name",
        "1.tar/link": "a link, device or sparse file in an archive",
    }
    for entry, data in zip(found.entries, (content(), jpg, content("WEBP"))):
        expected = read_image(tmp_path, (8, 8), 3, io.BytesIO(data))
        assert np.array_equal(read_entry(found.root, entry, (8, 8)), expected)
    single = list_source(tmp_path / "1.tar")
    assert (names(single), single.class_names) == (["1.tar/3.webp"], ("0", "1"))


IN_FOLDERS = {  # members of two shards; classes; labels
    "class folders": (
        ["cat/1.png", "dog/1.png"],
        ["dog/2.png", "ant/1.png"],
        "ant cat dog",
        "1220",
    ),
    "below the folder that was packed": (
        ["./x/b/1.png"],
        ["./x/a/1.png", "x/a/c/2.png"],
        "a b",
        "100",
    ),
    "one folder": (["faces/1.png"], ["faces/2.png"], "", "00"),
    "one split": (["train/a/1.png"], ["train/b/1.png"], "a b", "01"),
    "classes beside files of other kinds": (
        ["b/1.png", "readme"],
        ["a/1.png", "a.csv"],
        "a b",
        "10",
    ),
}


@pytest.mark.parametrize("case", IN_FOLDERS)
def test_class_folders_in_tar_shards_are_classes(tmp_path, case):
    *shards, classes, labels = IN_FOLDERS[case]
    for i, members in enumerate(shards):
        write_tar(tmp_path / f"{i}.tar", dict.fromkeys(members, content()))
    found = list_source(tmp_path)
    assert names(found) == [
        f"{i}.tar/{m}" for i, members in enumerate(shards) for m in members if m.endswith(".png")
    ]
    assert found.class_names == tuple(classes.split())
    assert [e.label for e in found.entries] == list(map(int, labels))


def test_damaged_tar_keeps_images_before_the_damage(tmp_path):
    whole = write_tar(tmp_path / "0.tar", {"1.png": content(), "2.png": bytes(5000)}).read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:3000])
    (tmp_path / "1.tar").write_bytes(b"no tar at all" * 100)
    found = list_source(tmp_path)
    assert "0.tar/1.png" in names(found)
    assert [name for name, _ in found.ignored] == ["0.tar", "1.tar"]
    assert all(
        reason.startswith("damaged from here on, or not an uncompressed tar")
        for _, reason in found.ignored
    )


def test_wrong_labels_in_tar_are_rejected(tmp_path):
    write_tar(tmp_path / "0.tar", {"1.png": content(), "1.cls": b"cat"})
    with pytest.raises(
        DataError, match=r"0.tar/1.cls must hold an integer from 0 to .*, not b'cat'"
    ):
        list_source(tmp_path)
    write_tar(tmp_path / "0.tar", {"1.png": content(), "1.cls": b"1" * 30})
    with pytest.raises(DataError, match=r"must hold an integer"):
        list_source(tmp_path)
    write_tar(tmp_path / "0.tar", {"1.png": content(), "1.cls": b"1", "2.png": content()})
    with pytest.raises(DataError, match=r"0.tar/2.png has no .cls file, but other images have one"):
        list_source(tmp_path)


def test_source_without_images_is_one_line_error(tmp_path):
    with pytest.raises(DataError, match="SOURCE: cannot read the folder .*none.*No such file"):
        list_source(tmp_path / "none")
    with pytest.raises(DataError, match="SOURCE: no images in"):
        list_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="SOURCE: the class folder .*empty.* holds no image"):
        list_source(tmp_path)


def test_unreadable_folder_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    write(tmp_path, **{"a/1.png": None, "a/sub/2.png": None, "b/1.png": None})
    scandir = os.scandir

    def forbid(path):
        if os.path.basename(path) in forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    forbidden = ["sub"]
    assert ("a/sub", "cannot be read: Permission denied") in list_source(tmp_path).ignored
    forbidden = ["b"]
    with pytest.raises(
        DataError, match=r"SOURCE: the class folder '.*b' cannot be read: Permission denied"
    ):
        list_source(tmp_path)


def test_broken_file_gets_reason_and_no_warning(tmp_path, monkeypatch):
    jpg = io.BytesIO()
    picture(64, 64).save(jpg, "JPEG")
    files = {
        "cut.jpg": jpg.getvalue()[:500],
        "text.png": b"text",
        "zero.png": b"",
        "good.png": None,
    }
    write(tmp_path, **files)
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    found = list_source(tmp_path)
    assert names(found) == sorted([*files, "loop.png", "gone.png", "huge.png"])
    assert found.ignored == [("pipe.png", "not a regular file")]
    reasons = {}
    for entry in [*found.entries, listing.Entry("pipe.png", 0, 1)]:  # it may become a pipe later
        try:
            assert read_entry(tmp_path, entry, (8, 8)).shape == (8, 8, 3)
        except DataError as e:
            name, _, reasons[entry.name] = str(e).partition(": ")
            assert name == entry.name
    assert reasons == {
        "cut.jpg": "cannot be decoded: Truncated File Read",
        "text.png": "not a PNG, JPEG, WEBP, BMP, GIF, TIFF image",
        "zero.png": "the file is empty",
        "loop.png": "cannot be read: Too many levels of symbolic links",
        "gone.png": "cannot be read: No such file or directory",
        "pipe.png": "cannot be read: not a regular file",
        "huge.png": f"10000x10000 pixels, more than the limit of {images.MAX_PIXELS}",
    }
    monkeypatch.setattr(listing.entries, "MAX_FILE_BYTES", 10)
    with pytest.raises(
        DataError, match=f"good.png: {len(content())} bytes, more than the limit of 10"
    ):
        read_entry(tmp_path, next(e for e in found.entries if e.name == "good.png"), (8, 8))


# --------------------------------------------------------------------------------- what is not used
def shard(**members):
    """The content of a tar file; None is a small picture."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            data = content() if data is None else data
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def film(kind):
    """A file of three frames or pages."""
    file = io.BytesIO()
    frames = [Image.new("L", (8, 8), value) for value in (0, 99, 200)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


CAPTION = "captions, which only a run with text reads: data.text, or --text of encode"
SIDECAR = (
    "beside an image, and not read: captions stand in NAME.txt, metadata.jsonl or metadata.csv"
)
NOT_READ = (
    "labels or captions that are not read: classes are folders, or stand beside captions in "
    "metadata.jsonl or metadata.csv"
)
OURS = "beside samples of diffussm, and none of them"
META = json.dumps({"weights_sha256": "ab", "first_seed": 0, "pixel_rule": ""}).encode()
FIELDS = "of metadata files, only file_name, captions and label are read"
PER_CLASS = "no class; unpack each shard into a folder of its name, or add KEY.cls"
PACKED = "a compressed archive, which is not read; unpack it first"
LEFT_OUT = {  # files; how many images are used; what is left out
    "images beside class folders": (
        {"a/1.png": None, "2.png": None, "3.png": None, "x.tar": b""},
        1,
        [
            (2, "image", "not in a class folder", "2.png"),
            (1, "shard", "not in a class folder", "x.tar"),
        ],
    ),
    "images beside a shard": (
        {"0.tar": shard(**{"1.png": None}), "2.png": None, "3.png": None},
        1,
        [(2, "image", "a file next to tar shards", "2.png")],
    ),
    "frames and pages": (
        {
            "a.gif": film("GIF"),
            "b.TIFF": film("TIFF"),
            "c.webp": film("WEBP"),
            "d.gif": content("GIF"),
        },
        4,
        [(3, "film", "all frames or pages but the first", "a.gif")],
    ),
    "frames in a shard, and a damaged file": (
        {"0.tar": shard(**{"a.gif": film("GIF"), "b.gif": b"GIF8"})},
        2,
        [(1, "film", "all frames or pages but the first", "0.tar/a.gif")],
    ),
    "labels of no image in shards": (
        {"0.tar": shard(**{"1.png": None, "1.cls": b"0", "2.cls": b"1", "3.cls": b"1"})},
        1,
        [(2, "label", "of shards, of no image", "0.tar/2.cls")],
    ),
    "images beside class folders in a shard": (
        {"0.tar": shard(**{"1.png": None, "2.png": None, "a/3.png": None})},
        3,
        [(1, "folder", "no class, as 2 images lie in none", "a")],
    ),
    "captions as other tools write them": (
        {
            "1.png": None,
            "1.json": b"{}",
            "2.png": None,
            "2.caption": b"",
            "1.txt": b"",
            "3.json": b"",
        },
        2,
        [
            (2, "file", SIDECAR, "1.json"),
            (1, "file", "not an image by its name or first bytes", "3.json"),
            (1, "file", CAPTION, ""),
        ],
    ),
    "images beside folders without any": (
        {"1.png": None, "2.png": None, "notes/a.md": b""},
        2,
        [
            (1, "file", "not an image by its name or first bytes", "notes/a.md"),
            (1, "file", "a folder without images", "notes"),
        ],
    ),
    "folders that systems make": (
        {"a/1.png": None, "a/@eaDir/1.png": None, "__MACOSX/a/._1.png": None, "@eaDir/1.png": None},
        1,
        [(3, "file", "a folder that the system made", "@eaDir")],
    ),
    "other forms of labels": (
        {"a/1.png": None, "dataset.json": b"{}", "a/labels.csv": b""},
        1,
        [(2, "file", NOT_READ, "a/labels.csv")],
    ),
    "a table of captions in parquet": (
        {"1.png": None, "metadata.parquet": b""},
        1,
        [(1, "shard", NOT_READ, "metadata.parquet")],
    ),
    "archives": (
        {"1.png": None, "a.zip": b"", "b.tar.gz": b"", "c.TGZ": b"", "x.npz": b""},
        1,
        [
            (3, "file", PACKED, "a.zip"),
            (
                1,
                "file",
                "arrays beside images or shards, which are read instead",
                "x.npz",
            ),
        ],
    ),
    "captions": (
        {
            "a/1.png": None,
            "a/1.txt": b"a cat",
            "a/2.txt": b"of no image",
            "metadata.jsonl": b"",
            "a/metadata.jsonl": b"",
        },
        1,
        [
            (1, "file", "not an image by its name or first bytes", "a/2.txt"),
            (3, "file", CAPTION, ""),
        ],
    ),
    "texts in shards": (
        {
            "0.tar": shard(
                **{
                    "1.png": None,
                    "1.txt": b"",
                    "1.json": b'{"label": 3}',
                    "2.json": b"",
                    "._1.png": b"",
                    "1.image.png": b"",
                }
            )
        },
        1,
        [
            (1, "image", "a hidden file", "0.tar/._1.png"),
            (1, "image", "not an image by its name", "0.tar/1.image.png"),
            (1, "file", CAPTION, ""),
            (2, "file", "of a .json file, only captions are read, by a run with text", ""),
        ],
    ),
    "samples with a grid and a film": (
        {"000000.png": None, "1000000.png": None, "grid.png": None, "my.png": None}
        | {"film.gif": content("GIF"), "meta.json": META, "samples.npz": b"", "x.json": b""},
        2,
        [
            (3, "image", OURS, "film.gif"),
            (2, "file", OURS, "meta.json"),
            (1, "file", "not an image by its name or first bytes", "x.json"),
        ],
    ),
    "samples of two classes": (
        {f"{name}/{file}": None for name in "ab" for file in ("000000.png", "grid.png")}
        | {"a/meta.json": META, "a/results.json": b""},
        2,
        [(2, "image", OURS, "a/grid.png"), (2, "file", OURS, "a/meta.json")],
    ),
    "samples that were moved": (
        {"000003.png": None, "000004.png": None, "grid.png": None},
        2,
        [(1, "image", OURS, "grid.png")],
    ),
    "samples in a shard": (
        {"0.tar": shard(**{"s/000000.png": None, "s/grid.png": None})},
        1,
        [(1, "image", OURS, "0.tar/s/grid.png")],
    ),
    "a meta.json of another program": (
        {"000000.png": None, "a.png": None, "grid.png": None, "meta.json": b'{"first_seed": 0}'},
        3,
        [(1, "file", "not an image by its name or first bytes", "meta.json")],
    ),
    "other fields of metadata": (
        {"1.png": None, "metadata.jsonl": b'{"file_name": "1.png", "text": "a", "boxes": []}\n'},
        1,
        [(1, "file", CAPTION, ""), (1, "file", f"{FIELDS}; not 'boxes'", "")],
    ),
    "labels by another name": (
        {"1.png": None, "metadata.csv": b"file_name,class,a,b,Label\n1.png,2,0,0,2\n"},
        1,
        [(1, "file", f"{FIELDS}; not 'Label', 'a', 'b' and 1 more", "")],
    ),
    "two files of metadata": (
        {
            "1.png": None,
            "metadata.jsonl": b'{"file_name": "1.png", "label": 3}\n',
            "metadata.csv": b"file_name,label\n1.png,2\n",
        },
        1,
        [(1, "file", "beside a metadata.jsonl, which is read instead", "metadata.csv")],
    ),
    "labels of no image": (
        {"1.png": None, "metadata.csv": b"file_name,label\n1.png,2\n2.png,0\n"},
        1,
        [(1, "label", "of metadata.csv, of no image in the source", "2.png")],
    ),
    "a shard for each class": (
        {f"{name}.tar": shard(**{"1.png": None}) for name in ("n01440764", "n01443537")},
        2,
        [(2, "shard name", PER_CLASS, "n01440764.tar")],
    ),
    "shards of two words": (
        {f"{name}.tar": shard(**{"1.png": None}) for name in ("cat-0", "cat-1", "dog-0")},
        3,
        [(3, "shard name", PER_CLASS, "cat-0.tar")],
    ),
    "a series of shards": (
        {f"n{i:05d}.tar": shard(**{f"{i}.png": None}) for i in range(2)},
        2,
        [],
    ),
    "shards in a shard": (
        {"0.tar": shard(**{"1.png": None, "n01440764.tar": b"", "n01443537.tar": b""})},
        1,
        [
            (
                2,
                "shard",
                "a shard in a shard, which is not read; unpack the outer one",
                "0.tar/n01440764.tar",
            )
        ],
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_unused_files_are_counted_with_reasons(tmp_path, case):
    files, used, expected = LEFT_OUT[case]
    found = list_source(write(tmp_path, **files))
    assert len(found.entries) == used
    assert found.left_out() == expected
    assert not [part for part in found.left_out(with_text=True) if part.reason == CAPTION]


def test_unused_files_are_reported_in_one_line():
    parts = [
        listing.LeftOut(60, "image", "not in a class folder", "0\n.png"),
        listing.LeftOut(1, "file", "a hidden file", ".x"),
    ]
    line = (
        "left out of 'faces': 60 images (not in a class folder, such as '0\\n.png'), 1 file (a "
        "hidden file: '.x')"
    )
    assert listing.left_out_line("faces", parts) == line
    assert listing.left_out_line("faces", []) == ""


def test_source_without_images_reports_its_content(tmp_path):
    write(tmp_path, **{"0.tar": shard(**{"1.image.png": None, "2.image.png": None})})
    with pytest.raises(
        DataError,
        match=(
            r"no images in .*; left out of .*: 2 images \(not an image by its name, such as "
            r"'0.tar/1.image"
        ),
    ):
        list_source(tmp_path)
    with pytest.raises(
        DataError,
        match=(
            r"no images in .*: 2 files \(a compressed archive, which is not read; unpack it "
            r"first, such"
        ),
    ):
        list_source(write(tmp_path / "packed", **{"0.tar.gz": b"", "1.tar.gz": b""}))


# ----------------------------------------------------------------------------------- what is listed
REFUSED = {  # files, what is given, the line
    "splits of tar shards": (
        {"train-0.tar": b"", "train-1.tar": b"", "val-0.tar": b""},
        "",
        "the shards are of train, validation; choose one: 'train-*.tar'",
    ),
    "splits in the middle of names": (
        {"in1k-test-00.parquet": b"", "in1k-validation-00.parquet": b""},
        "",
        "the shards are of test, validation; choose one: 'in1k-test-*.parquet'",
    ),
    "one shard for each split": (
        {"train.parquet": b"", "test.parquet": b""},
        "",
        "the shards are of test, train; choose one: 'train.parquet'",
    ),
    "some shards of a series": (
        {f"train-{i:05}-of-00009-{i}ab.parquet": b"" for i in (1, 8)},
        "",
        "of the 9 shards 'ROOT/train-*.parquet', 7 are missing: 00000, 00002, 00003, 00004, 00005 "
        "and 2 more; fetch what is missing, or choose the shards that are there by this pattern",
    ),
    "some shards of a series, below and from 1": (
        {f"data/train-{i}-of-3.tar": b"" for i in (1, 3)},
        "",
        "of the 3 shards 'ROOT/data/train-*.tar', 1 is missing: 2; fetch what",
    ),
    "splits below a pattern": (
        {"train-0.tar": b"", "val-0.tar": b""},
        "*-0.tar",
        "the shards are of train, validation",
    ),
    "split folders": (
        {"train/cat/1.png": None, "val/cat/1.png": None},
        "",
        "ROOT' holds the splits train, val of a data set, not classes; give one: 'ROOT/train'",
    ),
    "split folders beside others": (
        {"train2017/1.png": None, "val2017/1.png": None, "annotations/a.json": b"", "readme": b""},
        "",
        (
            "ROOT' holds the splits train2017, val2017 of a data set, not classes; give one: "
            "'ROOT/train2017'"
        ),
    ),
    "one split folder": (
        {"train/cat/1.png": None, "train/dog/1.png": None},
        "",
        "ROOT' holds only the split train of a data set, not classes; give one: 'ROOT/train'",
    ),
    "ImageNet of Kaggle": (
        {f"ILSVRC/Data/CLS-LOC/{name}/1.JPEG": None for name in ("train/n01440764", "val", "test")}
        | {"ILSVRC/Annotations/CLS-LOC/val/1.xml": b"", "LOC_synset_mapping.txt": b""},
        "",
        "ROOT/ILSVRC/Data/CLS-LOC' holds the splits test, train, val of a data set, not classes; "
        "give one: 'ROOT/ILSVRC/Data/CLS-LOC/train'",
    ),
    "splits within every class": (
        {
            f"{name}/{split}/1.png": None
            for name in ("bottle", "cable")
            for split in ("train", "test")
        },
        "",
        (
            "ROOT/bottle' holds the splits test, train of a data set, not classes, and other "
            "folders in it do too"
        ),
    ),
    "splits in shards": (
        {"0.tar": shard(**{"x/train/1.png": None}), "1.tar": shard(**{"x/val/1.png": None})},
        "",
        "ROOT/0.tar' holds the splits train, val of a data set, not classes; unpack the shards and "
        "give one of them",
    ),
    "shards in several folders": (
        {"a/0.tar": b"", "b/0.tar": b""},
        "",
        "ROOT' holds shards in 2 folders; give one of them: 'ROOT/a', 'ROOT/b'",
    ),
    "shards beside class folders": (
        {"a/1.png": None, "data/0.tar": b""},
        "",
        (
            "the class folder 'ROOT/data' holds no images, but shards; give this folder, or "
            "move it away: 'data/0.tar'"
        ),
    ),
    "an archive": (
        {"x.zip": b""},
        "x.zip",
        "ROOT/x.zip' is a compressed archive, which is not read; unpack it first: "
        "unzip -q ROOT/x.zip -d ROOT/x; give a",
    ),
    "a compressed shard": (
        {"x y.tar.gz": b""},
        "x y.tar.gz",
        "is a compressed archive, which is not read; unpack it first: gunzip -k 'ROOT/x y.tar.gz'",
    ),
    "an archive without a known command": (
        {"x.rar": b""},
        "x.rar",
        "is a compressed archive, which is not read; unpack it first; give a folder",
    ),
    "a folder of compressed shards": (
        {"0.tar.xz": b"", "1.tar.xz": b""},
        "",
        "such as '0.tar.xz'); unpack: unxz -k ROOT/0.tar.xz",
    ),
    "arrays": ({"x.h5": b""}, "x.h5", "is a format that is not read; save the images as files"),
    "an image": (
        {"x.png": None},
        "x.png",
        "ROOT/x.png' is a file; give a folder, or a .tar, .parquet or .npz file",
    ),
    "a pattern with two stars": ({"ab.txt": b""}, "x**b", "the pattern fits no name in 'ROOT'"),
    "a pattern that ends in two stars": (
        {"ab.txt": b""},
        "x/**.parquet",
        "cannot read the folder 'ROOT/x': No such file",
    ),
    "a pattern of folders": (
        {"a/0.tar": b""},
        "*/0.tar",
        "a pattern may stand in the last part of a path only",
    ),
    "a series in braces": (
        {"s-000.tar": b"", "s-001.tar": b""},
        "s-{000..001}.tar",
        "s-{000..001}.tar': No such file or directory; braces are not read, but a star is: "
        "'s-*.tar'",
    ),
    "keys that stand twice": (
        {"0.tar": shard(**{"1.png": None})[:1024] + shard(**{"1.png": None})},
        "",
        "0.tar/1.png stands twice in the archive; give every image a name of its own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_doubtful_source_is_one_line_error(tmp_path, case):
    files, given, line = REFUSED[case]
    write(tmp_path, **files)
    with pytest.raises(DataError, match=r"^data\.path: ") as refused:
        list_source(tmp_path / given, "data.path")
    assert line in str(refused.value).replace(str(tmp_path), "ROOT")
    assert "\n" not in str(refused.value)


LISTED = {  # files, what is given, names, classes
    "a pattern of tar shards": (
        {
            "train-0.tar": shard(**{"1.png": None}),
            "train-1.tar": shard(**{"2.png": None}),
            "val-0.tar": b"",
        },
        "train-*.tar",
        ["train-0.tar/1.png", "train-1.tar/2.png"],
        (),
    ),
    "a pattern of some shards of a series": (
        {f"train-{i}-of-3.tar": shard(**{f"{i}.png": None}) for i in (0, 2)},
        "train-*.tar",
        ["train-0-of-3.tar/0.png", "train-2-of-3.tar/2.png"],
        (),
    ),
    "all shards of a series from 1": (
        {f"train-{i}-of-2.tar": shard(**{f"{i}.png": None}) for i in (1, 2)},
        "",
        ["train-1-of-2.tar/1.png", "train-2-of-2.tar/2.png"],
        (),
    ),
    "a pattern of images": (
        {"a1.png": None, "a2.png": None, "b1.png": None},
        "a*",
        ["a1.png", "a2.png"],
        (),
    ),
    "a pattern of classes": (
        {"n1/1.png": None, "n2/1.png": None, "x/1.png": None},
        "n[12]",
        ["n1/1.png", "n2/1.png"],
        ("n1", "n2"),
    ),
    "a name with brackets": ({"a[1]/1.png": None}, "a[1]", ["1.png"], ()),
    "classes named as splits, among others": (
        {"bus/1.png": None, "car/1.png": None, "train/1.png": None},
        "",
        ["bus/1.png", "car/1.png", "train/1.png"],
        ("bus", "car", "train"),
    ),
    "shards in one folder below, as in a repository": (
        {"data/0.tar": shard(**{"1.png": None}), "README.md": b"", ".gitattributes": b""},
        "",
        ["data/0.tar/1.png"],
        (),
    ),
    "a shard in capitals": ({"X.TAR": shard(**{"1.png": None})}, "", ["X.TAR/1.png"], ()),
    "two images of one key": (
        {"0.tar": shard(**{"1.png": None, "1.jpg": None, "1.cls": b"\xef\xbb\xbf1"})},
        "",
        ["0.tar/1.png", "0.tar/1.jpg"],
        ("0", "1"),
    ),
}


@pytest.mark.parametrize("case", LISTED)
def test_every_supported_layout_is_listed(tmp_path, case):
    files, given, expected, classes = LISTED[case]
    found = list_source(write(tmp_path, **files) / given)
    assert (names(found), found.class_names) == (expected, classes)
    for entry in found.entries:
        assert read_entry(found.root, entry, (8, 8)).shape == (8, 8, 3)


@pytest.mark.parametrize("name", ["0.tar", "0.parquet", "0.png"])
def test_pipe_as_source_is_rejected_without_waiting(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"is not a regular file|is a file; give a folder"):
        list_source(tmp_path / name)
    with pytest.raises(DataError, match="SOURCE: .*not a regular file"):
        list_source(tmp_path)


# -------------------------------------------------------------------------------------- pixel kinds
def read(image, path, **options):
    image.save(path, **options)
    return read_image(path, (image.height, image.width), 3)


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_sixteen_bit_pixels_are_scaled(tmp_path, name):
    values = np.array([[0, 128, 129, 257], [32768, 40000, 65000, 65535]], np.uint16)
    pixels = read(Image.fromarray(values), tmp_path / name)
    assert pixels[..., 0].tolist() == [[0, 0, 1, 1], [128, 156, 253, 255]]


def test_wider_pixels_are_rejected(tmp_path):
    for values in (np.full((2, 2), 70_000, np.int32), np.zeros((2, 2), np.float32)):
        with pytest.raises(DataError, match="have no standard range"):
            read(Image.fromarray(values), tmp_path / "x.tiff")


def test_transparency_becomes_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
    assert read(Image.fromarray(rgba), tmp_path / "x.png").tolist() == [
        [[255] * 3, [255, 0, 0], [127] * 3]
    ]
    grey = Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8), "LA")
    assert read(grey, tmp_path / "y.png")[0, :, 0].tolist() == [255, 9]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("L").quantize(2)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    transparent = read(palette, tmp_path / "z.png", transparency=0)[0].tolist()
    assert [255, 255, 255] in transparent
    assert transparent != [[255] * 3] * 2


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    for name in ("x.gif", "x.png", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        red, _, blue = read_image(tmp_path / name, (4, 4), 3)[0, 0]
        assert red > 240
        assert blue < 20


def test_images_are_opened_only_to_tell_what_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "a.gif").write_bytes(film("GIF"))
    with monkeypatch.context() as without_pillow:
        without_pillow.setattr(Image, "open", None)
        listing = list_source(tmp_path)
    assert [(part.number, part.kind) for part in listing.left_out()] == [(1, "film")]


def test_of_very_many_films_some_are_looked_at(tmp_path, monkeypatch):
    for name in "abcd":
        (tmp_path / f"{name}.gif").write_bytes(film("GIF"))
    monkeypatch.setattr(listing.entries, "LOOKED_AT", 2)
    (part,) = list_source(tmp_path).left_out()
    assert part.number == 2
    assert part.reason.startswith("of 2 files that were looked at; all frames")


def test_cmyk_becomes_rgb(tmp_path):
    pixels = read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "x.tiff")
    assert pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("name", "mode", "program"),
    [
        ("my set.tar.gz", "w:gz", "gunzip"),
        ("my set.tgz", "w:gz", "gunzip"),
        ("my set.tar.bz2", "w:bz2", "bunzip2"),
        ("my set.tar.xz", "w:xz", "unxz"),
    ],
)
def test_compressed_tar_is_read_after_the_command_that_is_printed(tmp_path, name, mode, program):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    image = write(tmp_path, **{"1.png": None}) / "1.png"
    with tarfile.open(tmp_path / name, mode) as tar:
        tar.add(image, "1.png")
    with pytest.raises(DataError, match="unpack it first: ") as refused:
        list_source(tmp_path / name)
    command = re.search("unpack it first: (.*); give a folder", str(refused.value))[1]
    subprocess.run(shlex.split(command), check=True, timeout=30)
    listing = list_source(tmp_path / "my set.tar")
    assert np.array_equal(
        read_entry(tmp_path, listing.entries[0], None), np.asarray(Image.open(image))
    )
    assert (tmp_path / name).is_file()
