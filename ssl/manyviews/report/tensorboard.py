"""The report's pictures for TensorBoard, and embeddings for its projector."""

from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from manyviews.data import Images
from manyviews.engine import normalize
from manyviews.evaluators.confusion import as_pixels
from manyviews.evaluators.map import principal_components
from manyviews.report.contents import DPI, Contents, Query, references
from manyviews.report.findings import Findings, drawn, labels_of
from manyviews.report.history import read_history
from manyviews.report.pictures import sheet, thumbnails
from manyviews.report.sampling import sampling_figures_of
from manyviews.system.files import spelled
from manyviews.system.writing import aside_of, folder_path, make_folder, remove, rename
from manyviews.views import StandardView

FOLDER = "evaluation"
MOST = 2_000
"""Embeddings in the projector."""
WIDEST = 128
"""Width of embeddings above which their principal components are written: the projector uses at most 200 numbers."""
SHEET = 8192
"""Side of the largest sprite sheet that the projector takes, in pixels."""
SIDE, FRAME = 64, 3
TILE = SIDE + 4 * FRAME
RIGHT, WRONG = (46, 125, 79), (179, 64, 46)


def write_tensorboard(findings: Findings, contents: Contents, seed: int, folder: Path) -> None:
    """Writes the contents of the page into FOLDER/evaluation, replacing an earlier report's.

    Raises:
        OSError: if it cannot be written; the older files stay.
    """
    root, aside = folder.parent, aside_of(folder / FOLDER)
    try:
        make_folder(aside, root, new=True)
        with folder_path(aside, root) as path, SummaryWriter(str(path)) as writer:
            _write(writer, findings, contents, seed)
        remove(folder / FOLDER, root)
        rename(aside, folder / FOLDER, root)
    finally:
        with suppress(OSError):
            remove(aside, root)


def _write(writer: SummaryWriter, findings: Findings, contents: Contents, seed: int) -> None:
    rows = {"drawn at random": contents.random, "wrong": contents.wrong, "mistakes alike": contents.alike}
    for name, queries in rows.items():
        if queries:
            writer.add_image(f"neighbours/{name}", neighbour_rows(findings, queries))
    for title, picture in contents.maps.items():
        writer.add_image(f"map/{title}", picture)
    if contents.matrix is not None:
        writer.add_image("confusion", contents.matrix)
    if contents.histogram is not None:
        writer.add_image("similarities", as_pixels(contents.histogram, DPI))
    if contents.verified is not None:
        writer.add_image("verification/ROC curves", as_pixels(contents.verified.figure, DPI))
    for name, figure in sampling_figures_of(findings.folder, read_history(findings.folder).metrics).items():
        writer.add_image(f"sampling/{name}", as_pixels(figure, DPI))
    if verdict := findings.evaluation.verdict():
        writer.add_text("verdict", verdict)
    _project(writer, findings, seed)


def neighbour_rows(findings: Findings, queries: tuple[Query, ...]) -> UInt8[Tensor, "3 height width"]:
    """Draws a row for each query and its neighbours, dashed frames for other classes."""
    columns = 1 + max(len(query.near) for query in queries)
    tiles = torch.full((len(queries), columns, 3, TILE, TILE), 255, dtype=torch.uint8)
    images, *_ = references(findings)
    for row, query in enumerate(queries):
        pictures = [_squares(findings.shown, [query.id], findings.view)]
        pictures += [_squares(images, [near.id for near in query.near], findings.view)] if query.near else []
        inside = slice(2 * FRAME, 2 * FRAME + SIDE)
        tiles[row, : 1 + len(query.near), :, inside, inside] = torch.cat(pictures)
        for column, near in enumerate(query.near, 1):
            if near.right is not None:
                colour = torch.tensor(RIGHT if near.right else WRONG, dtype=torch.uint8)
                tiles[row, column][:, _frame(dashed=not near.right)] = colour[:, None]
    return sheet(tiles.flatten(0, 1), columns, TILE)


def _squares(images: Images, ids: list[int], view: StandardView | None) -> Tensor:
    """Images in colour at SIDE × SIDE pixels; small ones are enlarged without smoothing."""
    small = thumbnails(images, torch.tensor(ids), SIDE, view)
    if small.shape[-1] != SIDE:
        small = F.interpolate(small.float(), (SIDE, SIDE), mode="nearest").to(torch.uint8)
    return small.expand(-1, 3, -1, -1)


def _frame(*, dashed: bool) -> Tensor:
    """The pixels of a tile's frame, bool [TILE, TILE]."""
    frame = torch.ones(TILE, TILE, dtype=torch.bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    if dashed:
        along = torch.arange(TILE) // 6
        frame &= ((along[:, None] + along) % 2) == 0
    return frame


def _project(writer: SummaryWriter, findings: Findings, seed: int) -> None:
    """Writes the unit features of some images, with class, name and thumbnail."""
    features, images = findings.features[findings.kind][1], findings.shown
    ids = drawn(torch.arange(len(images)), MOST, seed, 8).sort().values
    embeddings = normalize(features[ids].double())
    if embeddings.shape[1] > WIDEST:
        embeddings = principal_components(embeddings, min(WIDEST, len(ids)))
    side = min(32, SHEET // max(1, int(len(ids) ** 0.5 + 1)))
    small = thumbnails(images, ids, side, findings.view).float() / 255
    pairs = zip(labels_of(images)[ids].tolist(), ids.tolist(), strict=True)
    writer.add_embedding(
        # Written as text: four digits are more than a screen shows.
        embeddings.numpy().round(4),
        metadata=[[findings.class_name(label), spelled(images.names[index])] for label, index in pairs],
        metadata_header=["class", "image"],
        label_img=small.expand(-1, 3, -1, -1),
        tag=findings.kind,
    )
