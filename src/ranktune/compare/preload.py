"""Imported by the process that training processes are forked off: the libraries, once nothing of that can be heard.

They would talk into the bar of the process that everything was started from, and so would a Ctrl-C that reaches this
one in the seconds that they take.
"""

import signal

from ranktune.run.startup import silence_chatty_libraries

signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it decides
silence_chatty_libraries()

import ranktune.compare.execution  # noqa: E402, F401
