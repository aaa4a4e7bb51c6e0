"""Stage 7: of how many JPEG files the machine's cores cut two crops in a second."""

import os
import time
from collections.abc import Iterator
from itertools import islice

from gpu_checks.measure import Row, Setup
from gpu_checks.pictures import HEIGHT, WIDTH, write_pictures
from manyviews.data import Folder, Loader, Order
from manyviews.views import ViewsSettings

SIZE = 224


def rows(setup: Setup) -> Iterator[Row]:
    """Reads the crops of batches through the loader with one worker and with one for each core."""
    folder = write_pictures(setup.folder.parent / "pictures", setup.pick(4096, 64))
    cores = os.cpu_count() or 1
    begin = time.perf_counter()
    images = Folder(path=str(folder), size=SIZE, memory=0, holdout=0).build(workers=cores).train
    seconds = time.perf_counter() - begin
    yield Row("listing and checking of the files", len(images) / seconds, "files/s")
    batch, views = setup.pick(256, 8), ViewsSettings().build(size=SIZE, channels=3, seed=0)
    one = 0.0
    for workers in dict.fromkeys((1, cores)):
        batches = iter(Loader(images, Order(len(images), batch, seed=0), views, workers=workers))
        # The workers have started and are ahead when the clock starts.
        warm, counted = setup.pick((2 * workers, 2 + workers), (1, 2))
        for _ in islice(batches, warm):
            pass
        begin = time.perf_counter()
        for _ in islice(batches, counted):
            pass
        rate = counted * batch / (time.perf_counter() - begin)
        one = one or rate
        note = f"{WIDTH} × {HEIGHT} to two crops of {SIZE} pixels; {rate / one / workers:.0%} of {workers} × one worker"
        yield Row(f"decoding, {workers} worker{'s' if workers > 1 else ''}", rate, "images/s", note=note)
        del batches
