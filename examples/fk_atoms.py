"""FK steering of atoms in space: coordinates [N, 3], some atoms fixed, the centre of mass at 0.

    python examples/fk_atoms.py --particles 4000 --out fastguide-examples

Three atoms stand still and five move around them. The prior is a mixture of 64 arrangements, in place of a trained
network. The reward counts the moving atoms that touch a fixed one, and has no derivative.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import fastguide as fg

MOVES = torch.tensor([[False]] * 3 + [[True]] * 5)  # [N, 1]: the mask of the atoms that move
FIXED = torch.tensor([[1.4, 0.0, 0.0], [-0.7, 1.2, 0.0], [-0.7, -1.2, 0.0]] + [[0.0, 0.0, 0.0]] * 5)
WIDTH, STRENGTH = 0.25, 1.5  # of a mode; of the reward


def centred(x):
    """x [..., N, 3] with the centre of mass of the moving atoms, of equal masses, at 0; the fixed atoms become 0."""
    return MOVES * (x - (MOVES * x).sum(-2, keepdim=True) / MOVES.sum())


generator = torch.Generator().manual_seed(0)
DIRECTIONS = torch.nn.functional.normalize(torch.randn(64, 8, 3, generator=generator), dim=-1)
MODES = centred(DIRECTIONS * (2.5 + 2 * torch.rand(64, 8, 1, generator=generator)))


def net(x, t):
    """E[x_0 | x_t], [n, N, 3], for x_t = (1 - t) x_0 + t eps. A trained network goes between the same projections."""
    alpha, sigma = 1 - t[:, None, None, None], t[:, None, None, None]
    variance = (alpha * WIDTH) ** 2 + sigma**2
    residual = centred(x)[:, None] - alpha * MODES  # [n, 64, N, 3]: without the noise where nothing moves
    share = torch.softmax(-residual.square().sum((2, 3), keepdim=True) / (2 * variance), dim=1)
    return FIXED + (share * (MODES + alpha * WIDTH**2 / variance * residual)).sum(1)


def contacts(x):
    """The reward: how many moving atoms are within 2.5 Angstrom of a fixed one, [n]."""
    return (torch.cdist(x[:, 3:], x[:, :3]) < 2.5).any(-1).sum(-1).double()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--particles", type=int, default=4000)
parser.add_argument("--out", type=Path, default=Path("fastguide-examples"), help="folder of the picture")
options = parser.parse_args()

prior = fg.Denoiser(net, fg.schedules.flow(), prediction="sample")
guidance = fg.FK(contacts, particles=options.particles, strength=STRENGTH)
out = fg.sample(prior, (1, 8, 3), guidance=guidance, steps=100, seed=0, keep_ancestors=True)
found, weights, error = contacts(out.x[0]), out.weights[0], out.log_evidence_error[0]  # [K], [K], a number
noise, modes = torch.randn(64 * 4000, 8, 3, generator=generator), MODES.repeat(4000, 1, 1)
exact = contacts(FIXED + modes + WIDTH * centred(noise))  # draws of the prior without diffusion
tilt = (STRENGTH * exact).exp()
print(f"contacts: prior {exact.mean():.2f}, FK {weights @ found:.2f}, exact {tilt @ exact / tilt.sum():.2f}")
print(f"log E[exp(strength r)]: FK {out.log_evidence[0]:.3f} ± {error:.3f}, exact {tilt.mean().log():.3f}")
print(f"centre of mass: {out.x.mean(2).abs().max():.1e} from 0")
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(2, 3))
bars = ("prior", exact, torch.ones_like(exact)), ("exact target", exact, tilt), ("FK", found, weights)
for i, (name, number, weight) in enumerate(bars):
    share = torch.bincount(number.long(), weight / weight.sum(), minlength=6).numpy()
    left.bar(np.arange(6) + 0.28 * (i - 1), share, width=0.28, label=name)
left.set(title="moving atoms near a fixed one", xlabel="number of contacts", ylabel="probability")
left.legend()
# The genealogy: from each final particle back to the first, relatives side by side, each amid its descendants.
lines = [np.arange(options.particles)]
for step in out.ancestors[:, 0].numpy()[::-1]:
    lines.insert(0, step[lines[0]])  # the particle that each one was a step before
lines = np.array(lines)[:, np.lexsort(lines[::-1])[:100]]  # [levels, 100]
families = [np.unique(level, return_inverse=True)[1] for level in lines]
right.set_prop_cycle(color=plt.cm.tab10(families[0] % 10))  # by the first ancestor
right.plot(np.array([(np.bincount(f, np.arange(len(f))) / np.bincount(f))[f] for f in families]), lw=0.8)
right.set(title=f"genealogy of {lines.shape[1]} final particles", xlabel="step", ylabel="particle")
options.out.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out / "fk_atoms.png", dpi=120)
