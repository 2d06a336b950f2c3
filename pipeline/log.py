"""What a run says: metrics.jsonl for programs, TensorBoard for eyes, a bar and plain lines for the
terminal.

`metrics.jsonl` has one object a reported step (step, loss, lr, grad_norm, images_per_second,
seconds, what the stage adds), floats to the last digit. A run that resumes at step S first drops
what a killed attempt wrote after S, so that each step stands once.
"""

import io
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.files import write_atomically

log = logging.getLogger("cascade")
LINE_EVERY = 10.0  # seconds between lines of progress where there is no terminal


def setup_logging() -> None:
    """Lets the "cascade" logger write to stderr, one line a message. Calling it again changes
    nothing.
    """
    if not any(isinstance(handler, _Terminal) for handler in log.handlers):
        log.addHandler(_Terminal())
        log.setLevel(logging.INFO)


class _Terminal(logging.Handler):
    """Through tqdm, which takes a bar off the terminal, writes, and puts the bar back."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


class RunLog:
    """The log of a run that has done `first_step` of `total_steps`; nothing at all unless `enabled`
    (rank 0).
    """

    def __init__(
        self, folder: Path, first_step: int, total_steps: int, enabled: bool = True
    ) -> None:
        self.folder, self.enabled = folder, enabled
        if not enabled:
            return
        from tqdm import tqdm

        folder.mkdir(parents=True, exist_ok=True)
        _drop_after(folder / "metrics.jsonl", first_step)
        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.board = _Board(folder / "tensorboard", first_step)
        # A bar in a log file would be one endless line: there, `report` writes a line now and then
        # instead.
        self.told = -math.inf
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None
        )

    def report(self, step: int, metrics: Mapping[str, float | np.generic]) -> None:
        """One line of metrics.jsonl, one point on each curve. A number that is not finite is null
        in JSON.
        """
        if not self.enabled:
            return
        values = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in metrics.items()
        }
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.metrics.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self.metrics.flush()
        self.board.add(
            step, *({"tag": name, "simple_value": value} for name, value in values.items())
        )
        if self.bar.disable and (
            time.monotonic() - self.told >= LINE_EVERY or step == self.bar.total
        ):
            self.told = time.monotonic()
            log.info(
                "step %d/%d: %s",
                step,
                self.bar.total,
                ", ".join(f"{k} {v:.4g}" for k, v in values.items()),
            )
        if "loss" in values:
            self.bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)

    def advance(self, step: int) -> None:
        if self.enabled:
            self.bar.update(step - self.bar.n)

    def picture(self, step: int, image_HWC: np.ndarray) -> None:
        """A uint8 RGB image as samples/step_NNNNNNN.png, and in TensorBoard."""
        if not self.enabled:
            return
        from PIL import Image

        buffer, (height, width, _) = io.BytesIO(), image_HWC.shape
        Image.fromarray(image_HWC).save(buffer, "PNG")
        png = {
            "height": height,
            "width": width,
            "colorspace": 3,
            "encoded_image_string": buffer.getvalue(),
        }
        self.board.add(step, {"tag": "samples", "image": png})
        (self.folder / "samples").mkdir(exist_ok=True)
        write_atomically(self.folder / "samples" / f"step_{step:07d}.png", buffer.getvalue())

    def close(self) -> None:
        if self.enabled:
            for part in (self.bar, self.board, self.metrics):
                part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Board:
    """TensorBoard's event file, written at once, by the thread that reports.

    tensorboardX's SummaryWriter has a thread for it behind a queue of ten: when the disk is full
    the thread dies, the queue fills, and the run hangs for ever. Here it ends with the OSError.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        # The name ends with the step, as an attempt begun within the same second would overwrite
        # the last one's file.
        self.file, self.event = EventsWriter(str(folder / "events"), f".{first_step}"), Event
        # The start of a session makes TensorBoard forget this and all later steps of earlier files.
        self._write(first_step + 1, session_log={"status": SessionLog.START})

    def _write(self, step: int, **content: Any) -> None:
        self.file.write_event(self.event(wall_time=time.time(), step=step, **content))
        self.file.flush()

    def add(self, step: int, *values: dict[str, Any]) -> None:
        """`values` as in tensorboard's summary.proto, `Summary.Value`."""
        self._write(step, summary={"value": values})

    def close(self) -> None:
        self.file.close()


def _drop_after(path: Path, step: int) -> None:
    def stays(line: bytes) -> bool:
        try:
            return bool(json.loads(line)["step"] <= step)
        except (ValueError, TypeError, KeyError):  # cut short by a kill
            return False

    old = path.read_bytes() if path.exists() else b""
    kept = b"".join(line + b"\n" for line in old.split(b"\n") if stays(line))
    if kept != old:
        write_atomically(path, kept)
