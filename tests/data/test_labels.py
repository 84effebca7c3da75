"""Labels that stand in a file beside images: metadata.jsonl, metadata.csv, and ImageNet's lists."""

import json

import numpy as np
import pytest
from PIL import Image

from diffussm_cli.data.captions import read_captions
from diffussm_cli.data.listing import list_source
from diffussm_cli.errors import DataError

IMAGENET = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)]


def write(root, names, files):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


LABELLED = {  # images; files; labels in the order of the listing; class names
    "numbers in metadata.jsonl": (
        ["1.png", "2.png"],
        {
            "metadata.jsonl": lines(
                {"file_name": "2.png", "label": 0}, {"file_name": "1.png", "label": 2}
            )
        },
        [2, 0],
        "012",
    ),
    "names in metadata.csv": (
        ["1.png", "2.png", "3.png"],
        {"metadata.csv": 'label,file_name\ndog,1.png\n"cat, big",2.png\ndog,3.png\n'},
        [1, 0, 1],
        ("cat, big", "dog"),
    ),
    "numbers in metadata.csv, with a mark of the byte order and Windows' line ends": (
        ["1.png", "2.png"],
        {"metadata.csv": "\ufefffile_name,label\r\n1.png,1\r\n2.png,0\r\n"},
        [1, 0],
        "01",
    ),
    "spaces after commas and at ends": (
        ["1.png", "2.png", "3.png"],
        {
            "metadata.csv": 'file_name , label, text\n1.png, cat , red\n2.png,dog,"a, b"\n'
            '3.png, "cat", "red, round"\n'
        },
        [0, 1, 0],
        ("cat", "dog"),
    ),
    "spaces before numbers": (
        ["1.png", "2.png"],
        {"metadata.csv": "file_name, label\n1.png, 1\n2.png, 0\n"},
        [1, 0],
        "01",
    ),
    "images in a folder below": (
        ["images/1.png", "images/2.png"],
        {"metadata.csv": "file_name,label\nimages/1.png,b\nimages/2.png,a\n"},
        [1, 0],
        "ab",
    ),
    "a file in each of several folders": (
        ["x/1.png", "y/1.png"],
        {
            "x/metadata.csv": "file_name,label\n1.png,b\n",
            "y/metadata.jsonl": lines({"file_name": "1.png", "label": "a"}),
        },
        [1, 0],
        "ab",
    ),
    "class folders, whose metadata has captions only": (
        ["x/1.png", "y/1.png"],
        {"metadata.csv": "file_name,text\nx/1.png,b\ny/1.png,a\n"},
        [0, 1],
        "xy",
    ),
    "labels after a blank line": (
        ["1.png", "2.png"],
        {"metadata.jsonl": "\n" + lines(*({"file_name": f"{i}.png", "label": i} for i in (2, 1)))},
        [1, 2],
        "012",
    ),
    "a table after blank lines": (
        ["1.png", "2.png"],
        {"metadata.csv": "\n , \nfile_name,label\n1.png,b\n\n2.png,a\n"},
        [1, 0],
        "ab",
    ),
    "a first record of more than 64 KiB": (
        ["1.png"],
        {"metadata.jsonl": lines({"text": "x" * (1 << 17), "label": "a", "file_name": "1.png"})},
        [0],
        "a",
    ),
    "ImageNet's ground truth, from 1": (
        IMAGENET,
        {"ILSVRC2012_validation_ground_truth.txt": "3\n1\n2\n3\n"},
        [2, 0, 1, 2],
        "123",
    ),
    "synsets in the order of images": (
        IMAGENET,
        {"imagenet_2012_validation_synset_labels.txt": "n02\nn01\nn02\nn03\n"},
        [1, 0, 1, 2],
        ("n01", "n02", "n03"),
    ),
    "a map of names to numbers from 0": (
        IMAGENET,
        {"val_map.txt": "".join(f"{n} {i}\n" for n, i in zip(reversed(IMAGENET), [0, 1, 4, 0]))},
        [0, 4, 1, 0],
        "01234",
    ),
    "Caffe's list": (IMAGENET, {"val.txt": "".join(f"{n} 1\n" for n in IMAGENET)}, [1] * 4, "01"),
    "Kaggle's table": (
        IMAGENET,
        {
            "LOC_val_solution.csv": "ImageId,PredictionString\n"
            + "".join(f"{n[:-5]},n0{i % 2} 85 1 499 272 \n" for i, n in enumerate(IMAGENET))
        },
        [0, 1, 0, 1],
        ("n00", "n01"),
    ),
}


