"""Runs one trial in a process, on this machine or on another one, behind one `Launcher` protocol.

launcher (the protocol, and what it is given), local (a process of this machine), inline (this process), cluster (a Ray
cluster), scheduler (jobs of SLURM), fork_server (starts processes that have imported torch already), isolated (one
function in such a process), watchdog and exit_status (how a worker ended), logs (what it printed), preload and quiet
(what the fork server imports).
"""

__all__ = ["cluster", "exit_status", "fork_server", "inline", "isolated", "launcher", "local", "scheduler"]
