"""`python -m launch` is `cascade`."""

from launch.cli.main import main

main()
