"""PEFT's own test suite, pointed at our configs. Run it with `python -m tests.peft_suite` (or `make peft-suite`)."""
