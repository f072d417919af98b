"""The emulation of CUDA: what it computes, and that it finds the mistakes that it is made to find."""

import ctypes
import os
import shutil

import emulated_cuda
import pytest

THREADS, BLOCKS = 64, 6

SOURCE = r"""
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

constexpr int kThreads = 64;

// --- right

__global__ void reversed(int* out) {
    __shared__ int values[kThreads];
    for (int round = 0; round < 3; ++round) {
        values[threadIdx.x] = 100 * round + threadIdx.x;
        __syncthreads();
        out[(round * gridDim.x + blockIdx.x) * kThreads + threadIdx.x] = values[kThreads - 1 - threadIdx.x];
        __syncthreads();
    }
}

__global__ void order_of_blocks(int* out) {
    if (threadIdx.x == 0) out[atomicAdd(out + gridDim.x, 1)] = blockIdx.x;
}

__global__ void votes(int* out) {
    const int odd = __syncthreads_count(threadIdx.x % 2);
    const int one = __syncthreads_or(threadIdx.x == 5), none = __syncthreads_or(0);
    const int all = __syncthreads_and(1), most = __syncthreads_and(threadIdx.x != 5);
    if (threadIdx.x == 9) out[blockIdx.x] = odd == kThreads / 2 && one && !none && all && !most;
}

__global__ void sums(int* out) {
    using Scan = cub::BlockScan<int, kThreads>;
    using Reduce = cub::BlockReduce<int, kThreads>;
    __shared__ typename Scan::TempStorage scan;
    __shared__ typename Reduce::TempStorage reduce;
    const int k = threadIdx.x;
    int items[2] = {2 * k, 2 * k + 1}, total;
    Scan(scan).InclusiveSum(items, items, total);
    __syncthreads();
    int before;
    Scan(scan).ExclusiveSum(k, before);
    __syncthreads();
    int largest;
    Scan(scan).ExclusiveScan(k * 37 % kThreads, largest, -1, [](int a, int b) { return a > b ? a : b; });
    int expected = -1;
    for (int i = 0; i < k; ++i) expected = i * 37 % kThreads > expected ? i * 37 % kThreads : expected;
    const int all = Reduce(reduce).Sum(k);
    const bool right = largest == expected && items[0] == k * (2 * k + 1) && items[1] == (k + 1) * (2 * k + 1) &&
                       total == kThreads * (2 * kThreads - 1) && before == k * (k - 1) / 2;
    const bool reduced = (all == kThreads * (kThreads - 1) / 2) == (k == 0);  // nobody else may look
    out[blockIdx.x * kThreads + k] = right && reduced;
}

__global__ void across_blocks(int* out) {
    __shared__ int values[kThreads];
    const int at = blockIdx.x * kThreads + threadIdx.x, end = gridDim.x * kThreads;
    for (int round = 1; round <= 3; ++round) {
        values[threadIdx.x] = out[end - 1 - at];
        cooperative_groups::this_grid().sync();
        out[at] = values[threadIdx.x] + round;
        cooperative_groups::this_grid().sync();
    }
}

// --- wrong

__global__ void no_barrier(int* out) {
    __shared__ int values[kThreads];
    values[threadIdx.x] = threadIdx.x;
    out[blockIdx.x * kThreads + threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

__global__ void no_second_barrier(int* out) {  // `values` is written again while others still read
    __shared__ int values[kThreads];
    int found = 0;
    for (int round = 0; round < 3; ++round) {
        values[threadIdx.x] = round;
        __syncthreads();
        found += values[kThreads - 1 - threadIdx.x] == round;
    }
    out[blockIdx.x * kThreads + threadIdx.x] = found == 3;
}

__global__ void half_wait(int*) {
    if (threadIdx.x < kThreads / 2) __syncthreads();
}

__global__ void wait_apart(int*) {
    if (threadIdx.x < kThreads / 2) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void storage_again(int*) {
    using Scan = cub::BlockScan<int, kThreads>;
    __shared__ typename Scan::TempStorage scan;
    int sum;
    Scan(scan).InclusiveSum(1, sum);
    Scan(scan).InclusiveSum(sum, sum);
}

__global__ void no_barrier_across(int* out) {
    const int at = blockIdx.x * kThreads + threadIdx.x;
    out[at] = at;
    out[gridDim.x * kThreads + at] = out[(at + kThreads) % (gridDim.x * kThreads)];
}

__global__ void one_block_waits(int*) {
    if (blockIdx.x == 1) cooperative_groups::this_grid().sync();
}

#define KERNEL(name) if (which == #name) kernel = name;

#pragma GCC visibility push(default)
extern "C" const char* launch(const char* name, int* out, unsigned blocks, unsigned threads, bool cooperative) {
    const std::string which = name;
    void (*kernel)(int*) = nullptr;
    KERNEL(reversed) KERNEL(order_of_blocks) KERNEL(votes) KERNEL(sums) KERNEL(across_blocks) KERNEL(no_barrier)
    KERNEL(no_second_barrier) KERNEL(half_wait) KERNEL(wait_apart) KERNEL(storage_again) KERNEL(no_barrier_across)
    KERNEL(one_block_waits)
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = cooperative;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaGetErrorString(cudaLaunchKernelEx(&config, kernel, out));
}
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """``launch(kernel, out, ...)`` returns the error message."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("kernels")
    source = folder / "kernels.cu"
    source.write_text(SOURCE)
    emulated_cuda.compile_library(folder / "kernels.so", [source])
    function = ctypes.CDLL(str(folder / "kernels.so")).launch
    function.restype = ctypes.c_char_p

    def call(kernel, out=None, blocks=BLOCKS, threads=THREADS, cooperative=False):
        return function(kernel.encode(), out, blocks, threads, cooperative).decode()

    return call


