"""What several tests of the tools do."""

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m tools.NAME ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", f"tools.{name}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def read_tar(path: Path) -> dict[str, bytes]:
    """The members of a tar, by their names."""
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        return {name: file.read() for name, file in files.items() if file}
