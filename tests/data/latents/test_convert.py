"""Stores of format 1, which earlier versions wrote: refused with one line, and converted without
encoding.
"""

import hashlib
import json

import pytest

from diffussm_cli.data.latents import convert, encoding
from diffussm_cli.data.latents.convert import convert_store
from diffussm_cli.data.latents.reading import LatentStore
from diffussm_cli.data.latents.store import read_store, verify
from diffussm_cli.errors import DataError
from diffussm_cli.events import Message
from tests.conftest import save_vae
from tests.data.test_latents import generators, make_encoder, make_source, write_store
from tests.helpers import Killed, line_of, run

SHARDS = [f"shard-{i:05d}.safetensors" for i in range(3)]
REASON = "not a PNG, JPEG, WEBP, BMP, GIF, TIFF image"
SKIPPED = [
    {"index": 5, "file": "cat/05.png", "reason": REASON},
    {"index": None, "file": "dog/notes.txt", "reason": "not an image by its name or first bytes"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The encoder of a store of this version, which it has written."""
    folder = tmp_path_factory.mktemp("made")
    save_vae(folder / "vae")
    make_source(folder / "images")
    encoder = make_encoder(folder)
    write_store(encoder)
    return encoder


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def earlier_store(made, target, complete=True):
    """A store as version 0.2.0 wrote it; if not complete, without its last shard."""
    target.mkdir()
    for name in ["listing.jsonl", *SHARDS[: 3 if complete else 2]]:
        (target / name).write_bytes((made.store / name).read_bytes())
    settings = json.loads((made.store / "manifest.json").read_text())["settings"]
    del settings["columns"]
    manifest = {
        "format": 1,
        "complete": complete,
        "settings": settings,
        "dtype": "float16",
        "crop": "ADM: halve by boxes, resize bicubically, cut the middle",
        "counts": {"images": 10, "skipped": 1},
        "skipped_sha256": "",
        "shards": [],
        "versions": {"diffussm": "0.2.0", "torch": "2.9.0", "diffusers": "0.35.0"},
    }
    if complete:
        (target / "skipped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SKIPPED))
        manifest["skipped_sha256"] = sha256(target / "skipped.jsonl")
        hashes = [sha256(target / name) for name in SHARDS]
        manifest["shards"] = [
            {"file": name, "sha256": digest, "skipped": number}
            for name, digest, number in zip(SHARDS, hashes, (0, 1, 0))
        ]
    else:
        for i, skipped in enumerate(([], SKIPPED[:1])):
            record = {"sha256": sha256(target / SHARDS[i]), "skipped": skipped}
            (target / f"shard-{i:05d}.json").write_text(json.dumps(record))
    (target / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return target


def shards_of(store):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in store.glob("*.safetensors")}


def test_earlier_store_is_rejected_with_the_command_that_converts_it(made, tmp_path):
    store = earlier_store(made, tmp_path / "my store")
    line = (
        "is a store of an earlier version; convert it, which encodes nothing again, by: "
        f"diffussm encode '{store}'"
    )
    with pytest.raises(DataError, match=f"^data.path: '{store}' {line}$"):
        LatentStore(store, flip=True)
    assert f"--verify: '{store}' {line}" in line_of(run("encode", "--verify", store))


def test_converted_store_has_the_same_shards_and_is_read_as_a_new_one(made, tmp_path, monkeypatch):
    store = earlier_store(made, tmp_path / "store")
    before = shards_of(store)
    monkeypatch.setattr(encoding, "load_vae", None)
    result = run("encode", store)
    assert result.exit_code == 0, result.output
    assert (
        f"{store} is converted from an earlier version; its shards are unchanged" in result.stderr
    )
    assert shards_of(store) == before
    assert not (store / "skipped.jsonl").exists()
    assert [problem for _, problem in verify(store)] == [None] * 4
    old, new = read_store(store, "x"), read_store(made.store, "x")
    assert old.settings == new.settings
    assert [(r.sha256, r.skipped) for r in old.records] == [
        (r.sha256, r.skipped) for r in new.records
    ]
    assert (store / "ignored.jsonl").read_bytes() == (made.store / "ignored.jsonl").read_bytes()
    x, labels = LatentStore(store, flip=True).read([1, 8], generators(2))
    y, same = LatentStore(made.store, flip=True).read([1, 8], generators(2))
    assert x.equal(y)
    assert labels.equal(same)
    assert f"{store} needs no conversion" in run("encode", store).stderr


@pytest.mark.parametrize("complete", [True, False])
def test_command_that_made_an_earlier_store_converts_and_continues_it(made, tmp_path, complete):
    store = earlier_store(made, tmp_path / "store", complete)
    before = shards_of(store)
    command = read_store(made.store, "x").settings.command(store).split()
    words = [made.listing.root if word == "SOURCE" else word for word in command]
    result = run(*words[1:], "--workers", 0, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "is converted from an earlier version" in result.stderr
    assert ("is complete already" if complete else "2 of 3 shards of") in result.stderr
    after = shards_of(store)
    assert {name: after[name] for name in before} == before
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in shards_of(made.store).items()
    }


@pytest.mark.parametrize("text", [None, "no JSON", "[]", json.dumps(SKIPPED[1])])
def test_shard_whose_skipped_images_are_not_known_is_named_and_encoded_again(made, tmp_path, text):
    store = earlier_store(made, tmp_path / "store")
    (store / "skipped.jsonl").unlink() if text is None else (store / "skipped.jsonl").write_text(
        text
    )
    messages = [event.text for event in convert_store(store) if isinstance(event, Message)]
    assert (
        "skipped.jsonl is damaged, and 1 shards have skipped images; encode them again by: diff"
        in messages[1]
    )
    with pytest.raises(
        DataError, match="is not finished; run the same diffussm encode command again"
    ):
        LatentStore(store, flip=True)
    write_store(make_encoder(made.store.parent, target=store))
    for name in ("shard-00001.safetensors", "shard-00001.json"):
        assert (store / name).read_bytes() == (made.store / name).read_bytes()


def dying(write, left):
    """A function that writes until `left` is used up, and then dies."""

    def write_or_die(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        write(*arguments)

    return write_or_die


@pytest.mark.parametrize("survived", range(5))
def test_interrupted_conversion_is_repeated(made, tmp_path, monkeypatch, survived):
    """The death of the process before any of its writes: three records, the ignored files, the
    manifest.
    """
    complete = earlier_store(made, tmp_path / "complete")
    list(convert_store(complete))
    store = earlier_store(made, tmp_path / "store")
    left = [survived]
    with monkeypatch.context() as patched:
        for name in ("write_record", "write_text"):
            patched.setattr(convert, name, dying(getattr(convert, name), left))
        with pytest.raises(Killed):
            list(convert_store(store))
    list(convert_store(store))
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (store, complete)]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "change", [{"shards": [{}] * 3}, {"shards": 5}, {"shards": [{}]}, {"settings": {}}]
)
def test_damaged_manifest_of_earlier_store_is_one_line_error(made, tmp_path, change):
    store = earlier_store(made, tmp_path / "store")
    path = store / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = {p.name: p.read_bytes() for p in store.iterdir()}
    assert f"TARGET: {path} is damaged" in line_of(run("encode", store))
    assert {
        p.name: p.read_bytes() for p in store.iterdir() if not p.name.startswith(".lock")
    } == before
