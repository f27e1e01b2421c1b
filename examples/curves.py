"""Accuracy against sparsity, for many ways of pruning and several seeds: as a table and as a picture."""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np

import keras_renorm as kr


def write(path: pathlib.Path, content: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content)
    os.replace(partial, path)


def save(path: pathlib.Path, rows: list[dict]) -> None:
    write(path, json.dumps(rows, indent=1))


def table(rows: list[dict], sparsities) -> str:
    """Means over the seeds, and the half spread (highest minus lowest, halved) under each way that varies.

    Args:
        rows: dicts with `setting`, `way`, `seed`, `dense` and `accuracies`, one for each of `sparsities`.
    """
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        dense = np.mean([row["dense"] for row in here])
        seeds = len({row["seed"] for row in here})
        header = "".join(f"{sparsity:>13.1%}" for sparsity in sparsities)
        lines += ["", f"{setting} (dense {dense:.3f}, {seeds} seeds)", f"{'':22}{header}"]
        for way in dict.fromkeys(row["way"] for row in here):
            values = np.array([row["accuracies"] for row in here if row["way"] == way])
            spread = (values.max(axis=0) - values.min(axis=0)) / 2
            lines.append(f"{way:22}" + "".join(f"  {mean:.3f} ±{half:.3f}" for mean, half in zip(values.mean(axis=0), spread)))
    return "\n".join(lines[1:])


def picture(rows: list[dict], sparsities, path: pathlib.Path) -> None:
    """One panel a setting; lines are means, bands run from the lowest to the highest seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = plt.subplots(1, len(settings), figsize=(5 * len(settings), 4.2), squeeze=False, layout="constrained")
    for ax, setting in zip(axes[0], settings):
        here = [row for row in rows if row["setting"] == setting]
        ways = dict.fromkeys(row["way"] for row in here)
        curves = {way: [row["accuracies"] for row in here if row["way"] == way] for way in ways}
        dense = np.mean([row["dense"] for row in here])
        kr.plots.accuracy(sparsities, curves, dense, ylabel="test accuracy", ax=ax).set_title(setting)
    figure.savefig(path, dpi=100)
    plt.close(figure)
