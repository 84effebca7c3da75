"""Where training images come from, and how pictures are read and written."""
