"""The ADM evaluation: features of images, metrics of features, references to compare with."""
