"""Checkpoints: folders that are either complete or ignored, and that detect damage.

    checkpoints/step_0001000/ model.safetensors ema.safetensors optimizer.safetensors
                              state.json      what else a run needs to resume
                              manifest.json   size and SHA-256 of each file above
                              COMPLETE        SHA-256 of manifest.json, written last

A step is written to a temporary folder, synced, and renamed; only then are older steps removed. So
a kill, a full disk or a power cut leaves the steps before it as they were. Later damage, by a bad
disk or a truncated copy, is detected by `newest`, which hashes what it returns and falls back to
the step before. Only one process may write: see `files.lock`. `Writer` writes in the background;
training waits only while the arrays are copied.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.errors import JobError, UserError
from pipeline.files import remove_folder, replace_folder, sha256_file, write_tensors

log = logging.getLogger("cascade")

Tensors = dict[str, dict[str, np.ndarray]]  # file -> parameter -> array


class CheckpointError(JobError):
    """A checkpoint that could not be written, or is not as it was written."""


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `step` and removes all but the `keep` newest steps up to it; returns its folder.

    A step that exists undamaged is not written again: a resumed run repeats the same step, and
    replacing the only good checkpoint would put it at risk. CheckpointError if writing fails.

    Args:
        folder: of all checkpoints of the run.
        step: how many steps are done.
        tensors: file -> parameter -> array.
        state: what else is saved, as JSON values.
        keep: how many steps stay, this one included.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the checkpoint just written has to be kept")

    target = folder / f"step_{step:07d}"
    if target in _step_folders(folder) and _damage(target) is None:
        return target

    temporary = folder / f".tmp-{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A killed attempt may have left this temporary folder, and others that take up room.
        _remove_leftovers(folder)
        _write(temporary, tensors, state)
        replace_folder(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{target}: could not be saved: {error}; earlier checkpoints are intact: make room "
            "and run the same command again"
        ) from error

    # Later steps are damaged, or the run would have resumed from them. They stay until it gets
    # there and replaces them.
    up_to_here = [saved for saved in steps(folder) if saved <= step]
    for old in up_to_here[:-keep]:
        remove_folder(folder / f"step_{old:07d}")
    return target


class Writer:
    """Saves checkpoints in a background thread, one at a time: a second `save` waits for the first.

    It copies the arrays, as the next training step changes them in place. Leaving its `with` block
    waits for the thread. An error in the thread is raised by the next call of any method, or when
    the block is left.

    Args:
        folder, keep: see `save`.
        save_step: writes one step; for tests.
    """

    def __init__(self, folder: Path, keep: int, save_step: Callable[..., Path] = save) -> None:
        self.folder = folder
        self.keep = keep
        self.save_step = save_step
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[Path] | None = None

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, np.ndarray]], state: dict[str, Any]
    ) -> None:
        """Copies the arrays and starts to write them; see `checkpoint.save`."""
        # The save before: its error is raised here, and memory holds one copy of the arrays at a
        # time.
        self.join()

        copies = {
            file: {name: array.copy() for name, array in arrays.items()}
            for file, arrays in tensors.items()
        }
        self.pending = self.thread.submit(
            self.save_step, self.folder, step, copies, state, self.keep
        )

    def check(self) -> None:
        """Raises the error of a save that has failed. Does not wait."""
        if self.pending is not None and self.pending.done():
            self.join()

    def join(self) -> None:
        """Waits until the save that was started is on the disk."""
        # Forgotten before it is awaited, so that its error is raised once.
        pending = self.pending
        self.pending = None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.thread.shutdown()
        # After another error, that one is reported and not the thread's.
        if kind is None:
            self.join()


def steps(folder: Path) -> list[int]:
    """The steps that were written completely, ascending."""
    return [
        int(path.name.removeprefix("step_"))
        for path in _step_folders(folder)
        if (path / "COMPLETE").exists()
    ]


def newest(folder: Path) -> Path | None:
    """The newest undamaged step, or None if nothing was ever saved here.

    Damaged steps are skipped with a warning. If all are damaged: UserError, as to start again from
    step 0 without saying so would discard the run.
    """
    damage = None
    for path in reversed(_step_folders(folder)):
        damage = _damage(path)
        if damage is None:
            return path
        log.warning("damaged checkpoint skipped: %s", damage)

    if damage is not None:
        raise UserError(
            f"{folder}: every checkpoint is damaged ({damage}); move the folder away to start from "
            "step 0"
        )
    return None


def verify(path: Path) -> None:
    """CheckpointError, naming the file and the problem, unless every byte of the step in `path` is
    as it was written.
    """
    try:
        # COMPLETE vouches for the manifest, and the manifest for all other files.
        manifest = (path / "manifest.json").read_bytes()
        if (path / "COMPLETE").read_text(errors="replace") != hashlib.sha256(manifest).hexdigest():
            raise CheckpointError(
                f"{path / 'manifest.json'}: its sha256 is not the one in COMPLETE"
            )

        for name, expected in json.loads(manifest).items():
            # The size first: that tells a truncated file without reading it.
            size = (path / name).stat().st_size
            if size != expected["size"]:
                raise CheckpointError(
                    f"{path / name}: has {size} bytes, the manifest says {expected['size']}"
                )
            if sha256_file(path / name) != expected["sha256"]:
                raise CheckpointError(f"{path / name}: its sha256 is not the one in the manifest")
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: is missing") from None
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be read: {error.strerror}"
        ) from None


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, state) as they were given to `save`.

    Does not verify the files: `newest` has done so. CheckpointError if they cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        files = [
            name
            for name in json.loads((path / "manifest.json").read_bytes())
            if name.endswith(".safetensors")
        ]

        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in files}
        return tensors, json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from error


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders of attempts that were killed."""
    for leftover in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
        remove_folder(leftover)


def _write(
    folder: Path, tensors: Mapping[str, Mapping[str, np.ndarray]], state: dict[str, Any]
) -> None:
    """The files of a step, in a new folder; `COMPLETE` is the last one."""
    folder.mkdir()
    for name, arrays in tensors.items():
        write_tensors(folder / f"{name}.safetensors", arrays)
    (folder / "state.json").write_text(json.dumps(state, indent=1))

    manifest = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    # Nothing is synced yet: `replace_folder` does that for all files before it renames.
    (folder / "COMPLETE").write_text(sha256_file(folder / "manifest.json"))


def _step_folders(folder: Path) -> list[Path]:
    """By step, ascending."""
    matches = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{7,}", path.name)]
    # By number: from step 10,000,000 on names are longer, and would sort before shorter ones.
    return sorted(matches, key=lambda path: int(path.name.removeprefix("step_")))


def _damage(path: Path) -> str | None:
    """What `verify` reports, or None."""
    try:
        verify(path)
    except CheckpointError as error:
        return str(error)
    return None
