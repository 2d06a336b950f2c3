"""The measured processes of the benches: `python -m tools.bench.workers.NAME ARGUMENTS`.

A worker does one measurement and prints one JSON object as the last line of stdout. Those of `text`
and `train` also run under the interpreter of a peer, where neither this project nor MindSpore is
installed (see peers.py): there and in `timing` only the standard library, NumPy and the peer may be
imported at the top.
"""
