"""The classes of images from a table: a CSV file with a name and a label in each line, below a header or without."""

import csv
import logging
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path

from manyviews.data.label_table import read_table
from manyviews.data.listing.listing import Listing
from manyviews.data.sources.paths import most_alike, nearest, same_spelling
from manyviews.system.files import open_lines, shown
from manyviews.system.path_bytes import NOT_UTF8, is_raw

logger = logging.getLogger(__name__)

UNLABELLED = -1


def read_labels(path: Path, names: Collection[str]) -> Mapping[str, str]:
    """The label of each image that a table names, by the image's name; an image that it leaves out has none.

    The first two columns are the name and the label, further ones are passed over; commas, semicolons or tabs stand
    between them, and the first line may name them.
    How accents are composed (NFC, NFD) does not matter to labels, nor to names that nothing else tells apart.

    Args:
        path: the CSV file, in UTF-8.
        names: the images that there are.

    Raises:
        ValueError: naming the line: for a name that is no image's or stands twice, an empty label, or a missing column;
            or if there is no such file, or it labels no image.
    """
    if path.is_dir():
        raise ValueError(f"data.labels={path} is a folder; name a CSV file")
    if not path.is_file():
        raise ValueError(f"data.labels={path} does not exist; {nearest(path)}")
    lines: dict[str, int] = {}
    labels: dict[str, str] = {}
    known, not_utf8 = same_spelling(names), False
    try:
        with open_lines(path) as content:
            for number, row in read_table(path, content, known).rows:
                line = f"{shown(path)}, line {number}"
                if len(row) < 2:
                    raise ValueError(f"{line}: one column, where a name and a label should stand")
                given, label = row[0] if known(row[0]) else row[0].strip(), unicodedata.normalize("NFC", row[1].strip())
                not_utf8 = not_utf8 or is_raw(given + label)
                name = known(given)
                if name in lines:
                    raise ValueError(f"{line}: {shown(given)} stands in line {lines[name]} already")
                if name is None and is_raw(given):
                    raise ValueError(f"{line}: {shown(repr(given))} is not among the images; {NOT_UTF8}")
                if name is None:
                    alike = most_alike(given, names, 1, 0.5)
                    hint = (
                        f"did you mean {shown(alike[0])}?" if alike else "names are those below the folder, a/b/1.jpg"
                    )
                    raise ValueError(f"{line}: {shown(repr(given))} is not among the {len(names):,} images; {hint}")
                if not label:
                    raise ValueError(f"{line}: {shown(name)} has an empty label; leave the line out if it has none")
                lines[name], labels[name] = number, label
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not_utf8:
        logger.warning("%s: %s; what is not is shown as \\xe9", shown(path), NOT_UTF8)
    if not labels:
        raise ValueError(f"{path} labels no image: below the header there must be lines of a name and a label")
    return labels


def labelled(listing: Listing, labels: Mapping[str, str]) -> Listing:
    """The listing with the classes of a table, in alphabetical order, in place of what its sub-folders tell."""
    classes = tuple(sorted(set(labels.values())))
    number = {name: index for index, name in enumerate(classes)}
    found = [number[labels[name]] if name in labels else UNLABELLED for name in listing.names]
    return listing._replace(labels=found, classes=classes)
