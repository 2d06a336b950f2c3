"""Measurements beside other libraries, on one machine, taken in turns: `python -m tools.bench
NAME`.

Each of them says what it measured, on what machine and with which versions. The figures in the docs
come from here.
"""
