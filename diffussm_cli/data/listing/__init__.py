"""List the images of a folder or archive in a fixed order, and all else in it with the reason why
it is not used.

Four layouts: one folder per class; a flat folder (no classes); WebDataset shards (*.tar), where
KEY.cls holds the label of KEY.jpg as an integer; parquet shards (../parquet.py). Shards are read in
place.

source.py    list_source: a folder, a shard or a pattern
folders.py   one folder per class, or a flat folder; shards.py: tar and parquet shards
beside.py    what `diffussm sample` writes beside images
splits.py    names that tell a split of a data set
entries.py   an image of a source, and how it is read
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
    left_out_line,
    skipped_text,
)
from diffussm_cli.data.listing.source import list_source
