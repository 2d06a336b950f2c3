"""`python -m launch` is `cascade`."""

from launch.cli import main

main()
