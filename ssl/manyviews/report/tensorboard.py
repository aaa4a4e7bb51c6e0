"""The pictures of the report for TensorBoard, and the embeddings with small pictures for its projector."""

from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from manyviews.engine import normalize
from manyviews.evaluators.confusion import as_pixels
from manyviews.evaluators.map import principal_components
from manyviews.report.findings import Findings, drawn, labels_of
from manyviews.report.look import Look
from manyviews.report.neighbours import Query
from manyviews.report.pictures import sheet, thumbnails
from manyviews.system.files import spelled
from manyviews.system.writing import aside_of, folder_path, make_folder, remove, rename

FOLDER = "evaluation"
MOST = 2_000
"""Embeddings of the projector."""
WIDEST = 128
"""Numbers of an embedding beyond which the first principal components stand for it: the projector itself looks at no
more than 200."""
SHEET = 8192
"""Side of the largest sheet of small pictures that the projector takes, in pixels."""
SIDE = 64
FRAME = 3
RIGHT, WRONG = (46, 125, 79), (179, 64, 46)


def write_tensorboard(findings: Findings, seen: Look, seed: int, place: Path | None = None) -> None:
    """Writes what the page shows into the folder `evaluation` of a place, instead of what an earlier report left there.

    The place is RUN/tensorboard, or another.

    Raises:
        OSError: if it cannot be written; what was there then stays.
    """
    place = place or findings.folder / "tensorboard"
    root, aside = place.parent, aside_of(place / FOLDER)
    try:
        make_folder(aside, root, new=True)
        with folder_path(aside, root) as path, SummaryWriter(str(path)) as writer:
            _write(writer, findings, seen, seed)
        remove(place / FOLDER, root)
        rename(aside, place / FOLDER, root)
    finally:
        with suppress(OSError):
            remove(aside, root)


def _write(writer: SummaryWriter, findings: Findings, seen: Look, seed: int) -> None:
    for name, queries in (("drawn at random", seen.random), ("wrong", seen.wrong), ("mistakes alike", seen.alike)):
        if queries:
            writer.add_image(f"neighbours/{name}", rows(findings, seen, queries))
    figures = {f"map/{title}": figure for title, figure in seen.maps.items()}
    figures |= {"confusion": seen.matrix} if seen.matrix is not None else {}
    figures |= {"similarities": seen.histogram} if seen.histogram is not None else {}
    for name, figure in figures.items():
        writer.add_image(name, as_pixels(figure, dpi=110))
    if verdict := findings.evaluation.verdict():
        writer.add_text("verdict", verdict)
    _project(writer, findings, seed)


def rows(findings: Findings, seen: Look, queries: tuple[Query, ...]) -> UInt8[Tensor, "3 height width"]:
    """A row for each query: the image, then its neighbours, of its class in a full frame, of others in a dashed one."""
    columns = 1 + max(len(query.near) for query in queries)
    place = torch.full((len(queries), columns, 3, SIDE + 4 * FRAME, SIDE + 4 * FRAME), 255, dtype=torch.uint8)
    own = _squares(thumbnails(findings.shown, torch.tensor([query.id for query in queries]), SIDE))
    inside = slice(2 * FRAME, 2 * FRAME + SIDE)
    place[:, 0, :, inside, inside] = own
    for row, query in enumerate(queries):
        if not query.near:
            continue
        ids = torch.tensor([near.id for near in query.near])
        found = _squares(thumbnails(seen.searched.images, ids, SIDE))
        for column, near in enumerate(query.near):
            place[row, column + 1] = _framed(found[column], near.right)
    return sheet(place.flatten(0, 1), columns, place.shape[-1])


def _squares(small: Tensor) -> Tensor:
    """Colour pictures of one size, small ones enlarged without smoothing."""
    if small.shape[-1] != SIDE:
        small = F.interpolate(small.float(), (SIDE, SIDE), mode="nearest").to(torch.uint8)
    return small.expand(-1, 3, -1, -1)


def _framed(picture: Tensor, right: bool | None) -> Tensor:
    outer = SIDE + 4 * FRAME
    framed = torch.full((3, outer, outer), 255, dtype=torch.uint8)
    if right is not None:
        ring = torch.ones(outer, outer, dtype=torch.bool)
        ring[FRAME:-FRAME, FRAME:-FRAME] = False
        if not right:
            along = torch.arange(outer) // 6
            ring &= ((along[:, None] + along) % 2) == 0
        framed[:, ring] = torch.tensor(RIGHT if right else WRONG, dtype=torch.uint8)[:, None]
    framed[:, 2 * FRAME : 2 * FRAME + SIDE, 2 * FRAME : 2 * FRAME + SIDE] = picture
    return framed


def _project(writer: SummaryWriter, findings: Findings, seed: int) -> None:
    """The unit features of some images, with class, name and a small picture."""
    features, images = findings.features[findings.kind][1], findings.shown
    ids = drawn(torch.arange(len(images)), MOST, seed, 8).sort().values
    embeddings = normalize(features[ids].double())
    if embeddings.shape[1] > WIDEST:
        embeddings = principal_components(embeddings, min(WIDEST, len(ids)))
    side = min(32, SHEET // max(1, int(len(ids) ** 0.5 + 1)))
    small = thumbnails(images, ids, side).float() / 255
    labels = labels_of(images)[ids].tolist()
    metadata = [
        [findings.class_name(label), spelled(images.names[index])]
        for label, index in zip(labels, ids.tolist(), strict=True)
    ]
    writer.add_embedding(
        # As text: four digits tell more than a screen shows.
        embeddings.numpy().round(4),
        metadata=metadata,
        metadata_header=["class", "image"],
        label_img=small.expand(-1, 3, -1, -1),
        tag=findings.kind,
    )
