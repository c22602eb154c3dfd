"""Proof that what was written loads elsewhere: in a fresh process, with stock libraries, on real inputs."""
