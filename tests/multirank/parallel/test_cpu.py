"""The CPU door: open where there is no CUDA, shut where there is. Each case needs a process that it can patch."""

import subprocess
import sys

PATCHED = """
import torch, torch.cuda.random as cuda_random
def names():
    places = [torch, torch.Tensor, torch.nn.Module, torch.cuda, cuda_random, torch.cuda.nvtx]
    return [dict(vars(place)) for place in places]
"""


def run(code):
    """Run `code` in a fresh interpreter; its assertions fail this test."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PATCHED + code], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_patched_where_cuda_is():
    run("""
import sys
torch.cuda.is_available = lambda: True
before = names()
from nemo_minitron.parallel import cpu
cpu.open_cpu_door()
assert names() == before
assert not any(name.startswith("megatron") for name in sys.modules)
""")


def test_open_where_cuda_is_not_and_a_second_call_changes_nothing():
    run("""
torch.cuda.is_available = lambda: False
before = names()
from nemo_minitron.parallel import cpu
cpu.open_cpu_door()
opened = names()
assert opened != before
cpu.open_cpu_door()
assert names() == opened

for made in (torch.zeros(2, device="cuda"), torch.ones(2, device=torch.device("cuda", 1)), torch.ones(2).to("cuda:0"),
             torch.ones(2).to(device="cuda"), torch.ones(2).cuda(), torch.empty(2, pin_memory=True)):
    assert made.device.type == "cpu" and made.shape == (2,)
assert torch.ones(2).to("cuda", torch.float64).dtype == torch.float64
assert torch.zeros(2, device="meta").device.type == "meta" and torch.ones(2).to("meta").device.type == "meta"
assert torch.nn.Linear(1, 1).cuda().weight.device.type == "cpu"
assert not torch.cuda.is_available() and cpu.device() == torch.device("cpu")

torch.cuda.manual_seed(3)
state = torch.cuda.get_rng_state()
drawn = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3), drawn)
""")


def test_too_late_once_megatron_is_there():
    out = run("""
import sys
torch.cuda.is_available = lambda: False
sys.modules["megatron.core"] = sys
before = names()
from nemo_minitron.parallel import cpu
try:
    cpu.open_cpu_door()
except AssertionError as error:
    print(error)
assert names() == before
""")
    assert "before megatron is imported" in out
