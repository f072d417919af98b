"""randn's CUDA kernel, by emulation or on a GPU, has the bits of the CPU kernel, which test_randn_kernel.py tests."""

import itertools
import math

import pytest
import torch

from fastguide import ops
from fastguide.doctor import KNOWN_ANSWERS
from fastguide.ops import _native
from fastguide.ops._operation import backends

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COUNTERS = dict(seed=0xFEDCBA9876543210, step=0xFFFFFFFE, stream=0xABCD, first_particle=2**32 - 2)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected, cuda_device):
    out = torch.zeros(4, dtype=torch.int32, device=cuda_device)
    with _native.cuda_stream(cuda_device) as queue:
        _native.module("cuda").philox(out.data_ptr(), counter, key, queue)
    assert tuple(word & 0xFFFFFFFF for word in out.tolist()) == expected


# Part of a group of four, one group, two, four, five and many groups. A thread makes one group, two in 16-bit dtypes.
@pytest.mark.parametrize("elements", (1, 2, 3, 4, 5, 16, 17, 1000))
@pytest.mark.parametrize("offset", (0, 1))  # an odd address cannot take 16-byte stores
def test_bits_of_the_cpu(elements, offset, cuda_device):
    for dtype, particles in itertools.product(DTYPES, (0, 1, 3, 257, 1025)):
        buffer = torch.full((particles * elements + 64,), math.nan, dtype=dtype, device=cuda_device)
        out = buffer[offset : offset + particles * elements].view(particles, elements)
        size = particles, elements
        with _native.cuda_stream(cuda_device) as queue:
            _native.module("cuda").randn(
                out.data_ptr(), _native.CUDA_DTYPES[dtype], *size, *COUNTERS.values(), 0, 0, queue
            )
        expected = ops.randn(size, **COUNTERS, dtype=dtype, backend="cpu")
        assert torch.equal(out.cpu(), expected)
        assert buffer[:offset].isnan().all() and buffer[offset + particles * elements :].isnan().all()


def test_more_units_than_a_launch_has_threads(cuda_device):
    shape = (2**22 + 1000, 5)  # two groups each and at most 2^22 threads, so strides carry from group to row
    z = ops.randn(shape, seed=1, device=cuda_device, backend="cuda")
    assert torch.equal(z.cpu(), ops.randn(shape, seed=1, backend="cpu"))


def test_the_operation(cuda_device):
    z = ops.randn((3, 2, 5), seed=1, step=2, dtype=torch.bfloat16, device=cuda_device, backend="cuda")
    assert torch.equal(z.cpu(), ops.randn((3, 2, 5), seed=1, step=2, dtype=torch.bfloat16, backend="cpu"))


@pytest.mark.skipif(not backends()["cuda"].loaded, reason=f"cuda: {backends()['cuda'].reason}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device: nothing fails")
def test_a_failed_launch_names_the_cuda_error():
    with pytest.raises(RuntimeError, match="randn: cudaError"):
        _native.module("cuda").randn(16, 0, 1, 4, *7 * [0])
