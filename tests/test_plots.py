"""The pictures of `Samples`: what is drawn are the numbers of the run."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import fastguide as fg

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def agg():
    plt.switch_backend("agg")
    yield
    plt.close("all")


# Two steps of four particles. Final particles 0, 1, 2, 3 come from 0, 0, 2, 2 before step 1, and from 1, 1, 3, 3 before
# step 0. The last has weight 0.
ANCESTORS = torch.tensor([[1, 0, 3, 2], [0, 0, 2, 2]], dtype=torch.int32)[:, None]
WEIGHTS = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)


def samples(x: torch.Tensor | None = None, **fields) -> fg.Samples:
    given = dict(
        x=torch.arange(8.0).view(1, 4, 2) if x is None else x,
        log_weights=WEIGHTS.log(),
        ess=torch.tensor([[4.0], [2.0], [8 / 3]], dtype=torch.float64),
        ancestors=ANCESTORS,
        first_ancestors=torch.tensor([[1, 1, 3, 3]], dtype=torch.int32),
        method="TDS",
    )
    return fg.Samples(**given | fields)


def curves(ax) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in ax.lines}


def test_ess():
    ax = samples().plot.ess(ess_threshold=0.5)
    drawn = curves(ax)
    assert drawn["effective sample size"] == pytest.approx([4, 2, 8 / 3])
    assert drawn["first ancestors, by count"] == pytest.approx([4, 4, 2])  # families 1, 1, 3, 3 at the end
    assert drawn["first ancestors, weighted: 1.6"] == pytest.approx([1 / (0.75**2 + 0.25**2)])
    assert drawn["resampled below"] == pytest.approx([2, 2])
    assert ax.get_ylim()[0] < 1 and ax.get_ylim()[1] > 4
    assert len(samples(ancestors=None).plot.ess().lines) == 2  # no curve of ancestors, no threshold


def test_the_second_observation_is_drawn():
    out = fg.Samples(
        torch.zeros(2, 4, 2),
        torch.zeros(2, 4).double(),
        ess=torch.tensor([[4.0, 3.0]]),
        first_ancestors=torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]]),
    )
    drawn = curves(out.plot.ess(1))
    assert drawn["effective sample size"] == pytest.approx([3]) and drawn["first ancestors, weighted: 1"] == 1


def test_genealogy():
    ax = samples().plot.genealogy()
    lines = [line.get_ydata() for line in ax.lines]
    assert np.array(lines) == pytest.approx(np.array([[0.5, 0.5, 0], [0.5, 0.5, 1], [2, 2, 2]]))
    colours = [line.get_color() for line in ax.lines]
    assert np.array_equal(colours[0], colours[1]) and not np.array_equal(colours[0], colours[2])
    assert ax.get_title() == "3 final particles, 2 first ancestors"


def test_no_two_lines_of_a_genealogy_cross_and_many_are_thinned():
    generator = torch.Generator().manual_seed(0)
    ancestors = torch.randint(300, (6, 1, 300), generator=generator, dtype=torch.int32)
    first = torch.arange(300)[None]
    for step in ancestors.long():
        first = first.gather(1, step)
    out = fg.Samples(
        torch.zeros(1, 300, 1), torch.zeros(1, 300).double(), ancestors=ancestors, first_ancestors=first.int()
    )
    ax = out.plot.genealogy(max_lines=100)
    lines = np.array([line.get_ydata() for line in ax.lines])  # [100, 7]
    assert len(lines) == 100 and lines[0, -1] == 0 and lines[-1, -1] == 299
    assert (np.diff(lines, axis=0) >= 0).all()  # one order at every step
    assert ax.get_title() == f"100 of 300 final particles, {len(first.unique())} first ancestors"


def test_marginals():
    x = torch.tensor([[[0.0, 1.0], [0.0, 2.0], [1.0, 2.0], [9.0, 9.0]]])
    axes = samples(x).plot.marginals(bins=2, truth=torch.tensor([0.25, 1.5]))
    assert axes.shape == (2, 2) and not axes[0, 1].axison
    for i, shares in ((0, [0.75, 0.25]), (1, [0.5, 0.5])):  # the dead particle at 9 is not drawn
        bars = axes[i, i].patches
        assert [bar.get_height() * bar.get_width() for bar in bars] == pytest.approx(shares)
        assert bars[0].get_x() == i and bars[-1].get_x() + bars[-1].get_width() == pytest.approx(i + 1)
    cells = np.asarray(axes[1, 0].collections[0].get_array()).reshape(2, 2)  # [x[1], x[0]]
    assert cells == pytest.approx(np.array([[0.5, 0.0], [0.25, 0.25]]))
    assert [line.get_xdata()[0] for line in axes[1, 1].lines] == [1.5]
    assert axes[1, 0].get_xlabel() == "x[0]" and axes[1, 0].get_ylabel() == "x[1]"


def test_one_marginal_into_given_axes():
    ax = plt.figure().add_subplot()
    out = fg.Samples(torch.arange(12.0).view(1, 3, 2, 2), grouped=True)
    assert out.plot.marginals([(1, 0)], bins=1, ax=ax) is ax
    bar = ax.patches[0]
    assert (bar.get_x(), bar.get_width()) == pytest.approx((2, 8)) and ax.get_xlabel() == "x[1, 0]"


def test_pictures():
    x = torch.rand(1, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    out, truth = samples(x), torch.full((1, 3, 3), -1.0)
    axes = out.plot.pictures(y=torch.full((2, 2), 0.5), truth=truth, draws=2, seed=1)
    assert not torch.equal(out.draw(2, seed=1), out.draw(2, seed=0))
    names = [ax.get_title() for ax in axes]
    assert names == ["truth", "measurement", "draw 1", "draw 2", "mean", "standard\ndeviation"]
    shown = [np.asarray(ax.images[0].get_array()) for ax in axes]
    draws = out.draw(2, seed=1)[0, :, 0]
    expected = [truth[0], torch.full((2, 2), 0.5), *draws, out.mean()[0, 0], out.variance()[0, 0].sqrt()]
    for got, wanted in zip(shown, expected, strict=True):
        assert got == pytest.approx(wanted.double().numpy())
    high = max(draws.max().item(), out.mean().max().item())
    for ax in axes[:-1]:
        assert ax.images[0].get_clim() == pytest.approx((-1.0, high))
    assert len(axes[0].figure.axes) == 7  # the colour bar


def test_a_measurement_of_other_units_has_a_scale_of_its_own():
    axes = samples(torch.rand(1, 4, 3, 3)).plot.pictures(y=torch.tensor([[0.0, 50.0]]), draws=0)
    assert axes[0].get_title() == "measurement\n(its own scale)" and axes[0].images[0].get_clim() == (0, 50)
    assert axes[1].images[0].get_clim()[1] <= 1


def test_three_channels():
    x = torch.zeros(1, 4, 3, 2, 2)
    x[0, 0, 0], x[0, 1, 1] = 2.0, -2.0  # red of weight 1/2, minus green of weight 1/4
    mean, deviation = samples(x).plot.pictures(draws=0)
    wanted = np.array([1.0, -0.5, 0.0])
    assert np.asarray(mean.images[0].get_array())[0, 0] == pytest.approx((wanted + 0.5) / 1.5)
    x[0, 0, :, 0, 1] = 0.7  # another corner, to tell rows from columns
    again = samples(x).plot.pictures(draws=0)[0]
    assert np.asarray(again.images[0].get_array())[0, 1] == pytest.approx((np.array([0.35, -0.15, 0.35]) + 0.5) / 1.5)
    assert np.asarray(deviation.images[0].get_array()) == pytest.approx(np.sqrt((1.0 + 0.75) / 3))


IMAGES = torch.rand(1, 4, 1, 2, 2)


@pytest.mark.parametrize(
    "draw, said",
    [
        (lambda: samples(ess=None).plot.ess(), r"ess: expected samples of TDS or FK"),
        (lambda: samples(first_ancestors=None).plot.ess(), r"ess: expected samples of TDS or FK"),
        (lambda: samples().plot.ess(1), r"observation: expected an integer in \[0, 0\], got 1"),
        (lambda: samples().plot.ess(ess_threshold=2), r"ess_threshold: expected"),
        (lambda: samples(ancestors=None).plot.genealogy(), r"genealogy: expected .*keep_ancestors=True"),
        (lambda: samples().plot.genealogy(max_lines=0), r"max_lines: expected an integer >= 1, got 0"),
        (lambda: samples().plot.marginals([2]), r"elements: expected at most 8 indices .* \[2\], got \[2\]"),
        (lambda: samples().plot.marginals([(0, 0)]), r"elements: expected"),
        (lambda: samples().plot.marginals([]), r"elements: expected"),
        (lambda: samples(torch.zeros(1, 4, 9)).plot.marginals(), r"elements: expected indices .*, got None"),
        (
            lambda: samples().plot.marginals(truth=torch.zeros(3)),
            r"truth: expected one event of shape \[2\], got \[3\]",
        ),
        (lambda: samples().plot.marginals(ax=plt.figure().add_subplot()), r"ax: expected None or 4 matplotlib Axes"),
        (lambda: samples().plot.pictures(), r"pictures: expected images .* got \[1, 4, 2\]"),
        (lambda: samples(torch.zeros(1, 4, 2, 3, 3)).plot.pictures(), r"pictures: expected images"),
        (lambda: samples(IMAGES).plot.pictures(y=torch.zeros(5)), r"y: expected one real measurement .* \[5\]"),
        (lambda: samples(IMAGES).plot.pictures(y=torch.zeros(2, 2) * 1j), r"y: expected one real measurement"),
        (lambda: samples(torch.full((1, 4, 1), torch.inf)).plot.marginals(), r"marginals: expected finite samples"),
        (
            lambda: fg.Samples(torch.zeros(2, 1, 8, 8)).plot.pictures(truth=torch.zeros(1, 8, 8)),
            r"expected several samples",
        ),
        (
            lambda: samples(IMAGES).plot.pictures(truth=torch.zeros(2, 2)),
            r"truth: expected .*\[1, 2, 2\], got \[2, 2\]",
        ),
        (lambda: fg.Samples(torch.zeros(4, 1, 2, 2)).plot.pictures(), r"expected several samples|pictures: expected"),
        (lambda: fg.Samples(torch.zeros(4, 2)).plot.marginals(), r"expected several samples of each observation"),
    ],
)
def test_errors(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()


def test_without_matplotlib_an_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"plot: expected matplotlib .*pip install 'fastguide\[demo\]'"):
        samples().plot.ess()