@pytest.mark.parametrize("case", LABELLED)
def test_labels_beside_images(tmp_path, case):
    names, files, labels, classes = LABELLED[case]
    listing = list_source(write(tmp_path, names, files))
    assert [e.name for e in listing.entries] == sorted(names)
    assert [e.label for e in listing.entries] == labels
    assert listing.class_names == tuple(classes)
    assert not listing.left_out(with_text=True)


def test_one_file_holds_labels_and_captions(tmp_path):
    table = 'file_name,label,text\n1.png,a,"red, round"\n2.png,b,\n'
    listing = list_source(write(tmp_path, ["1.png", "2.png"], {"metadata.csv": table}))
    assert listing.class_names == ("a", "b")
    assert read_captions(listing) == {"1.png": ("red, round",)}


def test_captions_of_a_table_with_spaces_after_commas_are_read(tmp_path):
    table = 'file_name, text\n1.png, "red, round"\n2.png, blue\n'
    listing = list_source(write(tmp_path, ["1.png", "2.png"], {"metadata.csv": table}))
    assert read_captions(listing) == {"1.png": ("red, round",), "2.png": ("blue",)}


def test_an_image_may_be_named_twice_with_one_label(tmp_path):
    table = "file_name,label,text\n1.png,a,red\n2.png,b,blue\n1.png,a,round\n"
    listing = list_source(write(tmp_path, ["1.png", "2.png"], {"metadata.csv": table}))
    assert [e.label for e in listing.entries] == [0, 1]
    assert read_captions(listing) == {"1.png": ("red", "round"), "2.png": ("blue",)}


def test_captions_in_text_files_stay_beside_labels_in_metadata(tmp_path):
    files = {"metadata.csv": "file_name,label\n1.png,a\n", "1.txt": "red\n"}
    assert read_captions(list_source(write(tmp_path, ["1.png"], files))) == {"1.png": ("red",)}


def test_captions_are_read_although_the_first_record_has_none(tmp_path):
    records = lines(
        {"file_name": "1.png", "label": 0}, {"file_name": "2.png", "label": 1, "text": "blue"}
    )
    files = {"metadata.jsonl": records, "1.txt": "red\n"}
    listing = list_source(write(tmp_path, ["1.png", "2.png"], files))
    left_out = []
    assert read_captions(listing, left_out=left_out) == {"2.png": ("blue",)}
    why = "beside a metadata.jsonl, which is read instead"
    assert left_out == [(1, "file", why, "1.txt")]


