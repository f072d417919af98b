"""What a drop-in says where the package that it serves is not installed."""

import subprocess
import sys

import pytest

CALLS = {
    "jax": ("import fastguide.integrations.blackjax", "blackjax"),
    "blackjax": ("import fastguide.integrations.blackjax", "blackjax"),
    "diffusers": ("import fastguide.integrations.diffusers", "diffusers"),
    "particles": ("from fastguide.integrations import particles; particles.patch()", "particles"),
    "torchsde": (
        "import torch; from fastguide.integrations import k_diffusion as K; "
        "K.BrownianTreeNoiseSampler(torch.zeros(1), 0.1, 1.0)",
        "torchsde",
    ),
}


@pytest.mark.parametrize("missing", CALLS)
def test_the_error_says_what_to_install(missing):
    call, package = CALLS[missing]
    code = f"import sys; sys.modules[{missing!r}] = None; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: ")
    assert f"{package} to be installed (pip install {package})" in last
