"""The parts of ``benchmarks/scaling.py``: what is varied, how a point is measured and kept, and the pictures."""
