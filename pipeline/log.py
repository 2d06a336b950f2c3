"""The log of a run: metrics.jsonl for programs, TensorBoard, and a progress bar or plain lines on
the terminal.

`metrics.jsonl` has one JSON object per reported step (step, loss, lr, grad_norm,
images_per_second, seconds, quarantined, skipped) and one per validation (step, validation_loss,
...), floats in full precision. A run that resumes at step S first removes the lines after S that an
interrupted attempt wrote, so each step appears once.
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

PROGRESS_INTERVAL = 10.0  # seconds between progress lines where stderr is not a terminal


def setup_logging() -> None:
    """Writes the "cascade" logger's messages to stderr, one line each. Idempotent."""
    if not any(isinstance(handler, _TerminalHandler) for handler in log.handlers):
        log.addHandler(_TerminalHandler())
        log.setLevel(logging.INFO)


class _TerminalHandler(logging.Handler):
    """Writes through tqdm, which removes a progress bar, writes the line, and redraws the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


class RunLog:
    """The log of a run at step `first_step` of `total_steps`.

    With `enabled` false, as on all ranks but 0, it writes nothing and creates no files.
    """

    def __init__(
        self, folder: Path, first_step: int, total_steps: int, enabled: bool = True
    ) -> None:
        self.folder = folder
        self.enabled = enabled
        if not enabled:
            return

        from tqdm import tqdm

        folder.mkdir(parents=True, exist_ok=True)
        _drop_after(folder / "metrics.jsonl", first_step)
        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.board = _TensorBoard(folder / "tensorboard", first_step)

        # `disable=None` shows the bar on a terminal only: in a file it would be one endless line.
        # There `report` writes a line every PROGRESS_INTERVAL instead.
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None
        )
        self.last_line_at = -math.inf  # time.monotonic()

    def report(self, step: int, metrics: Mapping[str, float | np.generic]) -> None:
        """Adds the metrics of a training step, and shows them on the terminal."""
        if not self.enabled:
            return

        values = self._write(step, metrics)
        self._report_on_terminal(step, values)

    def report_validation(self, step: int, metrics: Mapping[str, float | np.generic]) -> None:
        """Adds the metrics of a validation, and shows its means on the terminal."""
        if not self.enabled:
            return

        values = self._write(step, metrics)
        log.info(
            "step %d/%d: validation loss %.4g, of the raw weights %.4g",
            step,
            self.bar.total,
            values["validation_loss"],
            values["validation_loss_raw"],
        )

    def _write(self, step: int, metrics: Mapping[str, float | np.generic]) -> dict[str, float]:
        """Adds a line to metrics.jsonl and a point to each TensorBoard curve.

        JSON has no NaN and no infinities: they become null.
        """
        values = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in metrics.items()
        }

        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.metrics.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self.metrics.flush()

        scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self.board.add(step, *scalars)
        return values

    def _report_on_terminal(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)

        now = time.monotonic()
        due = now - self.last_line_at >= PROGRESS_INTERVAL or step == self.bar.total
        if self.bar.disable and due:
            self.last_line_at = now
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            log.info("step %d/%d: %s", step, self.bar.total, text)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        if self.enabled:
            self.bar.update(step - self.bar.n)

    def image(self, step: int, image_HWC: np.ndarray) -> None:
        """Saves a uint8 RGB image as samples/step_NNNNNNN.png and in TensorBoard."""
        if not self.enabled:
            return

        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(image_HWC).save(buffer, "PNG")

        height, width, _ = image_HWC.shape
        summary = {
            "height": height,
            "width": width,
            "colorspace": 3,  # RGB, in TensorBoard's summary.proto
            "encoded_image_string": buffer.getvalue(),
        }
        self.board.add(step, {"tag": "samples", "image": summary})

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


class _TensorBoard:
    """TensorBoard's event file, written synchronously by the thread that reports.

    tensorboardX's SummaryWriter writes from a thread behind a queue of ten events: when the disk is
    full, the thread dies, the queue fills up, and the run hangs. Here the OSError is raised.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)

        # The step in the name, as an attempt that starts within the same second would otherwise
        # overwrite the previous attempt's file.
        self.file = EventsWriter(str(folder / "events"), f".{first_step}")
        self.event = Event

        # A session start makes TensorBoard discard this and all later steps of earlier files.
        self._write(first_step + 1, session_log={"status": SessionLog.START})

    def _write(self, step: int, **content: Any) -> None:
        self.file.write_event(self.event(wall_time=time.time(), step=step, **content))
        self.file.flush()

    def add(self, step: int, *values: dict[str, Any]) -> None:
        """Adds `values`, each with the fields of `Summary.Value` in TensorBoard's summary.proto."""
        self._write(step, summary={"value": values})

    def close(self) -> None:
        self.file.close()


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines of later steps from a metrics.jsonl, and lines that are not complete."""

    def is_retained(line: bytes) -> bool:
        try:
            return bool(json.loads(line)["step"] <= step)
        except (ValueError, TypeError, KeyError):
            # A line that was cut short when the writer was killed.
            return False

    old = path.read_bytes() if path.exists() else b""
    retained = b"".join(line + b"\n" for line in old.split(b"\n") if is_retained(line))

    if retained != old:
        write_atomically(path, retained)
