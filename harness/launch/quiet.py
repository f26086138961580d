"""Imported by the fork server before anything else: neither it nor what it forks prints to the terminal.

What a trial prints goes to its log, and every error that a user can do something about comes back through a pipe.
"""

import os

_nowhere = os.open(os.devnull, os.O_WRONLY)
for _stream in (1, 2):
    os.dup2(_nowhere, _stream)
os.close(_nowhere)
