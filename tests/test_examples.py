"""Every program of examples/ runs with short settings, and what it prints is right."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from fastguide import digits
from fastguide.digits import train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from numpy, for tensors that matplotlib draws

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """``run(name, *arguments)`` runs an example as a user does, and returns what it prints."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        plt.close("all")
        return capsys.readouterr().out

    return run


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(NUMBER, text)]


def line(text: str, start: str) -> list[float]:
    """The numbers of the line that starts with ``start``."""
    (found,) = (row.removeprefix(start) for row in text.splitlines() if row.startswith(start))
    return numbers(found)


def test_every_one_is_short_and_listed():
    listed = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path.name
        assert f"python examples/{path.name}" in listed and f"python examples/{path.name}" in path.read_text()


def test_tds_mixture(run, tmp_path):
    printed = run("tds_mixture", "--particles", 1000, "--steps", 5, 40, "--out", tmp_path)
    (exact,) = line(printed, "exact log p(y)")
    few, many = (numbers(row) for row in printed.splitlines()[-2:])
    assert exact == pytest.approx(-1.613, abs=0.001)
    assert many[0] == 40 and abs(many[1] - exact) < 0.05 and many[2] < 0.1
    assert abs(few[3]) > abs(many[3])  # the bias of few steps
    assert (tmp_path / "tds_mixture.png").stat().st_size > 10_000


def test_fk_atoms(run, tmp_path):
    printed = run("fk_atoms", "--particles", 1000, "--out", tmp_path)
    prior, found, exact = line(printed, "contacts:")
    assert abs(found - exact) < 0.15 * (exact - prior)
    found, error, exact = line(printed, "log E[exp(strength r)]:")
    assert abs(found - exact) < 0.25 and 0.01 < error < 0.2
    assert line(printed, "centre of mass:")[0] < 1e-5
    assert (tmp_path / "fk_atoms.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:.*ancestor")
def test_tomography(run, tmp_path):
    printed = run("tomography", "--steps", 5, "--particles", 1, "--out", tmp_path)
    names = "prior", "DPS", "PnP", "PiGDM", "FK, 1 filter", "TDS, 1 filter", "TDS, 19 filters"
    found = {name: dict(zip(("psnr", "residual", "coverage"), line(printed, name)[:3], strict=True)) for name in names}
    prior = found["prior"]
    for name in ("PnP", "PiGDM", "TDS, 19 filters"):
        assert found[name]["psnr"] > prior["psnr"] + 8 and 0.4 < found[name]["residual"] < 2 < prior["residual"]
        assert 0.55 < found[name]["coverage"] <= 1
    assert found["TDS, 1 filter"]["coverage"] < 0.1 and found["FK, 1 filter"]["coverage"] < 0.1  # one ancestor is left
    for name in ("DPS", "FK, 1 filter"):  # six steps are few for these
        assert found[name]["psnr"] > prior["psnr"] + 1 and found[name]["residual"] < prior["residual"] - 0.5
    assert (tmp_path / "tomography.png").stat().st_size > 10_000


def test_million_particles(run):
    printed = run("million_particles", "--particles", 10_000, "--chunk-size", 3000, "--steps", 40)
    found, error, exact = line(printed, "log p(y)")
    assert abs(found - exact) < 0.05 and 0.003 < error < 0.03
    assert line(printed, "10000 particles, 40 steps:")[0] > 0 and line(printed, "peak memory")[0] > 100


def test_profile_phases(run, tmp_path):
    printed = run("profile_phases", "--particles", 16, "--steps", 4, "--out", tmp_path)
    shares = {name: line(printed, f"fastguide.{name} ") for name in PHASES}
    assert [shares[name][0] for name in PHASES] == [1, 4, 4, 4, 4, 4, 5]
    parts = sum(shares[name][1] for name in PHASES[1:])
    assert 0.5 * shares["run"][1] < parts <= shares["run"][1]
    assert "fastguide.gradient" in (tmp_path / "profile_phases.json").read_text()


PHASES = ("run", "network", "gradient", "step", "resample", "gather", "weights")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A tiny pipeline of the digits, trained here, and one of latents with random weights."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip

    def unet(channels, size):
        return diffusers.UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",), block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
            attention_head_dim=16,
        )  # fmt: skip

    table = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    images, generator = digits.held_out()[0][10:], torch.Generator().manual_seed(0)

    def loss(step):
        batch = images[torch.randint(len(images), (32,), generator=generator)]
        return train.v_loss(lambda x, t, label: net(x, t).sample, batch, None, generator, table)

    net = unet(1, 8)
    net = train.optimise(net, loss, steps=100, learning_rate=5e-3, ema=0.98)
    folder = tmp_path_factory.mktemp("pipelines")
    diffusers.DDIMPipeline(net, scheduler).save_pretrained(folder / "pixels")
    vae = diffusers.VQModel(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), latent_channels=2, num_vq_embeddings=16,
    )  # fmt: skip
    diffusers.LDMPipeline(vae, unet(2, 4), scheduler).save_pretrained(folder / "latents")
    return folder


def test_diffusers_pipeline(run, pipelines, tmp_path):
    image = pytest.importorskip("PIL.Image")
    digit = (digits.held_out()[0][3, 0] + 1) * 127.5
    image.fromarray(digit.to(torch.uint8).numpy()).save(tmp_path / "digit.png")
    pixels = run("diffusers_pipeline", pipelines / "pixels", "--image", tmp_path / "digit.png", "--steps", 20)
    latents = run("diffusers_pipeline", pipelines / "latents", "--steps", 4, "--out", tmp_path)
    for task in ("inpainting", "super-resolution"):
        restored, prior, residual = line(pixels, f"{task}:")
        assert restored > prior + 1.5 and 0.3 < residual < 2
        assert len(line(latents, f"{task}:")) == 3  # weights are random: only the number of values is known
    assert Path("fastguide-examples/diffusers_pipeline.png").stat().st_size > 10_000  # the default folder
