"""`diffussm encode` as a user meets it: what it writes, what stops it, and what training and
sampling make of it.
"""

import errno
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffussm_cli import runs
from diffussm_cli.data import parquet
from diffussm_cli.data.latents import encoder, encoding
from diffussm_cli.data.latents import store as store_module
from diffussm_cli.data.latents.encoding import decoding_processes
from diffussm_cli.data.latents.store import locked_store
from diffussm_cli.data.listing import list_source
from diffussm_cli.errors import DataError
from diffussm_cli.machine.processes import ALONE
from tests.conftest import TINY, device, relative, save_vae
from tests.helpers import Background, line_of, run

N = 12
OPTIONS = ["--resolution", "16", "--shard-size", "5", "--batch-size", "2", "--workers", "0"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Rounding may depend on the number of threads, and processes are compared here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of six pictures, one of them broken, and a file that is none."""
    root = tmp_path_factory.mktemp("images")
    for i in range(N):
        path = root / ("cat" if i < 6 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        ).save(path)
    (root / "cat" / "03.png").write_bytes(b"text")
    (root / "dog" / "notes.txt").write_text("text")
    return root


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    # so that latents have about unit variance
    return save_vae(tmp_path_factory.mktemp("vae"), scaling_factor=0.9)


@pytest.fixture(scope="module")
def store(images, vae, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "store"
    assert run("encode", images, target, "--vae", vae, *OPTIONS).exit_code == 0
    return target


def files(store):
    """Contents by name, locks aside."""
    return {p.name: p.read_bytes() for p in store.iterdir() if not p.name.startswith(".lock")}


def command(images, target, vae):
    return ["encode", images, target, "--vae", vae, *OPTIONS]


def size_of(path):
    with Image.open(path) as image:
        return image.mode, image.size


# ------------------------------------------------------------------------------------- good courses
def test_encode_reports_its_work(images, vae, tmp_path):
    result = run("encode", images, tmp_path / "store", "--vae", vae, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert f"11 images of 2 classes in {tmp_path / 'store'}" in result.stderr
    line = (
        f"left out of {str(images)!r}: 1 image (not encoded; reasons in "
        f"{tmp_path / 'store'}/shard-*.json), "
    )
    line += "1 file (not an image by its name or first bytes: 'dog/notes.txt')"
    assert line in " ".join(result.stderr.split())
    assert f"diffussm encode --verify {tmp_path / 'store'}" in result.stderr
    (skipped,) = json.loads((tmp_path / "store" / "shard-00000.json").read_text())["skipped"]
    assert (skipped["index"], skipped["file"]) == (3, "cat/03.png")
    assert json.loads((tmp_path / "store" / "ignored.jsonl").read_text())["file"] == "dog/notes.txt"
    checked = run("encode", "--verify", tmp_path / "store")
    assert checked.stdout == f"4 files of {tmp_path / 'store'} match their hashes\n"
    again = run("encode", images, tmp_path / "store", "--vae", vae, *OPTIONS)
    assert "is complete already" in again.stderr


def test_names_are_printed_verbatim(images, vae, tmp_path):
    """Though they read as rich's markup or as an emoji, or are no text at all."""
    target = tmp_path / "a[b]:smile:[" / "red]"
    for _ in range(2):
        result = run("encode", images, target, "--vae", vae, *OPTIONS)
        assert result.exit_code == 0, result.output
        assert str(target) in result.stderr
    (target / "shard-00001.safetensors").unlink()
    assert (
        f"2 of 3 shards of {target} are"
        in run("encode", images, target, "--vae", vae, *OPTIONS).stderr
    )


def test_file_names_that_are_no_text_are_encoded(vae, tmp_path):
    folder = os.fsencode(tmp_path / "images") + b"/caf\xe9"
    os.makedirs(folder)
    Image.new("RGB", (16, 16)).save(os.fsdecode(folder + b"/\xe9.png"))
    with open(folder + b"/\xe8.png", "wb") as file:
        file.write(b"broken")
    for _ in range(2):
        assert (
            run("encode", tmp_path / "images", tmp_path / "store", "--vae", vae, *OPTIONS).exit_code
            == 0
        )
    assert run("encode", "--verify", tmp_path / "store").exit_code == 0
    (skipped,) = json.loads((tmp_path / "store" / "shard-00000.json").read_text())["skipped"]
    assert os.fsencode(skipped["file"]) == b"caf\xe9/\xe8.png"


@pytest.mark.parametrize(
    ("cores", "local", "expected"),
    [(64, "8", 8), (64, None, 16), (64, "1", 16), (4, "8", 1), (64, "x", 16)],
)
def test_processes_of_machine_share_its_cores(monkeypatch, cores, local, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local) if local else monkeypatch.delenv(
        "LOCAL_WORLD_SIZE", raising=False
    )
    assert decoding_processes(None) == expected
    assert decoding_processes(5) == 5


@pytest.mark.slow
def test_worker_processes_give_the_same_bytes(images, vae, store, tmp_path):
    result = run("encode", images, tmp_path / "store", "--vae", vae, *OPTIONS, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "store") == files(store)


def test_tar_shards_and_a_flat_folder_hold_the_same_latents(images, vae, tmp_path):
    flat, tars = tmp_path / "flat", tmp_path / "tars"
    flat.mkdir()
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for i, path in enumerate(sorted(images.rglob("*.png"))):
            (flat / path.name).write_bytes(path.read_bytes())
            for name, data in (
                (path.name, path.read_bytes()),
                (f"{path.stem}.cls", str(2 * (i % 3)).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    means = []
    for source, names in ((flat, []), (tars, ["0", "1", "2", "3", "4"])):
        target = tmp_path / f"{source.name}-store"
        encoded = run("encode", source, target, "--vae", vae, *OPTIONS)
        assert encoded.exit_code == 0, encoded.output
        empty = "warning: 2 of 5 classes have no image: 1, 3\n"
        assert encoded.stderr.count(empty) == bool(names)
        assert (
            json.loads((target / "manifest.json").read_text())["settings"]["class_names"] == names
        )
        tensors = load_file(target / "shard-00001.safetensors")
        assert tensors["label"].tolist() == ([4, 0, 2, 4, 0] if names else [0] * 5)
        means.append(tensors["mean"])
    assert torch.equal(*means)


def test_oblong_resolution_is_kept(images, vae, tmp_path):
    result = run(
        "encode",
        images,
        tmp_path / "s",
        "--vae",
        vae,
        *OPTIONS,
        "--resolution",
        "8x24",
        "--no-flip",
    )
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "s" / "manifest.json").read_text())["settings"]
    assert (settings["resolution"], settings["flip"]) == ([8, 24], False)


def test_bf16_is_rejected_without_hardware_for_it(images, vae, tmp_path, monkeypatch):
    monkeypatch.setattr("diffussm_cli.machine.device.has_bf16", lambda device: False)
    bf16 = run("encode", images, tmp_path / "store", "--vae", vae, *OPTIONS, "--precision", "bf16")
    assert "bf16 has no hardware support" in line_of(bf16)


def test_bf16_is_recorded_and_rounds_the_latents(images, vae, store, tmp_path, monkeypatch):
    monkeypatch.setattr("diffussm_cli.machine.device.has_bf16", lambda device: True)
    bf16 = run("encode", images, tmp_path / "store", "--vae", vae, *OPTIONS, "--precision", "bf16")
    assert bf16.exit_code == 0, bf16.output
    assert (
        json.loads((tmp_path / "store" / "manifest.json").read_text())["settings"]["precision"]
        == "bf16"
    )
    rounded, exact = (
        load_file(s / "shard-00001.safetensors")["mean"] for s in (tmp_path / "store", store)
    )
    assert 1e-4 < relative(rounded, exact) < 0.05


def replace_whole_file(monkeypatch, by):
    """All that encode writes goes through `by`: shards, the listing, and texts by the name of
    `write_text`.
    """
    for module in ("data.latents.shard", "data.latents.store", "machine.files"):
        monkeypatch.setattr(f"diffussm_cli.{module}.whole_file", by)


def test_interruption_at_any_shard_ends_with_the_same_bytes(
    images, vae, store, tmp_path, monkeypatch
):
    """The death of the process between any two writes,
    played by an exception that nothing catches.
    """
    whole, finished = store_module.whole_file, []

    class Death(BaseException):
        pass

    for survived in range(9):
        target, left = tmp_path / str(survived), [survived]

        def dies(path, left=left):
            left[0] -= 1
            if left[0] < 0:
                path.with_name(f".partial-{path.name}.1").write_bytes(b"half")
                raise Death
            return whole(path)

        replace_whole_file(monkeypatch, dies)
        with pytest.raises(Death):
            run("encode", images, target, "--vae", vae, *OPTIONS)
        replace_whole_file(monkeypatch, whole)
        stamps = {p: p.stat().st_mtime_ns for p in target.glob("shard-*.safetensors")}
        finished.append(len(stamps))
        assert run("encode", images, target, "--vae", vae, *OPTIONS).exit_code == 0
        assert files(target) == files(store)
        # no finished shard is redone
        assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    assert sorted(set(finished)) == [0, 1, 2]


def test_kill_and_restart_end_with_the_same_bytes(images, vae, store, tmp_path):
    target = tmp_path / "store"
    for wanted in (1, 2):
        job = Background(*command(images, target, vae), log=tmp_path / "log")
        job.wait_until(
            lambda wanted=wanted: len(list(target.glob("shard-*.safetensors"))) >= wanted
        )
        job.kill()
    assert run("encode", images, target, "--vae", vae, *OPTIONS).exit_code == 0
    assert files(target) == files(store)


def test_two_ranks_write_what_one_writes(images, vae, store, tmp_path):
    target = tmp_path / "store"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        Background(
            *command(images, target, vae), log=tmp_path / f"log{rank}", RANK=str(rank), **group
        )
        for rank in (1, 0)
    ]
    (code_1, messages_1), (code_0, messages_0) = [rank.wait() for rank in ranks]
    assert (code_0, code_1) == (0, 0), messages_0 + messages_1
    assert files(target) == files(store)
    assert "11 images of 2 classes" in messages_0
    assert "images of" not in messages_1


