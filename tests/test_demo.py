"""The command line and the demo: what they print and draw, and the closed forms of the mixture."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch

import fastguide as fg
from fastguide import cli, demo, digits

ROOT = Path(__file__).parents[1]


def run(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("method", ["plain", "dps", "pnp", "pigdm", "latent-pnp"])
def test_one_task_and_method(method, capsys, tmp_path):
    out = run(capsys, "demo", "--task", "half", "--method", method, "--out", str(tmp_path))
    truth, row = (line for line in out.splitlines() if line.startswith("half"))
    assert 0.9 < float(truth.removeprefix("half    truth")) < 1.1
    psnr, ssim, residual, spread, seconds = (float(v) for v in row.split()[2:])
    if method == "plain":  # does not use the measurement
        assert residual > 4 and abs(ssim) < 0.3
    else:
        assert 0.3 < residual < 2 and psnr > 12 and 0.35 < ssim < 1
    assert 0.05 < spread < 0.6 and seconds > 0
    image = matplotlib.image.imread(tmp_path / "half.png")
    assert image.shape[0] > 100 and image.shape[1] > 400 and np.ptp(image) > 0.9
    assert [p.name for p in tmp_path.iterdir()] == ["half.png"]


def test_reward_steering_has_an_effect(tmp_path):
    line = demo.steer(demo.Settings(steps=20), tmp_path / "reward.png")  # enough to see it
    prior, steered = (float(word.strip("%,")) for word in line.split() if "%" in word)
    assert prior < 40 and steered > 75
    assert (tmp_path / "reward.png").stat().st_size > 5000


def test_mixture_denoiser_and_posterior_by_quadrature():
    """The closed forms equal sums over a fine grid of x_0."""
    means = torch.tensor([[-1.0, 0.5], [0.8, -0.2], [0.3, 1.1]], dtype=torch.float64)
    model = demo.Mixture(means, 0.3, fg.schedules.flow())
    axis = torch.linspace(-4, 4, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    prior = torch.exp(-0.5 * (grid[:, None] - means).square().sum(-1) / 0.09).mean(1) / (2 * math.pi * 0.09)
    cell = (axis[1] - axis[0]) ** 2

    x = torch.tensor([[0.2, -0.7], [1.0, 0.4]], dtype=torch.float64)
    t = 0.45
    noise = torch.exp(-0.5 * (x[:, None] - (1 - t) * grid).square().sum(-1) / t**2) * prior
    exact = (noise[..., None] * grid).sum(1) / noise.sum(1)[:, None]
    assert torch.allclose(model(x, torch.full((2,), t)), exact, atol=1e-9)

    matrix, y, scale = torch.tensor([[1.0, 0.6]], dtype=torch.float64), torch.tensor([0.4]), 0.25
    weights, conditional, covariance, evidence = model.posterior(matrix, y, scale)
    density = torch.exp(-0.5 * ((y - grid @ matrix.T)[:, 0] / scale) ** 2) / (scale * math.sqrt(2 * math.pi)) * prior
    assert math.isclose(evidence, math.log(density.sum() * cell), abs_tol=1e-9)
    mean = (density[:, None] * grid).sum(0) / density.sum()
    assert torch.allclose((weights[:, None] * conditional).sum(0), mean, atol=1e-9)
    second = (density[:, None] * grid.square()).sum(0) / density.sum()
    ours = (weights[:, None] * (conditional.square() + covariance.diagonal())).sum(0)
    assert torch.allclose(ours, second, atol=1e-9)


def test_sliced_wasserstein_of_a_shift():
    """If a cloud of points moves by ``d``, the distance is ``|d| * mean |cos|``."""
    cloud = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    distance = demo.sliced_wasserstein(cloud, cloud + torch.tensor([3.0, 4.0]))
    assert math.isclose(distance, 5 * 2 / math.pi, rel_tol=1e-3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--task", "x"), "--task: expected one of"),
        (("--method", "x"), "--method: expected one of"),
        (
            ("--task", "reward", "--method", "dps"),
            "--method: expected one of ['fk', 'all'] with --task reward, got 'dps'",
        ),
        (
            ("--task", "mixture", "--method", "plain"),
            "--method: expected one of ['tds', 'fk', 'dps', 'pnp', 'pigdm', 'all'] with --task mixture, got 'plain'",
        ),
        (("--steps", "0"), "--steps: expected an integer in [1, 500], got '0'"),
        (("--steps", "many"), "--steps: expected an integer in [1, 500], got 'many'"),
        (("--particles", "-3"), "--particles: expected an integer in [1, 1048576], got '-3'"),
        (("--seed", "1.5"), "--seed: expected an integer in [0, 18446744073709551615], got '1.5'"),
        (("--device", "toaster"), "--device: expected a device that torch can use here, got 'toaster': "),
        (("--device", "xla:7"), "--device: expected a device that torch can use here, got 'xla:7': "),
        (("--out", __file__), f"--out: expected a folder that can be written to, got {__file__}: File exists"),
    ],
)
def test_what_the_demo_cannot_do_is_refused_by_option(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["demo", *arguments])
    said = capsys.readouterr().err
    assert error.value.code == 2 and words in " ".join(said.split()) and "usage: fastguide demo" in said


@pytest.mark.parametrize("steps", [1, 2, 7, 70, 500])
def test_steps_are_as_many_as_asked_for(steps):
    times = demo._times(digits.prior(), steps)
    assert len(times) == steps and times == sorted(times, reverse=True)


def test_the_demo_with_its_own_steps_and_particles(capsys, tmp_path, monkeypatch):
    calls = []

    def watched(*arguments, steps, guidance=None, **options):
        steps = steps if isinstance(steps, int) else len(steps)
        calls.append((steps, getattr(guidance, "particles", None), str(options["device"]), options["seed"]))
        return fg.sample(*arguments, steps=steps, guidance=guidance, **options)

    monkeypatch.setattr(demo, "sample", watched)
    for draws in ("draw_task", "draw_ess"):  # other tests look at the pictures
        monkeypatch.setattr(demo, draws, lambda *arguments: None)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *arguments, **options: None)
    options = ["--steps", "3", "--particles", "8", "--device", "cpu:0", "--seed", "5", "--out", str(tmp_path)]
    for task, method, particles in (
        ("half", "tds", [8]),
        ("pool4", "fk", [8]),
        ("half", "dps", [None]),
        ("reward", "all", [None, 8]),
        ("mixture", "all", [8, 8, None, None, None]),
        ("mixture", "dps", [None]),
        ("reward", "fk", [None, 8]),
    ):
        calls.clear()
        out = run(capsys, "demo", "--task", task, "--method", method, *options)
        assert calls == [(3, n, "cpu:0", 5) for n in particles] and f"\n{task}" in out


@pytest.mark.parametrize(
    "method, pictures",
    [
        ("dps", ["half.png", "pool4.png", "blur.png", "mixture.png"]),
        ("fk", ["half.png", "pool4.png", "blur.png", "reward.png", "mixture.png", "ess.png"]),
    ],
)
def test_all_tasks_that_take_a_method_and_the_pictures_of_this_run(method, pictures, capsys, tmp_path):
    (tmp_path / "of another run.png").write_bytes(b"")
    out = run(
        capsys, "demo", "--method", method, "--steps", "2", "--particles", "4", "--out", str(tmp_path)
    )  # fmt: skip
    assert f"Pictures in {tmp_path}/: {', '.join(pictures)}. " in out
    assert {path.name for path in tmp_path.iterdir()} == {*pictures, "of another run.png"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("task", ["half", "blur", "reward", "mixture"])
def test_the_demo_on_a_gpu(task, capsys, tmp_path):
    out = run(capsys, "demo", "--task", task, "--device", "cuda", "--steps", "10", "--out", str(tmp_path))
    assert f"\n{task}" in out


def test_the_version(python):
    done = python("from fastguide.cli import main; main()", "--version", cwd=ROOT)  # as the installed script
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"fastguide {fg.__version__}\n"


def test_the_module_is_the_command(python):
    module = "import runpy; runpy.run_module('fastguide', run_name='__main__', alter_sys=True)"  # python -m
    done = python(module, "demo", "--steps", "0", cwd=ROOT)
    assert done.returncode == 2 and "fastguide demo: error: argument --steps" in done.stderr


def test_the_demos_pictures_are_not_tracked():
    assert "fastguide-demo/" in (ROOT / ".gitignore").read_text().splitlines()


def test_doctor(capsys):
    out = run(capsys, "doctor")
    assert "backend reference: usable" in out and "FAILED" not in out
