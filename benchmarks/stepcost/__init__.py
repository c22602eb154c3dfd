"""The parts of ``benchmarks/step_cost.py``: what is compared, on which models, how it is measured and shown."""
