"""The error of a drop-in module if its package is not installed."""

import json

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


@pytest.fixture(scope="module")
def errors(python) -> dict[str, str]:
    """The error of each module, from one new process."""
    code = """
import json, sys
def error(missing, call):
    sys.modules[missing] = None
    try:
        exec(call, {})
    except ImportError as error:
        return str(error)
    finally:
        del sys.modules[missing]
print(json.dumps({missing: error(missing, call) for missing, (call, _) in json.loads(sys.argv[1]).items()}))
"""
    done = python(code, json.dumps(CALLS))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("missing", CALLS)
def test_the_error_says_what_to_install(missing, errors):
    package = CALLS[missing][1]
    assert f"{package} to be installed (pip install {package})" in str(errors[missing])
