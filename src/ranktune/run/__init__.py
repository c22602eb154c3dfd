"""The pieces of a training run: its directory, its model, its arguments, its loop, its display and its log."""
