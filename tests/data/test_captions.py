"""Captions in every place where they may stand, and files of captions that are damaged."""

import io
import json
import os
import tarfile

import pytest
from PIL import Image

from diffussm_cli.data.captions import MAX_TEXT_BYTES, read_captions
from diffussm_cli.data.listing import list_source
from diffussm_cli.errors import DataError


def png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png() if content is None else content)
    return root


def captions(root):
    return read_captions(list_source(root))


def test_text_files_beside_images_hold_one_caption_per_line(tmp_path):
    write(
        tmp_path,
        {
            "a/1.png": None,
            "a/1.txt": b"a cat\n\n  a cat \ncats\n",
            "b/2.png": None,
            "b/2.txt": b" \n",
        },
    )
    assert captions(tmp_path) == {"a/1.png": ("a cat", "cats")}


def test_metadata_replaces_text_files(tmp_path):
    lines = [{"file_name": "1.png", "text": ["one", "uno"]}, {"file_name": "1.png", "text": "ein"}]
    lines += [{"file_name": "gone.png", "text": "gone"}, {"file_name": "2.png", "text": None}]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    write(tmp_path, {"1.png": None, "2.png": None, "2.txt": b"two", "metadata.jsonl": content})
    left_out = []
    assert read_captions(list_source(tmp_path), left_out=left_out) == {
        "1.png": ("one", "uno", "ein")
    }
    assert left_out == [
        (1, "file", "beside a metadata.jsonl, which is read instead", "2.txt"),
        (1, "caption", "of no image in the source", "gone.png"),
    ]


def test_captions_of_shards_come_from_text_and_json(tmp_path):
    members = {"1.txt": b"one\n", "1.png": png(), "1.json": b'{"caption": "uno"}', "2.png": png()}
    members |= {"2.json": b'{"text": ["two", "one"], "caption": "not this"}', "3.txt": b"no image"}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    whole = {"0.tar/1.png": ("one", "uno"), "0.tar/2.png": ("two", "one")}
    assert captions(tmp_path) == whole
    assert captions(tmp_path / "0.tar") == whole
    content = (tmp_path / "0.tar").read_bytes()
    # cut within a header
    (tmp_path / "0.tar").write_bytes(content[: content.index(b"2.json") + 100])
    assert captions(tmp_path) == {"0.tar/1.png": ("one", "uno")}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("1.txt", b"\xff\xfe", "1.txt: cannot be read: it is not UTF-8 text"),
        (
            "1.txt",
            b"x" * (MAX_TEXT_BYTES + 1),
            f"1.txt: cannot be read: it has more than {MAX_TEXT_BYTES} bytes",
        ),
        ("metadata.jsonl", b"\xff", "metadata.jsonl: cannot be read: it is not UTF-8 text"),
        ("metadata.jsonl", b'\n{"file_name": 3}', "metadata.jsonl: line 2: is not an object with"),
        ("metadata.jsonl", b"{", "metadata.jsonl: line 1: Expecting"),
        (
            "metadata.jsonl",
            b'{"file_name": "1.png", "text": [4]}',
            "metadata.jsonl: line 1: a caption must be text, not 4",
        ),
        ("metadata.jsonl", b"[" * 100_000, "metadata.jsonl: line 1: it is nested too deeply"),
    ],
)
def test_damaged_file_is_named(tmp_path, name, content, problem):
    write(tmp_path, {"1.png": None, name: content})
    with pytest.raises(DataError, match=problem) as found:
        captions(tmp_path)
    assert "\n" not in str(found.value)


def test_metadata_of_subfolder_names_images_beside_it(tmp_path):
    """Each folder may have its own, as in Hugging Face's imagefolder; others have files of
    captions.
    """
    cat = [{"file_name": "1.png", "text": "a cat"}, {"file_name": "./sub/2.png", "text": "another"}]
    cat += [{"file_name": "9.png", "text": "gone"}]
    content = "\n".join(json.dumps(line) for line in cat).encode()
    images = dict.fromkeys(["cat/1.png", "cat/sub/2.png", "dog/1.png"])
    write(
        tmp_path,
        {
            **images,
            "cat/metadata.jsonl": content,
            "cat/1.txt": b"not this",
            "dog/1.txt": b"a dog",
        },
    )
    found, left_out = list_source(tmp_path), []
    expected = {"cat/1.png": ("a cat",), "cat/sub/2.png": ("another",), "dog/1.png": ("a dog",)}
    assert read_captions(found, left_out=left_out) == expected
    assert left_out == [
        (1, "file", "beside a metadata.jsonl, which is read instead", "cat/1.txt"),
        (1, "caption", "of no image in the source", "cat/9.png"),
    ]


def test_byte_order_mark_is_no_part_of_caption(tmp_path):
    """Notepad begins every file with one."""
    mark = b"\xef\xbb\xbf"
    members = {
        "3.png": png(),
        "3.txt": mark + b"three",
        "4.png": png(),
        "4.json": mark + b'{"text": "four"}',
    }
    write(tmp_path / "flat", {"1.png": None, "1.txt": mark + b"one"})
    write(
        tmp_path / "described",
        {"2.png": None, "metadata.jsonl": mark + b'{"file_name": "2.png", "text": "two"}'},
    )
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert captions(tmp_path / "flat") == {"1.png": ("one",)}
    assert captions(tmp_path / "described") == {"2.png": ("two",)}
    assert captions(tmp_path / "0.tar") == {"0.tar/3.png": ("three",), "0.tar/4.png": ("four",)}


def test_two_images_of_one_key_share_their_caption(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in {"1.png": png(), "1.jpg": png(), "1.txt": b"one"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert captions(tmp_path / "0.tar") == {"0.tar/1.png": ("one",), "0.tar/1.jpg": ("one",)}


@pytest.mark.parametrize("name", ["1.txt", "metadata.jsonl"])
def test_pipe_in_place_of_captions_is_rejected_without_waiting(tmp_path, name):
    write(tmp_path, {"1.png": None})
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: cannot be read: not a regular file"):
        captions(tmp_path)
