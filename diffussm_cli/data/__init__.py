"""Sources of training images, and reading and writing images."""
