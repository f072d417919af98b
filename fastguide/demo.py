"""``fastguide demo``: every algorithm on held-out handwritten digits, and a mixture whose posterior is known.

Each task measures some real digits that the prior has never seen; each method draws samples of what they may have
been. Writes one picture a task and prints one table row a method.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import digits, likelihoods, metrics, operators, schedules
from .denoiser import Denoiser
from .guidance import DPS, FK, TDS, LatentPnP, PiGDM, PnP
from .likelihoods import Likelihood
from .operators import Operator
from .sampling import Samples, sample

EVENT = (1, 8, 8)
SAMPLES = 4  # shown for each digit
SHOWN = (0, 7, 24)  # of the held-out digits: a 3, an 8, a 4
METHODS = ("plain", "dps", "pnp", "pigdm", "latent-pnp", "tds", "fk")
OF_MIXTURE = ("tds", "fk", "dps", "pnp", "pigdm")
NOISE = 0.1
RANGE = 2.0  # of the images, which lie in [-1, 1]


@dataclass(frozen=True)
class Settings:
    """What the command line sets beside the tasks; None leaves each task and method its own number."""

    seed: int = 0
    steps: int | None = None
    particles: int | None = None
    device: torch.device | str = "cpu"


@dataclass
class Task:
    """A measurement of some held-out digits."""

    name: str
    title: str
    operator: Operator
    error: Callable[[Tensor], Likelihood]  # of y
    draw: Callable[[torch.Generator, torch.Size], Tensor]  # the measurement's noise
    spread: float  # its standard deviation
    truth: Tensor = field(init=False)  # [B, 1, 8, 8]
    y: Tensor = field(init=False)

    def measure(self, seed: int) -> Task:
        self.truth = digits.held_out()[0][list(SHOWN)]
        z = self.operator(self.truth)
        self.y = z + self.draw(torch.Generator().manual_seed(seed), z.shape)
        return self


def _gaussian_task(name: str, title: str, operator: Operator) -> Task:
    def draw(generator: torch.Generator, shape: torch.Size) -> Tensor:
        return NOISE * torch.randn(shape, generator=generator)

    return Task(name, title, operator, lambda y: likelihoods.Gaussian(y, operator, NOISE), draw, NOISE)


def _blur_task() -> Task:
    df = 3.0
    g = torch.exp(-0.5 * torch.arange(-1.0, 2.0) ** 2)
    operator = operators.Blur(torch.outer(g, g) / g.sum() ** 2, padding="zeros")

    def draw(generator: torch.Generator, shape: torch.Size) -> Tensor:
        # Student's t: a normal over the root of a chi-squared of df = 3, itself of three normals
        z = torch.randn((4, *shape), generator=generator)
        return NOISE * z[0] / (z[1:].square().sum(0) / df).sqrt()

    return Task(
        "blur",
        "3x3 blur, Student-t noise",
        operator,
        lambda y: likelihoods.StudentT(y, operator, NOISE, df=df),
        draw,
        NOISE * math.sqrt(df / (df - 2)),
    )


def tasks() -> dict[str, Task]:
    """Every imaging task, by name."""
    mask = torch.zeros(EVENT, dtype=torch.bool)
    mask[:, :4] = True
    found = [
        _gaussian_task("half", "lower half missing", operators.Inpainting(mask)),
        _gaussian_task("pool2", "2x2 average pooling", operators.AveragePool(2)),
        _gaussian_task("pool4", "4x4 average pooling", operators.AveragePool(4)),
        _blur_task(),
    ]
    return {task.name: task for task in found}


@dataclass
class Result:
    """Samples of one method, and what the table says of them."""

    x: Tensor  # [B, S, 1, 8, 8]
    seconds: float
    log_evidence: Tensor | None = None
    ess: Tensor | None = None  # [steps + 1, B]
    ancestors: Tensor | None = None  # [B], the effective number of first ancestors
    particles: int = 0


def _times(prior: Denoiser, steps: int | None) -> list[float]:
    """``steps`` times, uniform in the log signal-to-noise ratio, from where the signal begins to show."""
    wanted = total = 70 if steps is None else steps
    while True:
        levels = prior.schedule.levels(total, spacing="logsnr")[:-1]
        times = [level.t for level in levels if level.alpha > 0.03 * level.sigma]
        if len(times) >= wanted:
            return times
        total += wanted - len(times)


def _with_bar(
    description: str, prior: Denoiser, shape: tuple[int, ...], steps: list[float], settings: Settings, **options
) -> Samples:
    options = {"seed": settings.seed, "device": settings.device, **options}
    with tqdm(total=len(steps), desc=description, unit="step", leave=False) as bar:

        def update(_: Any) -> None:
            bar.update()

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ancestors:", RuntimeWarning)  # the pictures say how many are left
            return sample(prior, shape, steps=steps, callback=update, **options)


def solve(task: Task, method: str, settings: Settings) -> Result:
    """Draw posterior samples of a task's digits by one method."""
    prior = digits.prior(device=settings.device)
    steps = _times(prior, settings.steps)
    batch, seed = len(task.truth), settings.seed
    repeated = task.error(task.y.repeat_interleave(SAMPLES, 0))  # SAMPLES independent runs of each digit
    start = time.perf_counter()

    guidance: Any
    if method in ("tds", "fk"):
        particles = settings.particles or {"tds": 128, "fk": 256}[method]
        guidance = (
            TDS(task.error(task.y), particles=particles)
            if method == "tds"
            else FK(_rounded(task, prior), particles=particles, potential="difference")
        )
        out = _with_bar(f"{task.name} {method}", prior, (batch, *EVENT), steps, settings, guidance=guidance, eta=1.0)
        x = out.draw(SAMPLES, seed=seed).cpu()
        seconds = time.perf_counter() - start
        assert out.log_evidence is not None and out.ess is not None
        return Result(x, seconds, out.log_evidence.cpu(), out.ess.cpu(), out.effective_ancestors.cpu(), particles)

    decode: Callable[[Tensor], Tensor] = lambda z: z  # noqa: E731
    event = EVENT
    if method == "plain":
        guidance = None
    elif method == "dps":
        guidance = DPS(repeated, zeta=0.25)
    elif method == "pnp":
        guidance = PnP(repeated, zeta=1.0)
    elif method == "pigdm":  # knows Gaussian noise alone: take that of the same variance
        guidance = PiGDM(likelihoods.Gaussian(repeated.y, task.operator, task.spread))
    else:
        prior, _, decode = digits.latent_prior(device=settings.device)
        event = (2, 4, 4)
        guidance = LatentPnP(repeated, decode, zeta=1.0, solver="gradient", iterations=8)
    out = _with_bar(f"{task.name} {method}", prior, (batch * SAMPLES, *event), steps, settings, guidance=guidance)
    x = decode(out.x).reshape(batch, SAMPLES, *EVENT).cpu()
    return Result(x, time.perf_counter() - start)