WRONG = {
    "an image without a label": (
        ["1.png", "2.png"],
        {"metadata.csv": "file_name,label\n1.png,0\n"},
        "2.png has no label in ROOT/metadata.csv, but other images have one; label all of them",
    ),
    "numbers and names": (
        ["1.png", "2.png"],
        {"metadata.csv": "file_name,label\n1.png,0\n2.png,cat\n"},
        "ROOT/metadata.csv: some labels are numbers and some are names",
    ),
    "a first record without a label": (
        ["1.png", "2.png"],
        {"metadata.jsonl": lines({"file_name": "1.png"}, {"file_name": "2.png", "label": 0})},
        "1.png has no label in ROOT/metadata.jsonl, but other images have one; label all of them",
    ),
    "a damaged line among labels": (
        ["1.png"],
        {"metadata.jsonl": "{\n" + lines({"file_name": "1.png", "label": 0})},
        "ROOT/metadata.jsonl: line 1: Expecting property name",
    ),
    "a list of labels": (
        ["1.png"],
        {"metadata.jsonl": lines({"file_name": "1.png", "label": [1, 2]})},
        "ROOT/metadata.jsonl: line 1: the label [1, 2] must be a name, or a whole number from 0 to",
    ),
    "a negative label": (
        ["1.png"],
        {"metadata.jsonl": lines({"file_name": "1.png", "label": -1})},
        "line 1: the label -1 must be",
    ),
    "a row that is too short": (
        ["1.png"],
        {"metadata.csv": "file_name,text,label\n1.png,red\n"},
        "ROOT/metadata.csv: line 2: has not 3 values, as line 1",
    ),
    "a row that is too long, below a blank line": (
        ["1.png"],
        {"metadata.csv": "\nfile_name,label\n1.png,red,0\n"},
        "ROOT/metadata.csv: line 3: has not 2 values, as line 2",
    ),
    "no file_name": (
        ["1.png"],
        {"metadata.csv": "file,label\n1.png,0\n"},
        "metadata.csv: has no column file_name; its columns must be separated by commas",
    ),
    "columns separated by semicolons": (
        ["1.png"],
        {"metadata.csv": "file_name;label\n1.png;0\n"},
        "ROOT/metadata.csv: has no column file_name; its columns must be separated by commas",
    ),
    "columns separated by tabs, and a comma in a caption": (
        ["1.png"],
        {"metadata.csv": "file_name\ttext\n1.png\tred, round\n"},
        "ROOT/metadata.csv: has no column file_name; its columns must be separated by commas",
    ),
    "two labels of an image": (
        ["1.png"],
        {"metadata.jsonl": lines(*({"file_name": "1.png", "label": n} for n in (0, 2)))},
        "ROOT/metadata.jsonl: line 2: 1.png has the label 2 here, but 0 before; give it one label",
    ),
    "two labels of an image, one in its folder and one above": (
        ["x/1.png"],
        {
            "metadata.csv": "file_name,label\nx/1.png,a\n",
            "x/metadata.csv": "file_name,label\n1.png,b\n",
        },
        "ROOT/x/metadata.csv: line 2: x/1.png has the label 'b' here, but 'a' before; give it one",
    ),
    "two labels of an image in a map": (
        IMAGENET[:1],
        {"val_map.txt": f"{IMAGENET[0]} 3\n{IMAGENET[0]} 4\n"},
        "has the label '4' here, but '3' before; give it one label",
    ),
    "splits": (
        ["train/1.png", "test/1.png"],
        {"metadata.csv": "file_name,label\ntrain/1.png,0\ntest/1.png,1\n"},
        "ROOT' holds the splits test, train of a data set",
    ),
    "a list of another length": (
        IMAGENET,
        {"ILSVRC2012_validation_ground_truth.txt": "1\n2\n"},
        "holds 2 labels for 4 images; it must name the class of each image in the order",
    ),
    "a ground truth from 0": (
        IMAGENET,
        {"ILSVRC2012_validation_ground_truth.txt": "0\n1\n2\n0\n"},
        "holds the label 0, but the classes of ILSVRC begin at 1",
    ),
    "a map that lacks an image": (
        IMAGENET,
        {"val_map.txt": f"{IMAGENET[0]} 3\n"},
        f"{IMAGENET[1]} has no label in ROOT/val_map.txt",
    ),
    "a list of three columns": (
        IMAGENET,
        {"val.txt": "a b c\n"},
        "val.txt: line 1 must hold a label",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_labels_that_do_not_fit_are_one_line(tmp_path, case):
    names, files, line = WRONG[case]
    with pytest.raises(DataError, match=r"^data\.path: ") as refused:
        list_source(write(tmp_path, names, files), "data.path")
    assert line in str(refused.value).replace(str(tmp_path), "ROOT")
    assert "\n" not in str(refused.value)
