"""Draws docs/accuracy.svg, the picture of the README, from the tables of docs/results.md.

python docs/picture.py
"""

from __future__ import annotations

import pathlib
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = pathlib.Path(__file__).parent
PANELS = [
    ("MNIST, fully connected", "mnist, all layers but the last"),
    (
        "Fashion-MNIST, fully connected",
        "fashion_mnist, all layers but the last",
    ),
    ("CIFAR-10, ResNet-20", "All convolutions of a ResNet-20"),
]
LINES = [  # rows of a table, the first of them that it has; label, style
    (
        ("lstsq, admm, allocation balanced (default)", "lstsq, admm (default)"),
        "keras_renorm, unlabelled samples",
        "C0-o",
    ),
    (("l2",), "keras_renorm, nothing but the weights", "C0:o"),
    (("plain",), "pruning by magnitude", "C3-s"),
]


def read_table(text: str, title: str) -> tuple[float, list[float], dict[str, list[float]]]:
    """Accuracy of the dense network, sparsities, and accuracies of every row of the table that follows a title."""
    after = text[re.search(rf"^{re.escape(title)}", text, re.MULTILINE).start() :]
    dense = float(re.search(r"\(dense ([\d.]+)", after)[1])
    header, _, *rows = re.search(r"^\|.*?\n\n", after, re.MULTILINE | re.DOTALL)[0].strip().split("\n")
    numbers = re.compile(r"[\d.]+")
    sparsities = [float(cell) for cell in numbers.findall(header)]
    values = {}
    for row in rows:
        name, *cells = row.strip("|").split("|")
        values[name.strip()] = [float(numbers.search(cell)[0]) for cell in cells]
    return dense, sparsities, values


def main():
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    plt.rcParams |= {"svg.hashsalt": "keras_renorm", "font.size": 10}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.6), sharey=True, layout="constrained")
    for ax, (name, title) in zip(axes, PANELS):
        dense, sparsities, values = read_table(text, title)
        ax.axhline(dense, color="0.6", linestyle="--", label="dense network")
        for rows, label, style in LINES:
            accuracies = next(values[row] for row in rows if row in values)
            ax.plot(
                range(len(sparsities)),
                accuracies,
                style[2:],
                color=style[:2],
                label=label,
            )
        ax.set_xticks(
            range(len(sparsities)),
            [f"{sparsity:g}%" for sparsity in sparsities],
        )
        ax.set(title=name, xlabel="weights removed", ylim=(0, 1))
        ax.grid(color="0.93")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy, one shot, no training")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(DOCS / "accuracy.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
