"""Benchmarks beside other libraries, on one machine: `python -m tools.bench NAME`.

A bench compares implementations: ours, and those of peers. Each measurement is a process of its own
(`workers/`), and the implementations take turns, so that a change of the machine's load affects all
of them. A report names what was measured, the machine and the versions. The figures in docs/ come
from here.
"""