def test_flipped_byte_is_named_and_mended_by_the_printed_command(images, vae, store, tmp_path):
    target = tmp_path / "a store"
    target.mkdir()
    for name, data in files(store).items():
        (target / name).write_bytes(data)
    shard = target / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 4
    shard.write_bytes(data)
    line = line_of(run("encode", "--verify", target))
    assert (
        "1 of 4 files are damaged: shard-00001.safetensors (its sha256 differs from its record)"
        in line
    )
    command = line.partition("; delete them, and encode them again from the same images: ")[2]
    (target / "shard-00001.safetensors").unlink()
    words = [str(images) if word == "SOURCE" else word for word in shlex.split(command)]
    mended = run(*words[1:], "--workers", 0)
    assert mended.exit_code == 0, mended.output
    assert "2 of 3 shards of" in mended.stderr
    assert files(target) == files(store)
    assert run("encode", "--verify", target).exit_code == 0


# ----------------------------------------------------------------------------------------- mistakes
def test_mistakes_are_rejected_before_any_model_is_loaded(images, vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoding, "load_vae", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    mistakes = {
        (): "give SOURCE and TARGET, for example: diffussm encode images/ latents/",
        (images,): "give SOURCE and TARGET",
        ("nowhere", "out"): "SOURCE: cannot read the folder 'nowhere': No such file",
        ("empty", "out"): "SOURCE: no images in 'empty'",
        ("text", "out"): "SOURCE: no images in 'text'",
        (images, "/proc/out"): "TARGET: cannot write to '/proc/out'",
        (images, "text/a.txt"): "TARGET: cannot write to 'text/a.txt'",
        (images, "out", "--batch-size", 10**20): "--batch-size",
        (images, "out", "--workers", 10**20): "--workers",
        (
            images,
            "out",
            "--resolution",
            "99999",
        ): "--resolution: '99999' must be a number of pixels",
        (images, "taken"): "TARGET: 'taken' is not empty and holds no latents",
        (images, images / "out"): "lies inside SOURCE",
        (images, "out", "--resolution", "0"): "--resolution: '0' must be a number of pixels or HxW",
        (images, "out", "--resolution", "256x"): "--resolution: '256x' must be",
        (images, "out", "--resolution", "20"): "--resolution: 20 must be a multiple of 8",
        (images, "out", "--resolution", "8x20"): "--resolution: 8x20 must be a multiple of 8",
        (images, "out", "--vae", "./nowhere"): "--vae: no folder './nowhere'",
        (images, "out", "--vae", "empty"): "--vae: cannot load the folder 'empty'",
        (
            images,
            "out",
            "--strict",
        ): "--strict: dog/notes.txt: not an image by its name or first bytes",
        (
            images,
            "out",
            "--columns",
            "photo",
        ): "--columns: 'photo' must read image=NAME, label=NAME, text=NAME",
        (images, "out", "--columns", "image=a,label=b"): "SOURCE: the columns a, b are named, but",
        ("--verify", "empty"): "--verify: cannot read 'empty/manifest.json': No such file",
        ("--verify",): "encode: give --verify LATENTS, and no other folder",
        ("--verify", "a", "b"): "encode: give --verify LATENTS, and no other folder",
    }
    for arguments, words in mistakes.items():
        assert words in line_of(run("encode", *arguments)), arguments
        assert sorted(p.name for p in tmp_path.rglob("*")) == before, arguments


def test_errors_of_other_files_are_not_blamed_on_the_target(tmp_path):
    with pytest.raises(OSError, match="elsewhere"), locked_store(tmp_path / "store", ALONE):
        raise OSError(errno.EACCES, "Permission denied", "elsewhere")
    assert list(tmp_path.iterdir()) == []
    name = "x" * 300
    with pytest.raises(DataError, match="TARGET: cannot write to '.*xxx': File name too long"):
        locked_store(tmp_path / name, ALONE).__enter__()


def test_resolution_that_vae_cannot_take_is_rejected(images, tmp_path, monkeypatch):
    folder = save_vae(tmp_path / "vae", block_out_channels=(4,) * 5)
    monkeypatch.setattr(encoding, "load_vae", None)
    line = line_of(
        run("encode", images, tmp_path / "out", "--vae", folder, "--resolution", "24x32")
    )
    assert "--resolution: 24x32 must be a multiple of 16, the downsampling of" in line


def test_strict_stops_at_the_first_broken_image(images, vae, tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for path in (images / "cat").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    line = line_of(run("encode", source, tmp_path / "out", "--vae", vae, *OPTIONS, "--strict"))
    assert "--strict: 03.png: not a PNG" in line


def test_source_without_readable_image_leaves_nothing(vae, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(b"text")
    line = line_of(run("encode", tmp_path / "images", tmp_path / "store", "--vae", vae, *OPTIONS))
    assert "SOURCE: none of the 2 images can be read, such as a.png: not a PNG" in line
    assert not (tmp_path / "store").exists()


def write_source(folder, kind, content):
    """Image files by name, as a folder, a tar shard or two parquet shards."""
    folder.mkdir()
    if kind == "folders":
        for name, data in content.items():
            (folder / name).write_bytes(data)
    elif kind == "tar":
        with tarfile.open(folder / "0.tar", "w") as tar:
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        pa = pytest.importorskip("pyarrow", reason="needs the extra parquet")
        pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
        for i, part in enumerate((list(content.values())[:6], list(content.values())[6:])):
            pq.write_table(pa.table({"image": part}), folder / f"{i}.parquet")


@pytest.mark.parametrize("kind", ["folders", "tar", "parquet"])
def test_source_that_is_renamed_ends_the_work_and_nothing_is_lost(
    images, vae, tmp_path, monkeypatch, kind
):
    """After its first shard; once the source is back, the same command writes the bytes of an
    undisturbed one.
    """
    source, moved = tmp_path / "source", tmp_path / "moved"
    write_source(source, kind, {p.name: p.read_bytes() for p in sorted(images.rglob("*.png"))})
    assert run("encode", source, tmp_path / "undisturbed", "--vae", vae, *OPTIONS).exit_code == 0
    encode_batch, left = encoder.Encoder._encode, [3]

    def renaming(self, *arguments):
        left[0] -= 1
        if left[0] == 0:
            source.rename(moved)
            parquet.forget()  # otherwise this process still has the shards open
        return encode_batch(self, *arguments)

    monkeypatch.setattr(encoder.Encoder, "_encode", renaming)
    line = line_of(run("encode", source, tmp_path / "store", "--vae", vae, *OPTIONS))
    assert "source' changes while it is encoded: " in line
    assert "restore it; finished shards are kept, and the same command continues from there" in line
    moved.rename(source)
    assert run("encode", source, tmp_path / "store", "--vae", vae, *OPTIONS).exit_code == 0
    assert files(tmp_path / "store") == files(tmp_path / "undisturbed")


def test_broken_links_are_skipped(images, vae, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes((images / "cat" / "00.png").read_bytes())
    (source / "b.png").symlink_to("nowhere")
    result = run("encode", source, tmp_path / "store", "--vae", vae, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert "1 image (not encoded; reasons in" in result.stderr


@pytest.mark.parametrize("cut", [None, 100])
def test_lost_shard_of_finished_store_is_encoded_again(images, vae, store, tmp_path, cut):
    target = tmp_path / "store"
    target.mkdir()
    for name, data in files(store).items():
        (target / name).write_bytes(data)
    shard = target / "shard-00000.safetensors"
    if cut is None:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-cut])
    result = run("encode", images, target, "--vae", vae, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert f"2 of 3 shards of {target} are there; the others are encoded" in result.stderr
    assert files(target) == files(store)


TRAPS = ("multiprocessing", "typer", "torch", "numpy", "PIL", "runpy", "pickle", "random")
# as pip installs it
SCRIPT = "from diffussm_cli.cli import app\n\nif __name__ == '__main__':\n    app()\n"


@pytest.mark.slow
@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="children of Python 3.10 look into the current folder"
)
@pytest.mark.parametrize("program", ["module", "script"])
def test_workers_import_nothing_from_current_folder(images, vae, tmp_path, program):
    """A data set of a stranger, encoded from inside, with a process that decodes."""
    source, script = tmp_path / "images", tmp_path / "bin" / "program.py"
    source.mkdir()
    for i in range(2):
        (source / f"{i}.png").write_bytes((images / "cat" / f"0{i}.png").read_bytes())
    for name in TRAPS:
        trap = f"open({str(tmp_path / 'owned')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        (source / f"{name}.py").write_text(trap)
    script.parent.mkdir()
    script.write_text(SCRIPT)
    start = ["-m", "diffussm_cli"] if program == "module" else [script]
    arguments = [
        *start,
        "encode",
        ".",
        "../store",
        "--vae",
        vae,
        "--resolution",
        "16",
        "--workers",
        "1",
    ]
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert not (tmp_path / "owned").exists(), (tmp_path / "owned").read_text()
    assert done.returncode == 0, done.stderr
    assert "2 images in ../store" in done.stderr


def test_other_settings_and_sources_are_rejected_with_the_difference(images, vae, store, tmp_path):
    def refused(source, *options):
        return line_of(run("encode", source, store, "--vae", vae, *OPTIONS, *options))

    before = files(store)
    assert "resolution was (16, 16) and is now (24, 24); use another TARGET" in refused(
        images, "--resolution", "24"
    )
    assert "flip was True and is now False" in refused(images, "--no-flip")
    assert "batch_size was 2 and is now 3" in refused(images, "--batch-size", "3")
    other = save_vae(tmp_path / "vae", seed=1)
    assert "vae was" in refused(images, "--vae", other)
    source = tmp_path / "images"
    for path in images.rglob("*.*"):
        copy = source / path.relative_to(images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (source / "dog" / "07.png").unlink()
    line = refused(source)
    assert 'was begun with another SOURCE: image 7 was ["dog/07.png", 1, ' in line
    assert 'is now ["dog/08.png", 1, ' in line
    assert files(store) == before


def test_changed_vae_under_the_same_name_is_rejected(images, tmp_path):
    folder = save_vae(tmp_path / "vae")
    assert run("encode", images, tmp_path / "out", "--vae", folder, *OPTIONS).exit_code == 0
    save_vae(folder, seed=1)
    line = line_of(run("encode", images, tmp_path / "out", "--vae", folder, *OPTIONS))
    assert "vae_weights_sha256 was" in line


def test_arrays_with_other_pixels_are_rejected(vae, tmp_path):
    def encode(value):
        np.savez(tmp_path / "set.npz", images=np.full((3, 16, 16, 3), value, np.uint8))
        return run("encode", tmp_path / "set.npz", target, "--vae", vae, *OPTIONS)

    target = tmp_path / "store"
    assert encode(100).exit_code == 0
    (target / "shard-00000.safetensors").unlink()
    before = files(target)
    line = line_of(encode(101))
    assert "was begun with another SOURCE: the pixels in" in line
    assert line.endswith("have changed; use another TARGET")
    assert files(target) == before

    # A store of an earlier version does not know its pixels.
    manifest = json.loads((target / "manifest.json").read_text())
    del manifest["settings"]["arrays_sha256"]
    (target / "manifest.json").write_text(json.dumps(manifest))
    assert encode(100).exit_code == 0


def test_second_process_is_turned_away(images, vae, tmp_path):
    target = tmp_path / "store"
    target.mkdir()
    with (target / ".lock-0").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = line_of(run("encode", images, target, "--vae", vae, *OPTIONS))
    assert "another process is writing to" in line
    assert run("encode", images, target, "--vae", vae, *OPTIONS).exit_code == 0


def test_full_disk_keeps_what_is_finished(images, vae, store, tmp_path, monkeypatch):
    whole, left = store_module.whole_file, [4]

    def full(path):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return whole(path)

    replace_whole_file(monkeypatch, full)
    line = line_of(run("encode", images, tmp_path / "store", "--vae", vae, *OPTIONS))
    assert (
        "No space left on device; finished shards are kept, and the same command continues "
        "from there"
    ) in line
    replace_whole_file(monkeypatch, whole)
    assert run("encode", images, tmp_path / "store", "--vae", vae, *OPTIONS).exit_code == 0
    assert files(tmp_path / "store") == files(store)


@pytest.mark.parametrize(("rank", "of"), [("2", "2"), ("x", "2"), ("0", "")])
def test_wrong_ranks_are_rejected(images, tmp_path, monkeypatch, rank, of):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", of)
    assert "RANK" in line_of(run("encode", images, tmp_path / "out"))


def test_ctrl_c_says_how_to_continue(images, vae, tmp_path, monkeypatch):
    def interrupted(self, images):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffussm_cli.data.vae.VAE.encode", interrupted)
    result = run("encode", images, tmp_path / "out", "--vae", vae, *OPTIONS)
    assert result.exit_code == 130
    assert (
        "interrupted; finished shards are kept, and the same command continues from there"
        in result.stderr
    )


def test_too_large_batch_is_one_line_error(images, vae, tmp_path, monkeypatch):
    def full(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("diffussm_cli.data.vae.VAE.encode", full)
    line = line_of(run("encode", images, tmp_path / "out", "--vae", vae, *OPTIONS))
    assert f"--batch-size: 2 does not fit into the memory of {device()}; reduce it" in line


def test_killed_worker_is_one_line_error(images, vae, tmp_path, monkeypatch):
    def killed(*arguments):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        yield

    monkeypatch.setattr(encoder, "_loader", killed)
    line = line_of(run("encode", images, tmp_path / "out", "--vae", vae, *OPTIONS))
    assert (
        "--workers: a process that decodes images was killed, perhaps out of memory; use fewer"
        in line
    )


# --------------------------------------------------------------------------------- train and sample
def latent_settings(vae, *more):
    values = [
        *TINY,
        f"data.vae={vae}",
        "data.resolution=16",
        "data.downsample=4",
        "model.num_classes=2",
        *more,
    ]
    return [part for v in values for part in ("--set", v)]


@pytest.fixture(scope="module")
def trained(store, vae, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "latent"
    settings = latent_settings(
        vae, "train.sample_every=4", "train.sample_images=4", "train.precision=fp32"
    )
    result = run("train", "--preset", "s-256", "--data", store, "--out", root, *settings)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    return root


def test_run_on_store_is_sampled_through_its_vae(trained, vae, tmp_path):
    assert size_of(trained / "samples" / "step-00000004.png")[0] == "RGB"
    result = run("sample", trained, "--num", 3, "--steps", 2, "--classes", "0,1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    assert size_of(tmp_path / "000000.png") == ("RGB", (16, 16))
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["decoded_by"] == "vae"
    assert meta["vae"]["name"] == str(vae)
    assert len(meta["vae"]["weights_sha256"]) == 64
    assert meta["class_names"] == ["cat", "dog"]


def test_sample_without_vae_warns_and_previews(trained, vae, tmp_path, monkeypatch):
    hidden = vae.with_name("hidden")
    vae.rename(hidden)
    try:
        result = run("sample", trained, "--num", 1, "--steps", 2, "--out", tmp_path)
    finally:
        hidden.rename(vae)
    assert result.exit_code == 0, result.output
    warning = (
        "warning: the images are only previews of the latents, because the VAE cannot be used: "
        "data.vae: no folder"
    )
    assert warning in result.stderr
    assert size_of(tmp_path / "000000.png") == ("RGB", (16, 16))
    assert json.loads((tmp_path / "meta.json").read_text())["decoded_by"] == "linear preview"


def test_run_takes_size_channels_and_vae_from_its_store(images, tmp_path):
    """And says it in one line; a field that the user sets is not changed, but checked."""
    vae, target, root = (
        save_vae(tmp_path / "vae", latent_channels=16),
        tmp_path / "store",
        tmp_path / "run",
    )
    assert run("encode", images, target, "--vae", vae, *OPTIONS).exit_code == 0
    arguments = [
        "train",
        "--preset",
        "s-256",
        "--data",
        target,
        "--out",
        root,
        "--set",
        "model.num_classes=2",
    ]
    arguments += [part for v in (*TINY, "train.precision=fp32") for part in ("--set", v)]
    assert "data.channels: 4, but the latents in" in line_of(
        run(*arguments, "--set", "data.channels=4")
    )
    assert not root.exists()
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    line = f"taken from the latents in {str(target)!r}: data.resolution=16 instead of 256, "
    line += "data.channels=16 instead of 4, data.downsample=4 instead of 8, "
    line += f"data.vae={vae} instead of stabilityai/sd-vae-ft-ema"
    assert line in " ".join(result.stderr.split())
    saved = runs.read_config(root, "x").data
    assert (saved.resolution, saved.channels, saved.downsample, saved.vae) == (16, 16, 4, str(vae))
    assert (
        saved.vae_sha256
        == json.loads((target / "manifest.json").read_text())["settings"]["vae_weights_sha256"]
    )
    again = run(*arguments, "--set", "train.steps=6", "--resume")
    assert again.exit_code == 0, again.output


def test_run_of_relative_vae_is_sampled_from_another_folder(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_vae(tmp_path / "vaes" / "x", scaling_factor=0.9)
    assert run("encode", images, "store", "--vae", "vaes/x", *OPTIONS).exit_code == 0
    settings = latent_settings("vaes/x", "train.precision=fp32")
    assert (
        run("train", "--preset", "s-256", "--data", "store", "--out", "run", *settings).exit_code
        == 0
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    request = ["sample", tmp_path / "run", "--num", 1, "--steps", 2, "--out"]
    result = run(*request, "a")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    (tmp_path / "vaes").rename(tmp_path / "moved")
    result = run(*request, "b")
    line = f"because the VAE cannot be used: data.vae: no folder '{tmp_path}/vaes/x'"
    assert line in " ".join(result.stderr.split())


def changed_run(trained, folder, pattern, by):
    """A copy of a run with another configuration."""
    shutil.copytree(trained, folder)
    for path in folder.rglob("config.yaml"):
        path.write_text(re.sub(pattern, by, path.read_text()))
    return folder


def test_run_without_hash_of_its_vae_continues_and_gets_one(trained, tmp_path):
    """As those of earlier versions."""
    root = changed_run(trained, tmp_path / "run", "vae_sha256: .*", "vae_sha256: ''")
    result = run("train", "--resume", "--out", root, "--set", "train.steps=6")
    assert result.exit_code == 0, result.output
    assert (
        runs.read_config(root, "x").data.vae_sha256
        == runs.read_config(trained, "x").data.vae_sha256
        != ""
    )


def test_swapped_vae_is_reported_by_sample(trained, vae, tmp_path):
    other = save_vae(tmp_path / "other", seed=1)
    root = changed_run(trained, tmp_path / "run", re.escape(str(vae)), str(other))
    result = run("sample", root, "--num", 1, "--steps", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    line = f"data.vae: {str(other)!r} is not the VAE that made the latents of this run"
    assert f"warning: {line}" in " ".join(result.stderr.split())


def test_training_reports_latents_of_other_scale(images, tmp_path):
    vae, target = save_vae(tmp_path / "vae", scaling_factor=30.0), tmp_path / "store"
    assert run("encode", images, target, "--vae", vae, *OPTIONS).exit_code == 0
    result = run(
        "train",
        "--preset",
        "s-256",
        "--data",
        target,
        "--out",
        tmp_path / "run",
        *latent_settings(vae),
    )
    assert result.exit_code == 0, result.output
    line = "but training assumes about 0 and 1: check scaling_factor and shift_factor"
    assert line in " ".join(result.stderr.split())


def test_train_warns_of_missing_vae(store, vae, tmp_path, monkeypatch):
    hidden = vae.with_name("hidden")
    vae.rename(hidden)
    try:
        settings = latent_settings(
            vae, "train.sample_every=4", "train.sample_images=2", "train.precision=fp32"
        )
        result = run(
            "train", "--preset", "s-256", "--data", store, "--out", tmp_path / "run", *settings
        )
    finally:
        hidden.rename(vae)
    assert result.exit_code == 0, result.output
    assert "warning: the images are only previews" in result.stderr
    assert (tmp_path / "run" / "samples" / "step-00000004.png").is_file()


def test_store_keeps_the_listing(images, store):
    assert (store / "listing.jsonl").read_bytes() == b"".join(list_source(images).text())
