"""A million particles: TDS in the plane, in chunks, with the time and the peak of the memory.

    python examples/million_particles.py --particles 1000000 --chunk-size 50000 [--device cuda]

`chunk_size` bounds what the network and its backward pass need at once. `--chunk-size 0` runs without chunks. The prior
is a ring of 16 Gaussians, and one number is measured: x1 + 0.6 x2. The posterior has two parts.
"""

import argparse
import math
import resource
import time

import torch

import fastguide as fg

MODES, WIDTH = 16, 0.2
A, NOISE, Y = torch.tensor([[1.0, 0.6]]), 0.1, torch.tensor([[1.2]])


def ring(like):
    angle = torch.arange(MODES, device=like.device, dtype=like.dtype) * (2 * math.pi / MODES)
    return 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1)  # [16, 2]


def net(x, t):
    """E[x_0 | x_t] of the ring, [n, 2], for x_t = (1 - t) x_0 + t eps: in place of a trained network."""
    modes, alpha, sigma = ring(x), 1 - t[:, None, None], t[:, None, None]
    variance = (alpha * WIDTH) ** 2 + sigma**2  # of x_t in one mode
    residual = x[:, None] - alpha * modes  # [n, 16, 2]: this and its graph need the memory
    share = torch.softmax(-residual.square().sum(-1, keepdim=True) / (2 * variance), dim=1)
    return (share * (modes + alpha * WIDTH**2 / variance * residual)).sum(1)


def exact_log_evidence():
    """log p(y): y given a mode is Gaussian."""
    scale = math.sqrt(WIDTH**2 * A.square().sum() + NOISE**2)
    return (torch.distributions.Normal(ring(A) @ A.T, scale).log_prob(Y).logsumexp(0) - math.log(MODES)).item()


def peak_memory(device):
    """MiB: of the whole process, or on a GPU of torch's tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--particles", type=int, default=1_000_000)
parser.add_argument("--chunk-size", type=int, default=50_000, help="0: no chunks")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
options = parser.parse_args()

prior = fg.Denoiser(net, fg.schedules.flow(), prediction="sample")
guidance = fg.TDS(fg.likelihoods.Gaussian(Y, fg.operators.Matrix(A), NOISE), particles=options.particles)
run = dict(steps=options.steps, chunk_size=options.chunk_size or None, seed=0, device=options.device)
before, begin = peak_memory(options.device), time.perf_counter()
out = fg.sample(prior, (1, 2), guidance=guidance, **run)
log_evidence = out.log_evidence.item()  # waits for a GPU
seconds, peak = time.perf_counter() - begin, peak_memory(options.device)
print(f"{options.particles} particles, {options.steps} steps: {seconds:.1f} s")
print(f"{1e9 * seconds / (options.particles * options.steps):.0f} ns for each particle and step")
print(f"peak memory {peak:.0f} MiB, {peak - before:.0f} MiB more than before the run")
print(f"log p(y) {log_evidence:.4f} ± {out.log_evidence_error.item():.4f}, exact {exact_log_evidence():.4f}")
above = (out.weights[0] * (out.x[0, :, 1] > 0)).sum().item()  # x2 > 0
print(f"share of the upper part {above:.3f}, ESS {out.ess[-1].item():.0f} of {options.particles}")
