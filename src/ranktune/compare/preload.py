"""Imported by the process that training processes are forked off: the libraries, which first are told to be quiet.

They would talk into the bar of the process that everything was started from.
"""

from ranktune.run.startup import silence_chatty_libraries

silence_chatty_libraries()

import ranktune.compare.execution  # noqa: E402, F401