def ints(*values):
    return (ctypes.c_int * len(values))(*values)


# --- what it computes ---------------------------------------------------------------------------------------


def test_barriers(launch):
    out = ints(*[-1] * (3 * BLOCKS * THREADS))
    assert launch("reversed", out) == "cudaSuccess"
    assert list(out) == [100 * r + k for r in range(3) for _ in range(BLOCKS) for k in reversed(range(THREADS))]


def test_blocks_run_in_an_order_that_is_not_theirs(launch):
    orders = []
    for _ in range(2):
        out = ints(*[0] * (BLOCKS + 1))
        assert launch("order_of_blocks", out) == "cudaSuccess"
        orders.append(list(out)[:BLOCKS])
    assert orders[0] == orders[1] != sorted(orders[0]) == list(range(BLOCKS))


def test_votes(launch):
    out = ints(*[0] * BLOCKS)
    assert launch("votes", out) == "cudaSuccess"
    assert list(out) == [1] * BLOCKS


def test_sums_and_scans_over_a_block(launch):
    out = ints(*[0] * BLOCKS * THREADS)
    assert launch("sums", out) == "cudaSuccess"
    assert list(out) == [1] * (BLOCKS * THREADS)


def test_a_cooperative_launch(launch):
    out = ints(*range(BLOCKS * THREADS))
    assert launch("across_blocks", out, cooperative=True) == "cudaSuccess"
    assert list(out) == [k + 6 for k in reversed(range(BLOCKS * THREADS))]
    assert "CooperativeLaunchTooLarge" in launch("across_blocks", out, blocks=7, cooperative=True)


@pytest.mark.parametrize("size", (dict(blocks=0), dict(threads=0), dict(threads=1025), dict(blocks=2**31)))
def test_sizes_that_a_gpu_refuses(launch, size):
    assert launch("votes", ints(0), **size) == "cudaErrorInvalidConfiguration"


# --- what it shows ------------------------------------------------------------------------------------------


def test_a_missing_barrier_gives_a_wrong_answer(launch):
    out = ints(*[-1] * (BLOCKS * THREADS))
    assert launch("no_barrier", out) == "cudaSuccess"
    right = list(reversed(range(THREADS)))
    assert all(list(out)[b * THREADS : (b + 1) * THREADS] != right for b in range(BLOCKS))


def test_a_missing_barrier_in_a_loop_gives_a_wrong_answer(launch):
    out = ints(*[1] * (BLOCKS * THREADS))
    assert launch("no_second_barrier", out) == "cudaSuccess"
    assert 0 in list(out)


def test_a_missing_barrier_of_the_grid_gives_a_wrong_answer(launch):
    number = BLOCKS * THREADS
    out = ints(*[-1] * (2 * number))
    assert launch("no_barrier_across", out, cooperative=True) == "cudaSuccess"
    assert list(out)[number:] != [(k + THREADS) % number for k in range(number)]


@pytest.mark.parametrize(
    ("kernel", "words"),
    (
        ("half_wait", "is not reached by every thread of its block"),
        ("wait_apart", "is not reached by every thread of its block"),
        ("storage_again", "temporary storage of a CUB operation is used again"),
        ("one_block_waits", "barrier of the grid is not reached by every block"),
        ("across_blocks", "barrier of the grid in a launch that is not cooperative"),
    ),
)
def test_mistakes_that_would_hang_or_mix_up(launch, kernel, words):
    out = ints(*[0] * (BLOCKS * THREADS))
    assert words in launch(kernel, out, cooperative=kernel == "one_block_waits")
    assert launch("votes", ints(*[0] * BLOCKS)) == "cudaSuccess"  # the error does not affect the next launch
