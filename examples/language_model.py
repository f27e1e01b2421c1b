"""A small Transformer language model, pruned with its attention and its embeddings.

Reads a text (by default the help on Python's own syntax, which every installation carries), learns to predict its next
character, and is then pruned to 80%: in one shot, before and after training; by magnitude in several steps with training
between them; and the same with irrelevant-weight regularization (Bonetta and others, arXiv 2204.04977). All have the same steps
of training after the dense model, whose own training goes on for as long, too. Prints perplexities on the last tenth of the
text, and text that the pruned model writes.

    python examples/language_model.py
    python examples/language_model.py --text tinyshakespeare.txt --steps 2000
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_renorm as kr

OUT = pathlib.Path(__file__).parents[1] / "saved_models"
L = keras.layers
LENGTH = 64


def read(path):
    """The text as numbers, and the characters that they stand for."""
    if path is None:
        import pydoc_data.topics

        text = "\n".join(pydoc_data.topics.topics.values())
    else:
        text = path.read_text()
    characters, numbers = np.unique(list(text), return_inverse=True)
    return numbers.astype("int32"), characters


def windows(numbers, count, seed):
    """Random pieces of the text, and the same moved on by one character."""
    starts = np.random.default_rng(seed).integers(0, len(numbers) - LENGTH - 1, count)
    places = starts[:, None] + np.arange(LENGTH)
    return numbers[places], numbers[places + 1]


def transformer(characters, width=128, heads=4, blocks=2):
    inputs = keras.Input((LENGTH,), dtype="int32")
    positions = keras.ops.arange(LENGTH)
    x = L.Embedding(characters, width, name="characters")(inputs)
    x = x + L.Embedding(LENGTH, width, name="positions")(positions)
    for block in range(blocks):
        y = L.LayerNormalization()(x)
        x = x + L.MultiHeadAttention(heads, width // heads, name=f"attention_{block}")(y, y, use_causal_mask=True)
        y = L.LayerNormalization()(x)
        y = L.Dense(4 * width, "gelu", name=f"wide_{block}")(y)
        x = x + L.Dense(width, name=f"narrow_{block}")(y)
    outputs = L.Dense(characters, name="next")(L.LayerNormalization()(x))
    return keras.Model(inputs, outputs)


def compile_with(model, optimizer):
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def copy_of(model, optimizer):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return compile_with(copy, optimizer)


def write(model, characters, start, length=300, temperature=0.7, seed=0):
    """Text that the model makes up after `start`, an array of numbers."""
    generator, written = np.random.default_rng(seed), list(start[:LENGTH])
    for _ in range(length):
        logits = keras.ops.convert_to_numpy(model(np.array([written[-LENGTH:]], "int32")))[0, -1] / temperature
        share = np.exp(logits - logits.max())
        written.append(generator.choice(len(share), p=share / share.sum()))
    return "".join(characters[written[len(start) :]])


def adam(arguments, rate):
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, arguments.steps))


def fit(model, train, steps, seed, arguments):
    x, y = windows(train, steps * arguments.batch, seed)
    return model.fit(x, y, batch_size=arguments.batch, verbose=0)


def longer(dense, train, arguments):
    model = copy_of(dense, adam(arguments, arguments.retraining_rate))
    fit(model, train, arguments.steps, 3, arguments)
    return model


def once(dense, train, arguments, samples):
    if samples:
        return kr.prune(dense, arguments.sparsity, calibration=windows(train, samples, seed=3)[0], verbose=0)
    return kr.prune(dense, arguments.sparsity, criterion="magnitude", allocation=arguments.allocation)


def once_and_recovered(dense, train, arguments):
    """The dense model teaches the sparse one: the text that comes next is not shown."""
    text, _ = windows(train, arguments.steps * arguments.batch, seed=3)
    how = dict(epochs=1, batch_size=arguments.batch, learning_rate=arguments.retraining_rate, verbose=0)
    return kr.recover(once(dense, train, arguments, samples=1024), dense, text, **how)


def once_and_trained(dense, train, arguments, samples):
    model = kr.to_prunable(once(dense, train, arguments, samples), from_zeros=True)
    compile_with(model, adam(arguments, arguments.retraining_rate))
    fit(model, train, arguments.steps, 3, arguments)
    return model


def in_steps(dense, train, arguments, irrelevant):
    """In rounds of a fixed step, with training between them; the last one, at the full sparsity, has half of the training."""
    events = arguments.rounds - 1
    per_round = arguments.steps // (2 * events)
    rounds = iter(enumerate([per_round] * events + [arguments.steps - per_round * events], start=10))
    optimizer = adam(arguments, arguments.retraining_rate)
    if irrelevant:
        optimizer = kr.optimizers.IrrelevanceDecay(optimizer, arguments.gamma, arguments.alpha, decay_steps=per_round)

    def train_round(model):
        seed, steps = next(rounds)
        return fit(model, train, steps, seed, arguments)

    found = kr.methods.prune_iteratively(
        copy_of(dense, optimizer),
        train_round,
        metric="loss",
        floor=100.0,
        step=1 - (1 - arguments.sparsity) ** (1 / events),
        max_rounds=events,
        allocation=arguments.allocation,
        verbose=0,
    )
    return found.model


BEST = "in steps, irrelevant weights"
WAYS = {
    "dense, trained on for as long": longer,
    "one shot, by magnitude": functools.partial(once, samples=0),
    "one shot, 1024 samples": functools.partial(once, samples=1024),
    "one shot, by magnitude, trained": functools.partial(once_and_trained, samples=0),
    "one shot, 1024 samples, trained": functools.partial(once_and_trained, samples=1024),
    "one shot, 1024 samples, recovered": once_and_recovered,
    "in steps, by magnitude": functools.partial(in_steps, irrelevant=False),
    BEST: functools.partial(in_steps, irrelevant=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, default=None)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=600, help="steps of training of the dense model, and again of each way")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--allocation", default="global", help="how pruning by magnitude divides the sparsity among layers")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at first; it falls to zero as half a cosine")
    parser.add_argument("--retraining-rate", type=float, default=1e-3, help="the same of the training after the dense model's")
    parser.add_argument("--gamma", type=float, default=3e-5)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="a dense model that is there is not trained again")
    arguments = parser.parse_args()
    numbers, characters = read(arguments.text)
    train, rest = np.split(numbers, [int(0.9 * len(numbers))])
    held_out = windows(rest, 512, seed=1)
    keras.utils.set_random_seed(0)

    def show(name, model):
        compile_with(model, "adam")
        perplexity = float(np.exp(model.evaluate(*held_out, batch_size=64, verbose=0)))
        print(f"{name:36} perplexity {perplexity:.3f}  sparsity {kr.summary(model).sparsity:.3f}", flush=True)

    arguments.out.mkdir(exist_ok=True, parents=True)
    text = arguments.text.stem if arguments.text else "topics"
    settings = f"{arguments.width}_{arguments.steps}x{arguments.batch}_{arguments.learning_rate:g}"
    path = arguments.out / f"language_model_{text}_{settings}.keras"
    if path.exists():
        dense = keras.models.load_model(path)
    else:
        dense = compile_with(transformer(len(characters), arguments.width), adam(arguments, arguments.learning_rate))
        fit(dense, train, arguments.steps, 2, arguments)
        dense.save(path)
    weights = sum(row.weights for row in kr.summary(dense).rows)
    print(f"{len(numbers):,} characters, {len(characters)} kinds of them; {weights:,} weights to prune", flush=True)
    show("dense", dense)
    for way in arguments.ways:
        model = WAYS[way](dense, train, arguments)
        show(way, model)
        if way == BEST:
            model.save(arguments.out / "language_model.keras")
            print(f"\nWritten by the model pruned {BEST}:\n\n{write(model, characters, rest[:LENGTH])}\n")


if __name__ == "__main__":
    main()
