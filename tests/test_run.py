import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contrastive.run import Run, prepare, read_metrics


def test_metrics_are_lines_and_curves_from_the_first_step_and_never_double_back(tmp_path: Path) -> None:
    first = Run(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": step / 2, "std": float("nan")})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    # Event files are read in the order of their names, which begin with the second in which they were opened.
    time.sleep(1.1)
    second = Run(tmp_path, step=2)
    second.log(3, {"loss": 9.0})
    second.finish()
    lines = list(read_metrics(tmp_path))
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert lines[0]["std"] is None
    assert (tmp_path / "done").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_picture_is_a_file_and_an_event(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.picture("views", torch.zeros(3, 8, 12, dtype=torch.uint8))
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert (tmp_path / "views.png").exists()
    assert (events.Images("views")[0].height, events.Images("views")[0].width) == (8, 12)


def test_a_histogram_counts_every_value_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.histogram("similarity/negative", torch.linspace(-1, 1, 100, dtype=torch.bfloat16), 7)
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Histograms("similarity/negative")
    assert event.step == 7
    assert event.histogram_value.num == sum(event.histogram_value.bucket) == 100
    assert (event.histogram_value.min, event.histogram_value.max) == (-1, 1)


def test_a_folder_with_anything_in_it_is_never_overwritten_silently(tmp_path: Path) -> None:
    prepare(tmp_path / "new", resume=False)
    prepare(tmp_path, resume=False)
    (tmp_path / "photo.jpg").touch()
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            prepare(tmp_path, resume=resume)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="resume=true"):
        prepare(tmp_path, resume=False)
    prepare(tmp_path, resume=True)
    with pytest.raises(ValueError, match="is a file"):
        prepare(tmp_path / "photo.jpg", resume=True)
