"""Whose turn it is to parse what models say of themselves.

The largest headers that are read at all make some hundred megabytes of objects: a process that serves many holds those of
one model at a time.
"""

from __future__ import annotations

import threading

one_at_a_time = threading.Lock()
