"""Tar files that are damaged or made to do harm: what came before is read, and the reason is one
line.
"""

import io
import os
import signal
import tarfile

import pytest

from diffussm_cli.data.tar import Damaged, members


def archive(*files, end=b"\0" * 1024):
    """Headers and contents of (name, content, fields of the header), and the end mark."""
    parts = []
    for name, content, fields in files:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        for field, value in fields.items():
            setattr(member, field, value)
        parts += [member.tobuf(tarfile.GNU_FORMAT), content, b"\0" * (-len(content) % 512)]
    return b"".join(parts) + end


def pax(records):
    """The content of an extended header, which begins with its own length."""
    lines = [f" {key}={value}\n" for key, value in records.items()]
    return b"".join(f"{len(line) + 2}{line}".encode() for line in lines)


GOOD = ("a.txt", b"good", {})
LATER = ("z.txt", b"later", {})
BROKEN = {
    "negative": ([GOOD, ("b", b"", {"size": -5}), LATER], "'b' has the size -5"),
    "backwards": ([GOOD, ("b", b"", {"size": -512}), LATER], "'b' has the size -512"),
    "folder of negative size": (
        [GOOD, ("b", b"", {"size": -512, "type": tarfile.LNKTYPE})],
        "has the size -512",
    ),
    "negative by attribute": (
        [GOOD, ("p", pax({"size": "-512"}), {"type": tarfile.XHDTYPE}), ("b", b"", {}), LATER],
        "unexpected end of data",
    ),
    "beyond the end": ([GOOD, ("b", b"x", {"size": 1 << 40})], "unexpected end of data"),
    "beyond all numbers": ([GOOD, ("b", b"x", {"size": 1 << 70})], "unexpected end of data"),
    "long name": (
        [GOOD, ("b", b"x", {"size": 2 << 20, "type": tarfile.GNUTYPE_LONGNAME})],
        "a header of 2097152 bytes",
    ),
}


@pytest.fixture(autouse=True)
def no_endless_loop():
    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read(path):
    """Names that are read, and the reason why no more are."""
    names = []
    try:
        for member, content in members(path):
            names.append((member.name, content(100) if member.isreg() else b""))
    except Damaged as e:
        return names, str(e)
    return names, ""


@pytest.mark.parametrize("case", BROKEN)
def test_member_of_impossible_size_ends_the_archive(tmp_path, case):
    files, reason = BROKEN[case]
    (tmp_path / "0.tar").write_bytes(archive(*files))
    names, why = read(tmp_path / "0.tar")
    assert names == [("a.txt", b"good")]
    assert why.startswith("damaged from here on, or not an uncompressed tar file: ")
    assert why.endswith(reason)
    assert "\n" not in why


def test_damaged_header_is_not_taken_for_the_end(tmp_path):
    whole = bytearray(archive(GOOD, GOOD, LATER))
    whole[1024 + 150] ^= 1  # in the checksum of the second header
    (tmp_path / "0.tar").write_bytes(whole)
    assert read(tmp_path / "0.tar") == (
        [("a.txt", b"good")],
        "damaged from here on, or not an uncompressed tar file: bad checksum",
    )


@pytest.mark.parametrize("kept", [1024 + 100, 1024 + 512 + 2], ids=["in a header", "in a content"])
def test_cut_file_is_said_to_be_cut_off(tmp_path, kept):
    (tmp_path / "0.tar").write_bytes(archive(GOOD, LATER)[:kept])
    names, why = read(tmp_path / "0.tar")
    assert names == [("a.txt", b"good")]
    assert why.endswith("it ends within a block of 512 bytes, as a file does that is cut off")


def test_joined_archives_are_not_cut_silently(tmp_path):
    (tmp_path / "0.tar").write_bytes(archive(GOOD) + archive(LATER))
    names, why = read(tmp_path / "0.tar")
    assert names == [("a.txt", b"good")]
    assert "more content after the end of the archive" in why


def test_good_archive_of_any_format_has_no_complaint(tmp_path):
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
            for name in ("x" * 90, "folder/" + "y" * (60 if form == tarfile.USTAR_FORMAT else 200)):
                member = tarfile.TarInfo(name)
                member.size = 3
                tar.addfile(member, io.BytesIO(b"abc"))
        names, why = read(tmp_path / "0.tar")
        assert ([content for _, content in names], why) == ([b"abc"] * 2, "")
    (tmp_path / "0.tar").write_bytes(archive(GOOD, end=b""))  # some programs write no end mark
    assert read(tmp_path / "0.tar") == ([("a.txt", b"good")], "")


def test_pipe_named_as_shard_is_rejected_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    assert read(tmp_path / "0.tar")[1].endswith("not a regular file")
