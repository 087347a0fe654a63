"""The figures of the synthetic suites: what was measured here as full lines or bars, the paper's numbers hollow beside them."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltanet.evaluation import plots

__all__ = ["plot_bars", "plot_curves"]

# A model keeps its colour and marker in every figure. Beyond Okabe and Ito's eight, they come again with another marker.
STYLES = {
    "deltanet": (plots.BLUE, "o"),
    "deltanet-noconv": ("#56B4E9", "o"),
    "attention": (plots.GREY, "s"),
    "mamba": (plots.ORANGE, "^"),
    "mamba-noconv": ("#E69F00", "^"),
    "gla": (plots.GREEN, "D"),
    "gla+conv": ("#44AA99", "D"),
    "retnet": ("#CC79A7", "v"),
    "linear-attention": ("#E69F00", "X"),
    "gated-deltanet": ("#332288", "P"),
    "deltaproduct": ("#882255", "*"),
    "deltanet-negative-noconv": ("#DDAACC", "*"),
    "deltaproduct2-noconv": ("#BB6699", "*"),
    "deltaproduct3-noconv": ("#882255", "*"),
    "deltaproduct4-noconv": ("#441133", "*"),
    "deltaproduct2-positive-noconv": (plots.BLUE, "*"),
}
SPARE = (("#222222", "h"), ("#999933", "<"), ("#AA4499", ">"), ("#117733", "p"))

Curve = Sequence[tuple[float, float]]


def plot_curves(
    stem: Path, title: str, x: str, y: str, ours: Mapping[str, Curve], paper: Mapping[str, Curve], note: str = ""
) -> list[Path]:
    """A line of (x, percent) for each model, x doubling from tick to tick; the paper's dashed, with hollow markers, also where it is alone.

    Writes `stem`.png and .svg and returns their paths.
    """
    with plots.figure_with_axes(title, x, y) as (figure, axes):
        for i, model in enumerate(dict.fromkeys([*ours, *paper])):
            colour, marker = _style(model, i)
            if points := ours.get(model):
                axes.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, markersize=6, label=model, clip_on=False, zorder=3
                )  # fmt: skip
            if points := paper.get(model):
                axes.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, markersize=6, markerfacecolor="white",
                    linestyle=(0, (4, 2)), linewidth=1.2, clip_on=False, label=None if model in ours else f"{model}, paper",
                )  # fmt: skip
        if any(model in paper for model in ours):
            axes.plot([], [], color=plots.GREY, linestyle=(0, (4, 2)), linewidth=1.2, label="paper")
        ticks = sorted({at for points in [*ours.values(), *paper.values()] for at, _ in points})
        axes.set_xscale("log", base=2)
        _ticks(axes.xaxis, ticks)
        axes.set_ylim(0, 104)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=10)
        _note(axes, note)
        return plots.save(figure, stem)


def plot_bars(
    stem: Path,
    title: str,
    y: str,
    groups: Sequence[str],
    ours: Mapping[str, Mapping[str, float]],
    paper: Mapping[str, Mapping[str, float]],
    note: str = "",
    chance: Mapping[str, float] | None = None,
) -> list[Path]:
    """A bar of percent for each model in each group, the paper's number as a hollow mark on it, and a line at each group's `chance`.

    Writes `stem`.png and .svg and returns their paths.
    """
    with plots.figure_with_axes(title, "", y) as (figure, axes):
        figure.set_size_inches(max(7.2, 1.5 * len(groups)), 4.2)
        width = 0.8 / max(len(ours), 1)
        for i, (model, scores) in enumerate(ours.items()):
            colour, marker = _style(model, i)
            for j, group in enumerate(groups):
                place = j - 0.4 + (i + 0.5) * width
                label = model if j == 0 else None
                axes.bar(place, scores.get(group, 0), 0.92 * width, color=colour, label=label)
                if (theirs := paper.get(model, {}).get(group)) is not None:
                    axes.plot(place, theirs, marker=marker, color=plots.INK, markerfacecolor="white", markersize=6)
        if any(model in paper for model in ours):
            axes.plot([], [], linestyle="", marker="o", color=plots.INK, markerfacecolor="white", label="paper")
        for j, group in enumerate(groups):
            if chance is not None:
                label = "guessing" if j == 0 else None
                axes.hlines(
                    chance[group], j - 0.42, j + 0.42, color=plots.INK, linestyle=":", linewidth=1.5, label=label
                )
        names = [textwrap.fill(group.replace("_", " "), 12, break_long_words=False) for group in groups]
        axes.set_xticks(range(len(groups)), names)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 104)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=10)
        _note(axes, note)
        return plots.save(figure, stem)


def _style(model: str, number: int) -> tuple[str, str]:
    return STYLES.get(model, SPARE[number % len(SPARE)])


def _ticks(axis: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FixedFormatter([f"{value:,.0f}" for value in values]))
    axis.set_minor_locator(NullLocator())


def _note(axes: Any, text: str) -> None:
    if text:
        axes.annotate(
            text,
            (0.0, -0.2),
            xycoords="axes fraction",
            ha="left",
            va="top",
            color=plots.GREY,
            fontsize=8,
            annotation_clip=False,
        )
