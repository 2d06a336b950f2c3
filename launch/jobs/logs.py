"""Logs of a job's processes: followed while they grow, and their last lines after an end."""

import contextlib
import sys
from pathlib import Path

# MindSpore logs these whatever GLOG_v says.
NOISE = b"[INFO] DISTRIBUTED("
CHUNK = 2**20  # bytes of a read


class Tail:
    """Copies the lines added to a rank's log to stderr: all of rank 0, warnings of the others."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self.rank = rank
        self.offset = 0  # bytes read so far
        self.partial = b""  # a line whose end is not written yet

    def show(self, final: bool = False) -> None:
        """Shows the new whole lines; if `final`, a last line without its end too."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self.offset)
            # At the end a newline stands in for the one that a last line lacks.
            while data := file.read(CHUNK) or (b"\n" if final and self.partial else b""):
                self.offset += len(data)
                *lines, self.partial = (self.partial + data).split(b"\n")
                for line in lines:
                    self.show_line(line)

            sys.stderr.flush()

    def show_line(self, line: bytes) -> None:
        if self.rank == 0 and not line.startswith(NOISE):
            sys.stderr.buffer.write(line + b"\n")
        elif self.rank and line.startswith((b"warning:", b"error:")):
            sys.stderr.buffer.write(b"[rank %d] %s\n" % (self.rank, line))


def last_lines(path: Path, lines: int = 12) -> str:
    """The end of a log; empty if it cannot be read."""
    with contextlib.suppress(OSError):
        data = path.read_bytes()[-16384:].decode(errors="replace").rstrip()
        # Progress bars end their states by a carriage return.
        return "\n".join(data.replace("\r", "\n").splitlines()[-lines:])
    return ""
