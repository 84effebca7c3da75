"""What a source holds, in which order, and what becomes of files that are no images."""

import errno
import io
import os
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


def test_class_folders_in_order_with_reasons_for_the_rest(tmp_path):
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


def test_flat_folder(tmp_path):
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


def test_tar_shards_read_where_they_lie(tmp_path):
    jpg = content("JPEG")
    first = {"x/1.png": content(), "x/1.cls": b"2\n", "x/1.json": b"{}", "2.jpg": jpg, "2.cls": b"0", "2.txt": b""}
    write_tar(
        tmp_path / "1.tar", {"3.webp": content("WEBP"), "3.cls": b"1", "3.seg.png": content()}, link="/etc/passwd"
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


def test_damaged_tar_keeps_what_came_before(tmp_path):
    whole = write_tar(tmp_path / "0.tar", {"1.png": content(), "2.png": bytes(5000)}).read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:3000])
    (tmp_path / "1.tar").write_bytes(b"no tar at all" * 100)
    found = list_source(tmp_path)
    assert "0.tar/1.png" in names(found)
    assert [name for name, _ in found.ignored] == ["0.tar", "1.tar"]
    assert all(reason.startswith("damaged from here on, or not an uncompressed tar") for _, reason in found.ignored)


def test_wrong_labels_in_tars(tmp_path):
    write_tar(tmp_path / "0.tar", {"1.png": content(), "1.cls": b"cat"})
    with pytest.raises(DataError, match=r"0.tar/1.cls must hold an integer from 0 to .*, not b'cat'"):
        list_source(tmp_path)
    write_tar(tmp_path / "0.tar", {"1.png": content(), "1.cls": b"1" * 30})
    with pytest.raises(DataError, match=r"must hold an integer"):
        list_source(tmp_path)
    write_tar(tmp_path / "0.tar", {"1.png": content(), "1.cls": b"1", "2.png": content()})
    with pytest.raises(DataError, match=r"0.tar/2.png has no .cls file, but other images have one"):
        list_source(tmp_path)


def test_sources_without_images(tmp_path):
    with pytest.raises(DataError, match="SOURCE: cannot read the folder .*none.*No such file"):
        list_source(tmp_path / "none")
    with pytest.raises(DataError, match="SOURCE: no images in"):
        list_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="SOURCE: the class folder .*empty.* holds no image"):
        list_source(tmp_path)


def test_a_folder_that_may_not_be_read_is_no_empty_folder(tmp_path, monkeypatch):
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
    with pytest.raises(DataError, match=r"SOURCE: the class folder '.*b' cannot be read: Permission denied"):
        list_source(tmp_path)


def test_broken_files_get_a_reason_and_no_warning(tmp_path, monkeypatch):
    jpg = io.BytesIO()
    picture(64, 64).save(jpg, "JPEG")
    files = {"cut.jpg": jpg.getvalue()[:500], "text.png": b"text", "zero.png": b"", "good.png": None}
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
        "pipe.png": "not a regular file",
        "huge.png": f"10000x10000 pixels, more than the limit of {images.MAX_PIXELS}",
    }
    monkeypatch.setattr(listing, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match=f"good.png: {len(content())} bytes, more than the limit of 10"):
        read_entry(tmp_path, next(e for e in found.entries if e.name == "good.png"), (8, 8))


# ----------------------------------------------------------------------------------------------- pixel kinds
def read(image, path, **options):
    image.save(path, **options)
    return read_image(path, (image.height, image.width), 3)


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    values = np.array([[0, 128, 129, 257], [32768, 40000, 65000, 65535]], np.uint16)
    pixels = read(Image.fromarray(values), tmp_path / name)
    assert pixels[..., 0].tolist() == [[0, 0, 1, 1], [128, 156, 253, 255]]


def test_wider_pixels_are_refused(tmp_path):
    for values in (np.full((2, 2), 70_000, np.int32), np.zeros((2, 2), np.float32)):
        with pytest.raises(DataError, match="have no standard range"):
            read(Image.fromarray(values), tmp_path / "x.tiff")


def test_transparency_becomes_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
    assert read(Image.fromarray(rgba), tmp_path / "x.png").tolist() == [[[255] * 3, [255, 0, 0], [127] * 3]]
    grey = Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8), "LA")
    assert read(grey, tmp_path / "y.png")[0, :, 0].tolist() == [255, 9]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("L").quantize(2)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    transparent = read(palette, tmp_path / "z.png", transparency=0)[0].tolist()
    assert [255, 255, 255] in transparent
    assert transparent != [[255] * 3] * 2


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    for name in ("x.gif", "x.png", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        red, _, blue = read_image(tmp_path / name, (4, 4), 3)[0, 0]
        assert red > 240
        assert blue < 20


def test_cmyk_becomes_rgb(tmp_path):
    pixels = read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "x.tiff")
    assert pixels[0, 0].tolist() == [255, 0, 0]
