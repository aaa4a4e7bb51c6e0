"""What a crash, another program or a stranger may leave in a run folder or among the images between two starts."""

import random
from pathlib import Path

DAMAGED = "newest checkpoint damaged"
LITTER = (
    DAMAGED,
    "stray folders among the checkpoints",
    "planted pickles",
    "half a line of metrics",
    "rubbish at the end of an event file",
    "broken image among the images",
)
INVENTED = "step-999999999"
MARK = "planted-pickle-was-run"
"""What a planted pickle would leave in the working folder."""
PICKLE = f"cos\nsystem\n(S'touch {MARK}'\ntR.".encode()


def litter(kind: str, run: Path, images: Path, draw: random.Random, damaged: bool) -> bool:
    """Leaves something; whether the newest checkpoint is no longer whole, which happens to one at a time."""
    steps = sorted(path for path in run.glob("checkpoints/step-*[0-9]") if path.name != INVENTED)
    if kind == DAMAGED:
        if damaged or len(steps) < 2:
            return False
        damage(draw.choice(sorted(steps[-1].iterdir())), draw)
        return True
    if kind == LITTER[1] and steps:
        for name in ("tmp", "step-abc", ".step-000000009.partial"):
            (run / "checkpoints" / name).mkdir(exist_ok=True)
        (run / "checkpoints" / INVENTED).mkdir(exist_ok=True)
        (run / "checkpoints" / INVENTED / "manifest.json").write_text('{"step": 999999999')
    elif kind == LITTER[2] and steps:
        for place in (run, run / "checkpoints", steps[-1]):
            (place / "optimiser.pt").write_bytes(PICKLE)
            (place / "random_states_0.pkl").write_bytes(PICKLE)
    elif kind == LITTER[3] and (run / "metrics.jsonl").exists():
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write('{"step": 1' + "0" * draw.randrange(9))
    elif kind == LITTER[4]:
        for file in sorted((run / "tensorboard").glob("events*"))[-1:]:
            with file.open("ab") as events:
                events.write(draw.randbytes(draw.randrange(1, 40)))
    elif kind == LITTER[5]:
        name = f"broken-{draw.randrange(4)}.png"
        content = min(images.rglob("*.png")).read_bytes()
        (images / "a" / name).write_bytes(draw.choice([b"", content[: len(content) // 2], b"no image"]))
    return False


def damage(file: Path, draw: random.Random) -> None:
    """A file that was cut off, emptied, changed in one place, or is gone."""
    content = file.read_bytes()
    match draw.randrange(4):
        case 0:
            file.write_bytes(content[: len(content) // 2])
        case 1:
            file.write_bytes(b"")
        case 2:
            place = draw.randrange(max(1, len(content)))
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        case _:
            file.unlink()
