"""What the fork server imports, and what it leaves to the trials that need it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import torch
compile_ = torch.compile
import harness.launch.preload as preload

assert {"peft", "bitsandbytes", "transformers.trainer"} <= sys.modules.keys()
assert "torch._inductor.compile_fx" not in sys.modules, "nothing is compiled yet"
assert torch.compile is compile_

from bitsandbytes.backends.default import ops

compiled = []
torch.compile = lambda function, **options: compiled.append((function.__name__, options)) or function
code = torch.linspace(-1, 1, 256)
for _ in range(2):
    values = ops._dequantize_blockwise_compute(
        torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([3.0]), code, 64, torch.float32
    )
    assert values.flatten().tolist() == [-3.0, 3.0], values
assert compiled == [("_dequantize_blockwise_compute", {"dynamic": False})], compiled
"""


def test_functions_of_bitsandbytes_are_compiled_when_they_are_called_first() -> None:
    """A process of its own: the modules of this one are loaded already."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
