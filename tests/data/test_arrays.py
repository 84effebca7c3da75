"""Arrays in .npz files: streamed both ways, and nothing unpacked on trust."""

import io
import zipfile

import numpy as np
import pytest

from diffussm_cli.data.arrays import open_npz, write_npz
from diffussm_cli.errors import DataError


def test_rows_are_read_in_blocks_from_any_position(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 2, 3), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images)
    rows = open_npz(tmp_path / "a.npz")["arr_0"]
    assert (rows.shape, rows.dtype) == ((10, 2, 3), np.uint8)
    blocks = list(rows.read(3, 10, 4))
    assert [len(b) for b in blocks] == [4, 3]
    assert np.array_equal(np.concatenate(blocks), images[3:])


def test_written_file_is_read_by_numpy(tmp_path):
    a, b = np.arange(12, dtype=np.uint8).reshape(4, 3), np.array([5.0, 6.0])
    arrays = {"arr_0": (a.shape, a.dtype, [a[:1], a[1:]]), "mu": (b.shape, np.float64, [b])}
    write_npz(tmp_path / "b.npz", arrays)
    with np.load(tmp_path / "b.npz", allow_pickle=False) as found:
        assert list(found) == ["arr_0", "mu"]
        assert np.array_equal(found["arr_0"], a)
        assert found["mu"].dtype == np.float64
    assert [p.name for p in tmp_path.iterdir()] == ["b.npz"]


def npy(header):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def archive(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("arr_0.npy", content)
    return path


def test_bomb_is_rejected_before_unpacking(tmp_path):
    """128 MB of zeros in 128 kB, and a header that claims a terabyte."""
    shape = (1 << 17, 1024)
    path = tmp_path / "bomb.npz"
    packed = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with packed as file, file.open("arr_0.npy", "w", force_zip64=True) as member:
        member.write(npy({"descr": "|u1", "fortran_order": False, "shape": shape}))
        for _ in range(shape[0] * shape[1] >> 24):
            member.write(bytes(1 << 24))
    assert path.stat().st_size < 200_000
    with pytest.raises(DataError, match="arr_0.npy unpacks to 134217856 bytes from"):
        open_npz(path)
    liar = archive(
        tmp_path / "liar.npz", npy({"descr": "<f8", "fortran_order": False, "shape": (1 << 37,)})
    )
    with pytest.raises(
        DataError, match="declares \\(137438953472,\\) of float64 but unpacks to 128 bytes"
    ):
        open_npz(liar)


def test_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "o.npz", np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="arr_0.npy holds objects"):
        open_npz(tmp_path / "o.npz")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 half"])
def test_damaged_file_is_one_line_error(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match="d.npz: cannot be read as .npz"):
        open_npz(tmp_path / "d.npz")


def test_truncation_or_flipped_byte_is_detected(tmp_path):
    np.savez(tmp_path / "whole.npz", np.arange(100_000))
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cut.npz"):
        open_npz(tmp_path / "cut.npz")
    flipped = bytearray(content)
    flipped[5000] ^= 1
    (tmp_path / "flip.npz").write_bytes(flipped)
    with pytest.raises(DataError, match="flip.npz: arr_0 cannot be read: Bad CRC"):
        open_npz(tmp_path / "flip.npz")["arr_0"].read_all()


def test_damaged_deflated_array_is_one_line_error(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", np.random.default_rng(0).integers(0, 9, 10_000))
    content = (tmp_path / "whole.npz").read_bytes()
    for place in range(60, 1060, 50):
        (tmp_path / "flip.npz").write_bytes(
            content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        )
        with pytest.raises(DataError, match="flip.npz: .*cannot be read"):
            open_npz(tmp_path / "flip.npz")["arr_0"].read_all()


def test_array_without_rows_is_read(tmp_path):
    np.savez(tmp_path / "e.npz", np.zeros((0, 3), np.float32))
    found = open_npz(tmp_path / "e.npz")["arr_0"].read_all()
    assert (found.shape, found.dtype) == ((0, 3), np.float32)


def test_missing_file_is_one_line_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        open_npz(tmp_path / "none.npz")
