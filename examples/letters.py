"""Draw a folder of letters as white on black pictures of 28x28 pixels, one folder per letter: a
small data set to fine-tune on. The fonts are those of matplotlib.

python examples/letters.py letters
python examples/letters.py letters 10   # so many pictures of each letter, in place of 100
"""

import argparse
import string
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")  # also bold and oblique
SIDE = 28

parser = argparse.ArgumentParser(description="Draw a folder of letters, one folder per letter.")
parser.add_argument("target", type=Path, metavar="FOLDER")
parser.add_argument(
    "each", type=int, nargs="?", default=100, metavar="COUNT", help="pictures of each letter"
)
arguments = parser.parse_args()
target, each = arguments.target, arguments.each

generator = np.random.default_rng(0)
folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
files = [file for file in sorted(folder.glob("*.ttf")) if file.stem.startswith(FONTS)]
files = [file for file in files if "Display" not in file.stem]
for letter in string.ascii_uppercase:
    (target / letter).mkdir(parents=True, exist_ok=True)
    for i in range(each):
        font = ImageFont.truetype(str(files[i % len(files)]), int(generator.integers(18, 25)))
        x, y = SIDE / 2 + generator.uniform(-1.5, 1.5, 2)
        picture = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(picture).text((x, y), letter, fill=255, font=font, anchor="mm")
        picture = picture.rotate(generator.uniform(-12, 12), Image.Resampling.BICUBIC)
        picture.save(target / letter / f"{i}.png")
print(f"{each * len(string.ascii_uppercase):,} pictures in {target}")