def _rounded(task: Task, prior: Denoiser) -> Likelihood:
    """The likelihood of the image as the scanner counts ink, in whole steps of 1/8: without a derivative. Its scale
    follows the noise of ``x0_hat``, else the first levels would kill all particles but one."""
    device = next(prior.net.parameters()).device  # type: ignore[attr-defined]
    exact = task.error(task.y).to(device)

    def log_prob(x0: Tensor, y: Tensor, scale: float) -> Tensor:
        grey = (x0.clamp(-1, 1) * 8).round() / 8
        return exact.log_prob_and_gradient(exact.operator(grey), y, scale)[0]

    def scale(t: float) -> float:
        sigma = prior.schedule.sigma(t)
        return math.sqrt(NOISE**2 + sigma**2)

    return likelihoods.Callable(log_prob, y=task.y, scale=scale)


# --- table --------------------------------------------------------------------------------------------------

_HEADER = f"{'task':8s}{'method':12s}{'PSNR':>7s}{'SSIM':>6s}{'residual':>10s}{'spread':>8s}"
_HEADER += f"{'log p(y)':>10s}{'seconds':>9s}"


def row(task: Task, method: str, result: Result) -> str:
    """PSNR (dB) and SSIM of the samples' mean, the residual norm over the noise's, the samples' standard deviation per
    pixel, the mean estimate of ``log p(y)``, and seconds."""
    x = result.x
    psnr = metrics.psnr(x.mean(1)[None], task.truth[None], data_range=RANGE).item()  # of all digits as one image
    ssim = metrics.ssim(x.mean(1), task.truth, data_range=RANGE, window=7).mean().item()  # 11 needs larger images
    ratio = _residual(task, x)
    evidence = "" if result.log_evidence is None else f"{result.log_evidence.mean().item():.1f}"
    spread = x.std(1).mean().item()
    quality = f"{psnr:7.1f}{ssim:6.2f}{ratio:10.2f}{spread:8.2f}"
    return f"{task.name:8s}{method:12s}{quality}{evidence:>10s}{result.seconds:9.1f}"


