"""Runs a grid: each pending trial through a launcher, each record into the store.

grid_run (a grid from its first pending trial to the last), workers (several trials at the same time), execution (one
job with its retries), leases (which runner does which trial), interrupts (Ctrl-C), display (the protocol of progress
displays), identity (the ids of a trial), visits (what is timed apart), loss_before (recorded losses of untrained
models), learning_rates (found before a comparison), cleaning (what runs leave behind).
"""

__all__ = [
    "cleaning",
    "display",
    "execution",
    "grid_run",
    "interrupts",
    "learning_rates",
    "loss_before",
    "visits",
    "workers",
]
