"""Checkpoints: folders that are whole or not taken for checkpoints, and that say so themselves.

    checkpoints/step_0001000/ model.safetensors ema.safetensors optimizer.safetensors    what `tensors` names
                              state.json      whatever else a run needs to go on, as JSON
                              manifest.json   size and SHA-256 of each file above
                              COMPLETE        SHA-256 of manifest.json, written last

A step is written beside its place, fsynced, and renamed; only then are older steps removed. So a
kill, a full disk or a power cut leaves the steps before it as they were. Damage that comes later (a
disk, a copy cut short) is found by `newest`, which hashes what it returns and falls back to the
step before. One process writes: see `files.lock`. It may do so behind a run's back: training stops
only while `Writer` copies the arrays.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.errors import JobError, UserError
from pipeline.files import remove_folder, replace_folder, sha256_file, write_tensors

log = logging.getLogger("cascade")

Tensors = dict[str, dict[str, np.ndarray]]  # file -> parameter -> array


class CheckpointError(JobError):
    """A checkpoint that could not be written, or is not what was written."""


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `step` and removes all but the `keep` newest up to it; returns the step's folder.

    `state` is JSON values. A step that is there and good stays as it is: a run repeats itself, and
    to replace the only good checkpoint would risk it. CheckpointError if the disk does not take it.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the checkpoint just written has to be kept")
    target = folder / f"step_{step:07d}"
    side = folder / f".tmp-{target.name}"
    if target in _folders(folder) and _damage(target) is None:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [
            *folder.glob(".tmp-*"),
            *folder.glob(".old-*"),
        ]:  # of attempts that were killed
            remove_folder(leftover)
        side.mkdir()
        for name, arrays in tensors.items():
            write_tensors(side / f"{name}.safetensors", arrays)
        (side / "state.json").write_text(json.dumps(state, indent=1))
        written = sorted(side.iterdir())
        manifest = {
            path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)}
            for path in written
        }
        (side / "manifest.json").write_text(json.dumps(manifest, indent=1))
        (side / "COMPLETE").write_text(sha256_file(side / "manifest.json"))
        replace_folder(side, target)
    except OSError as error:
        shutil.rmtree(side, ignore_errors=True)
        raise CheckpointError(
            f"{target}: could not be saved: {error}; earlier checkpoints are as they were: "
            "make room and run the same command again"
        ) from error
    for old in [number for number in steps(folder) if number <= step][
        :-keep
    ]:  # later ones are damaged, or else we had
        remove_folder(
            folder / f"step_{old:07d}"
        )  # resumed from them; they are replaced when the run gets there
    return target


class Writer:
    """`save` in a thread of its own, one step at a time: while one is written, a second waits for
    it.

    It holds a copy of the arrays, as the next training step changes them in place. Leave its `with`
    and all is written; what went wrong in the thread is raised by the next call of any method, or
    there.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[Path] | None = None

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, np.ndarray]], state: dict[str, Any]
    ) -> None:
        self.join()
        copied = {
            file: {name: array.copy() for name, array in arrays.items()}
            for file, arrays in tensors.items()
        }
        self.writing = self.thread.submit(save, self.folder, step, copied, state, self.keep)

    def check(self) -> None:
        """Raises what the thread ended with, if it has and that was an error."""
        if self.writing is not None and self.writing.done():
            self.join()

    def join(self) -> None:
        """Waits until what was begun is on the disk."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.thread.shutdown()
        if kind is None:  # else the error that ends the run is the one to tell
            self.join()


def steps(folder: Path) -> list[int]:
    """The steps whose writing was completed, ascending."""
    return [
        int(path.name.removeprefix("step_"))
        for path in _folders(folder)
        if (path / "COMPLETE").exists()
    ]


def newest(folder: Path) -> Path | None:
    """The newest step that is as it was written, or None if nothing was ever saved here.

    Damaged steps are passed over with a warning. If all are damaged: UserError, as to start over in
    silence would throw away a run.
    """
    damage = None
    for path in reversed(_folders(folder)):
        damage = _damage(path)
        if damage is None:
            return path
        log.warning("checkpoint passed over: %s", damage)
    if damage is not None:
        raise UserError(
            f"{folder}: no checkpoint in it is good ({damage}); move the folder away to start from step 0"
        )
    return None


def verify(path: Path) -> None:
    """CheckpointError, naming the file and what is wrong with it, unless every byte is as it was
    written.
    """
    try:
        manifest = (path / "manifest.json").read_bytes()
        if (path / "COMPLETE").read_text(errors="replace") != hashlib.sha256(manifest).hexdigest():
            raise CheckpointError(
                f"{path / 'manifest.json'}: its sha256 is not the one in COMPLETE"
            )
        for name, facts in json.loads(manifest).items():
            size = (path / name).stat().st_size
            if size != facts["size"]:
                raise CheckpointError(
                    f"{path / name}: has {size} bytes, the manifest says {facts['size']}"
                )
            if sha256_file(path / name) != facts["sha256"]:
                raise CheckpointError(f"{path / name}: its sha256 is not the one in the manifest")
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: is missing") from None
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be read: {error.strerror}"
        ) from None


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, state) as they were given to `save`. Does not hash again what `newest` or `verify`
    has just hashed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        names = [
            name
            for name in json.loads((path / "manifest.json").read_bytes())
            if name.endswith(".safetensors")
        ]
        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in names}
        return tensors, json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {error}") from error


def _folders(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{7,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _damage(path: Path) -> str | None:
    try:
        verify(path)
    except CheckpointError as error:
        return str(error)
    return None
