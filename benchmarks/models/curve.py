"""The picture of a training run: its losses over steps, next to predicting the mean embedding."""

import csv
from pathlib import Path

from benchmarks.common.pictures import BLUE, GREY, finish, panels

COLOURS = {"training": "#9dbfdd", "validation": BLUE, "mean embedding": GREY}


def read(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        raise ValueError(f"there is no {path}: a folder of `smoothie-kernels train` has one")
    with path.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{path} has no rows yet")
    return rows


def draw(run: Path, picture: Path) -> str:
    """Draws `run`/metrics.csv and validation.csv; returns what the last validation says, in words."""
    training, validation = read(run / "metrics.csv"), read(run / "validation.csv")
    figure, both = panels(1, 2, (9.6, 3.8))
    titles = ("all positions, padding included", "text alone")
    for axes, title, prefix in zip(both, titles, ("", "text_"), strict=True):
        steps = [row["step"] for row in validation]
        if not prefix:
            points = zip(*((row["step"], row["loss"]) for row in training), strict=True)
            axes.plot(*points, color=COLOURS["training"], linewidth=1, label="training")
        losses = [row[f"{prefix}loss"] for row in validation]
        axes.plot(steps, losses, "o-", color=COLOURS["validation"], markersize=3, label="validation, averaged weights")
        mean = validation[-1][f"mean_{prefix}loss"]
        axes.axhline(mean, linestyle="--", color=COLOURS["mean embedding"], label="predicting the mean embedding")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0, top=1.15 * mean)
    both[0].set_ylabel("mean squared error")
    finish(figure, picture, font=8)
    last = validation[-1]
    return (
        f"step {last['step']:,.0f}: {last['loss']:.3f} of {last['mean_loss']:.3f}, text {last['text_loss']:.3f} of "
        f"{last['mean_text_loss']:.3f}, nearest token right {last['accuracy']:.1%}"
    )