def row_of_truth(task: Task) -> str:
    """The residual of the truth: what a good sample should have."""
    return f"{task.name:8s}{'truth':12s}{'':13s}{_residual(task, task.truth[:, None]):10.2f}"


def _residual(task: Task, x: Tensor) -> float:
    """The root mean square of ``A x - y`` over the noise's standard deviation, for ``x`` ``[B, S, *event]``."""
    residual = task.operator(x.flatten(0, 1)) - task.y.repeat_interleave(x.shape[1], 0)
    return residual.square().mean().sqrt().item() / task.spread


# --- pictures -----------------------------------------------------------------------------------------------


def _image(axis, image: Any, **options) -> Any:
    axis.set(xticks=[], yticks=[])
    options = {"cmap": "gray", "vmin": -1, "vmax": 1, **options}
    return axis.imshow(np.asarray(image), interpolation="nearest", **options)


def _measurement(task: Task, b: int) -> np.ndarray:
    """What was measured, as an image; NaN where nothing was."""
    if isinstance(task.operator, operators.Inpainting):
        image = torch.full((1, 64), math.nan)
        image[:, task.operator.index] = task.y[b]
        return image.reshape(8, 8).numpy()
    return task.y[b, 0].numpy()


def draw_task(task: Task, results: dict[str, Result], path: Path) -> None:
    """Truth and measurement above; below, a row for each method: samples, their standard deviation, and for particle
    methods the effective number of first ancestors."""
    blocks, width = len(SHOWN), SAMPLES + 2  # the last column has words
    figure, axes = plt.subplots(
        len(results) + 1, blocks * width, figsize=(0.7 * blocks * width, 0.7 * (len(results) + 2)), squeeze=False
    )
    figure.subplots_adjust(left=0.08, right=0.995, bottom=0.02, top=0.9, wspace=0.08, hspace=0.1)
    for axis in axes.flat:
        axis.axis("off")

    def show(row: int, column: int, image: Any, **options: Any) -> Any:
        axis = axes[row, column]
        axis.axis("on")
        axis.set_facecolor("#7a3b3b")  # where nothing was measured
        return axis, _image(axis, image, **options)

    for b in range(blocks):
        left = b * width
        for column, (name, image) in enumerate((("truth", task.truth[b, 0]), ("measured", _measurement(task, b)))):
            axis, grey = show(0, left + column, image)
            axis.set_title(name, fontsize=8)
        for r, (method, result) in enumerate(results.items(), start=1):
            for s in range(SAMPLES):
                axis, _ = show(r, left + s, result.x[b, s, 0])
                if s == 0 and b == 0:
                    label = f"{method}\nK = {result.particles}" if result.particles else method
                    axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
            axis, deviation = show(r, left + SAMPLES, result.x[b, :, 0].std(0), cmap="magma", vmin=0, vmax=1)
            if r == 1:
                axis.set_title("std", fontsize=8, pad=3)
            if result.ancestors is not None:
                number = result.ancestors[b]
                said = f"{number:.1f} first\nancestors" if number < 10 else f"{number:.0f} first\nancestors"
                axes[r, left + SAMPLES + 1].text(0.0, 0.5, said, fontsize=6.5, va="center")
    for column, image, label in ((2, grey, "grey value"), (4, deviation, "standard deviation")):
        box = axes[0, column].get_position()
        bar = figure.add_axes(
            (box.x0 + 0.1 * box.width, box.y0 + 0.55 * box.height, 1.6 * box.width, 0.12 * box.height)
        )
        figure.colorbar(image, cax=bar, orientation="horizontal", ticks=image.get_clim())
        bar.set_title(label, fontsize=7, pad=3)
        bar.tick_params(labelsize=6)
    figure.suptitle(
        f"{task.title}, noise {NOISE:g}: {SAMPLES} samples of each method, and their standard deviation", fontsize=10
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_ess(results: dict[str, dict[str, Result]], path: Path) -> None:
    """Effective sample size over the steps, of the particle methods."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(3.4 * len(results) + 0.6, 3.0), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (name, by_method) in zip(axes[0], results.items(), strict=True):
        for method, color in (("tds", "C0"), ("fk", "C1")):
            result = by_method.get(method)
            if result is None or result.ess is None:
                continue
            share = result.ess / result.particles
            for b in range(share.shape[1]):
                label = f"{method}, K = {result.particles}" if b == 0 else None
                axis.plot(share[:, b], color=color, lw=0.9, alpha=0.8, label=label)
        axis.axhline(0.5, color="gray", lw=0.8, ls=":", label="threshold")
        axis.set(title=name, xlabel="step", ylim=(0, 1.02))
        axis.legend(fontsize=7, loc="lower left")
    axes[0, 0].set_ylabel("ESS / K")
    figure.suptitle(
        "effective sample size before each step, a line for each digit; particles are resampled below the threshold",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --- a reward without a derivative --------------------------------------------------------------------------


def steer(settings: Settings, path: Path, wanted: int = 7) -> str:
    """Feynman-Kac steering of the prior to one digit, by a classifier's decision: a step function of the image."""
    prior, classifier = digits.prior(device=settings.device), digits.classifier(device=settings.device)
    steps, count, particles = _times(prior, settings.steps), 24, settings.particles or 16

    def reward(x0: Tensor) -> Tensor:
        return (classifier(x0).argmax(1) == wanted).float()

    start = time.perf_counter()
    plain = _with_bar("reward plain", prior, (count, *EVENT), steps, settings).x
    steered = _with_bar(
        "reward fk",
        prior,
        (count, *EVENT),
        steps,
        settings,
        guidance=FK(reward, particles=particles, potential="difference", strength=10.0),
    ).draw(1, seed=settings.seed)[:, 0]
    shares = [reward(x).mean().item() for x in (plain, steered)]
    seconds = time.perf_counter() - start
    figure = plt.figure(figsize=(7.6, 3.4))
    titles = ("the prior", f"steered by FK, K = {particles}: the classifier says {wanted}")
    parts: Any = figure.subfigures(2, 1)
    for part, title, images in zip(parts, titles, (plain.cpu(), steered.cpu()), strict=True):
        axes = part.subplots(2, count // 2)
        for axis, image in zip(axes.flat, images, strict=True):
            _image(axis, image[0])
        part.suptitle(title, fontsize=8, x=0.01, ha="left")
        part.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.87, wspace=0.06, hspace=0.06)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    verdict = f"the classifier sees {wanted}: prior {shares[0]:.0%}, steered {shares[1]:.0%}"
    return f"{'reward':8s}{'fk':12s}{verdict:41s}{seconds:9.1f}"


# --- a mixture whose posterior is known ---------------------------------------------------------------------


class Mixture:
    """Equal isotropic Gaussians at ``means`` ``[M, D]`` with standard deviation ``width``: the exact denoiser of any
    schedule, and the exact posterior under ``y = A x + scale * noise``."""

    def __init__(self, means: Tensor, width: float, schedule: schedules.Schedule):
        self.means, self.width, self.schedule = means, width, schedule

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """``E[x_0 | x_t]``; all of a batch is at one level."""
        level = self.schedule.level(float(t[0]))
        means = self.means.to(x)
        total = (level.alpha * self.width) ** 2 + level.sigma**2
        residual = x[:, None] - level.alpha * means  # [N, M, D]
        share = torch.softmax(-0.5 * residual.square().sum(-1) / total, dim=1)[..., None]
        return (share * (means + level.alpha * self.width**2 / total * residual)).sum(1)

    def posterior(self, matrix: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """Weights ``[M]``, means ``[M, D]`` and the common covariance of ``p(x | y)``, and ``log p(y)``; float64."""
        a, means, y = matrix.double(), self.means.double(), y.double()
        gram = self.width**2 * a @ a.T + scale**2 * torch.eye(len(a), dtype=torch.float64)
        gain = self.width**2 * a.T @ torch.linalg.inv(gram)
        residual = y - means @ a.T
        log_weights = torch.distributions.MultivariateNormal(torch.zeros_like(y), gram).log_prob(residual)
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        evidence = torch.logsumexp(log_weights, 0).item() - math.log(len(means))
        return (
            torch.softmax(log_weights, 0),
            means + residual @ gain.T,
            self.width**2 * (eye - gain @ a),
            evidence,
        )


def mixture(settings: Settings, path: Path, methods: Sequence[str] = OF_MIXTURE) -> list[str]:
    """Samples of each method against the exact posterior of a 2-D mixture of 25 modes; one row each."""
    seed, steps = settings.seed, settings.steps or 100
    grid = torch.arange(-2.0, 3.0)
    model = Mixture(torch.cartesian_prod(grid, grid), 0.15, schedules.flow())
    prior = Denoiser(model, model.schedule, "sample")
    matrix, scale, count = torch.tensor([[1.0, 0.6]]), 0.25, 1000
    y = torch.tensor([[0.9]])
    operator = operators.Matrix(matrix)
    likelihood = likelihoods.Gaussian(y, operator, scale)
    weights, means, covariance, evidence = model.posterior(matrix, y[0], scale)

    def exact(generator_seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(generator_seed)
        modes = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, dtype=torch.float64, generator=generator)
        return means[modes] + noise @ torch.linalg.cholesky(covariance).T

    truth = exact(seed)
    particles = settings.particles or 4 * count
    clouds, rows = {"exact": truth}, []
    guidances = {
        "tds": TDS(likelihood, particles=particles),
        "fk": FK(likelihood, particles=particles, potential="difference", covariance="isotropic"),
        "dps": DPS(likelihood, zeta=0.05),
        "pnp": PnP(likelihood, zeta=1.0),
        "pigdm": PiGDM(likelihood),
    }
    for name in methods:
        guidance: Any = guidances[name]
        start = time.perf_counter()
        weighted = name in ("tds", "fk")
        shape = (1 if weighted else count, 2)
        out = sample(prior, shape, guidance=guidance, steps=steps, seed=seed, device=settings.device)
        clouds[name] = (out.draw(count, seed=seed)[0] if weighted else out.x).double().cpu()
        estimate = f"{out.log_evidence.item():.2f} ({evidence:.2f})" if out.log_evidence is not None else ""
        distance = sliced_wasserstein(clouds[name], truth)
        rows.append(
            f"mixture {name:12s}distance {distance:.3f}  log p(y) {estimate:16s}{time.perf_counter() - start:9.1f}"
        )
    rows.insert(0, f"mixture exact       distance {sliced_wasserstein(exact(seed + 1), truth):.3f}  (two exact draws)")

    size = 2.1 * len(clouds), 2.8
    figure, axes = plt.subplots(1, len(clouds), figsize=size, sharex=True, sharey=True, layout="constrained")
    line = np.linspace(-3, 3, 2)
    for axis, (name, cloud) in zip(axes, clouds.items(), strict=True):
        axis.plot(line, (y.item() - matrix[0, 0].item() * line) / matrix[0, 1].item(), color="C1", lw=0.7)
        axis.scatter(*model.means.T, s=6, marker="+", color="gray", lw=0.5)
        axis.scatter(*cloud.T, s=1.2, alpha=0.5, lw=0)
        axis.set(xlim=(-3, 3), ylim=(-3, 3), xticks=(-2, 0, 2), yticks=(-2, 0, 2), xlabel="$x_1$", aspect="equal")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("$x_2$")
    figure.suptitle("posterior of a mixture of 25 modes (+), measured along the line A x = y", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return rows


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Mean 1-D Wasserstein distance of two clouds ``[n, 2]`` of one size over evenly spread directions."""
    angle = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])  # [2, directions]
    return ((a @ axes).sort(0).values - (b @ axes).sort(0).values).abs().mean().item()


# --- all of it ----------------------------------------------------------------------------------------------


def run(task: str, method: str, out: Path, settings: Settings) -> None:
    """Run the tasks and methods asked for, print the table, and write the pictures into ``out``."""
    imaging = tasks()
    takes = {**dict.fromkeys(imaging, METHODS), "reward": ("fk",), "mixture": OF_MIXTURE}  # methods of each task
    if task not in (*takes, "all"):
        raise ValueError(f"--task: expected one of {[*takes, 'all']}, got {task!r}")
    if method not in (*METHODS, "all"):
        raise ValueError(f"--method: expected one of {[*METHODS, 'all']}, got {method!r}")
    if task != "all" and method not in (*takes[task], "all"):
        raise ValueError(f"--method: expected one of {[*takes[task], 'all']} with --task {task}, got {method!r}")
    names = [name for name in takes if name != "pool2" and method in (*takes[name], "all")] if task == "all" else [task]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: expected a folder that can be written to, got {out}: {error.strerror}") from error
    start = time.perf_counter()
    print(_HEADER, flush=True)
    all_results: dict[str, dict[str, Result]] = {}
    pictures = []
    for name in names:
        picture = out / f"{name}.png"
        methods = takes[name] if method == "all" else (method,)
        if name == "reward":
            print(steer(settings, picture), flush=True)
        elif name == "mixture":
            print("\n".join(mixture(settings, picture, methods)), flush=True)
        else:
            measured = imaging[name].measure(settings.seed)
            print(row_of_truth(measured), flush=True)
            results = all_results[name] = {}
            for one in methods:
                results[one] = solve(measured, one, settings)
                print(row(measured, one, results[one]), flush=True)
            draw_task(measured, results, picture)
        pictures.append(picture.name)
    with_ess = {n: r for n, r in all_results.items() if any(x.ess is not None for x in r.values())}
    if with_ess:
        draw_ess(with_ess, out / "ess.png")
        pictures.append("ess.png")
    print(
        f"\nPSNR (dB) and SSIM: of the mean of {SAMPLES} samples."
        f"\nresidual: norm of A x - y over the noise's; at its best it is that of the truth."
        f"\nspread: the samples' standard deviation, images in [-1, 1]. log p(y): mean estimate over the digits."
        f"\nPictures in {out}/: {', '.join(pictures)}. {time.perf_counter() - start:.0f} s in all."
    )
