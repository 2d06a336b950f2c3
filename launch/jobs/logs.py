"""The logs of a job's processes, for people: shown while they grow, and their last lines when
something has ended.
"""

import contextlib
import sys
from pathlib import Path

NOISE = b"[INFO] DISTRIBUTED("  # MindSpore says these whatever GLOG_v is


class Tail:
    """Shows the lines that are added to a rank's log: rank 0's as they are, of the others' the
    warnings.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank, self.place, self.rest = path, rank, 0, b""

    def show(self, final: bool = False) -> None:
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            file.seek(self.place)
            while data := file.read(2**20) or (b"\n" if final and self.rest else b""):
                self.place += len(data)
                *lines, self.rest = (self.rest + data).split(b"\n")
                for line in lines:
                    if self.rank == 0 and not line.startswith(NOISE):
                        sys.stderr.buffer.write(line + b"\n")
                    elif self.rank and line.startswith((b"warning:", b"error:")):
                        sys.stderr.buffer.write(b"[rank %d] %s\n" % (self.rank, line))
            sys.stderr.flush()


def last_lines(path: Path, lines: int = 12) -> str:
    """What a log ends with; nothing if there is none."""
    with contextlib.suppress(OSError):
        data = path.read_bytes()[-16384:].decode(errors="replace").rstrip()
        return "\n".join(data.replace("\r", "\n").splitlines()[-lines:])
    return ""
