"""List the images of a folder, file or data set of the hub in a fixed order, and all else in it
with the reason why it is not used.

Layouts: one folder per class; a flat folder (no classes); labels in a file beside the images;
WebDataset shards (*.tar), where KEY.cls holds the label of KEY.jpg as an integer, or with one
folder per class; parquet shards (../parquet.py); .npz files (../arrays.py); CIFAR's binary batches
(../cifar.py). Shards are read in place.

source.py    list_source: a folder, a file, a pattern, or hub:OWNER/NAME (hub.py)
folders.py   one folder per class, or a flat folder; labels.py: labels in files beside the images
shards.py    tar and parquet shards; arrays.py: .npz files and CIFAR
splits.py    names that tell a split of a data set
entries.py   an image of a source, and how it is read
beside.py    what `diffussm sample` writes beside images
left_out.py  what is not used, and why
"""

from diffussm_cli.data.listing.entries import (
    MAX_FILE_BYTES,
    Entry,
    Listing,
    entry_size,
    read_entry,
)
from diffussm_cli.data.listing.left_out import (
    UNREADABLE,
    LeftOut,
    empty_classes,
    left_out_line,
    skipped_text,
)
from diffussm_cli.data.listing.source import list_source
