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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, default=None)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=600, help="steps of training of the dense model, and again of each way")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at first; it falls to zero as half a cosine")
    parser.add_argument("--gamma", type=float, default=3e-5)
    parser.add_argument("--alpha", type=float, default=1.0)
    arguments = parser.parse_args()
    numbers, characters = read(arguments.text)
    train, rest = np.split(numbers, [int(0.9 * len(numbers))])
    held_out = windows(rest, 512, seed=1)
    keras.utils.set_random_seed(0)

    def data(steps, seed):
        return windows(train, steps * arguments.batch, seed)

    def perplexity(model):
        return float(np.exp(model.evaluate(*held_out, batch_size=64, verbose=0)))

    def fit(model, steps, seed):
        x, y = data(steps, seed)
        return model.fit(x, y, batch_size=arguments.batch, verbose=0)

    def adam():
        return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(arguments.learning_rate, arguments.steps))

    dense = compile_with(transformer(len(characters)), adam())
    fit(dense, arguments.steps, seed=2)
    weights = sum(row.weights for row in kr.summary(dense).rows)
    print(f"{len(numbers):,} characters, {len(characters)} kinds of them; {weights:,} weights to prune", flush=True)
    results = {"dense": perplexity(dense)}
    print(f"{'dense':36} perplexity {results['dense']:.3f}", flush=True)

    # The last round, at the full sparsity, is half of the training.
    per_round = arguments.steps // (2 * (arguments.rounds - 1))
    lengths = [per_round] * (arguments.rounds - 1) + [arguments.steps - per_round * (arguments.rounds - 1)]
    step = 1 - (1 - arguments.sparsity) ** (1 / (arguments.rounds - 1))
    models = {}

    def show(name, model):
        models[name], results[name] = model, perplexity(model)
        print(f"{name:36} perplexity {results[name]:.3f}  sparsity {kr.summary(model).sparsity:.3f}", flush=True)

    longer = copy_of(dense, adam())
    fit(longer, arguments.steps, seed=3)
    show("dense, trained on for as long", longer)
    once = compile_with(kr.prune(dense, arguments.sparsity, criterion="magnitude", allocation="global"), adam())
    show("one shot, by magnitude", once)
    samples = data(32, seed=3)[0]
    fitted = compile_with(kr.prune(dense, arguments.sparsity, calibration=samples, verbose=0), adam())
    show("one shot, 1024 samples", fitted)
    for name, sparse in (("one shot, by magnitude", once), ("one shot, 1024 samples", fitted)):
        trained = compile_with(kr.to_prunable(sparse, from_zeros=True), adam())
        fit(trained, arguments.steps, seed=3)
        show(f"{name}, trained", trained)
    for name, optimizer in (
        ("in steps, by magnitude", adam()),
        (
            "in steps, irrelevant weights",
            kr.optimizers.IrrelevanceDecay(adam(), arguments.gamma, arguments.alpha, decay_steps=per_round),
        ),
    ):
        rounds = iter(enumerate(lengths, start=10))

        def train_round(model, rounds=rounds):
            seed, steps = next(rounds)
            return fit(model, steps, seed)

        found = kr.methods.prune_iteratively(
            copy_of(dense, optimizer),
            train_round,
            metric="loss",
            floor=100.0,
            step=step,
            max_rounds=arguments.rounds - 1,
            verbose=0,
        )
        show(name, compile_with(found.model, adam()))
    best = "in steps, irrelevant weights"
    print(f"\nWritten by the model pruned {best}:\n\n{write(models[best], characters, rest[:LENGTH])}")
    OUT.mkdir(exist_ok=True)
    models[best].save(OUT / "language_model.keras")


if __name__ == "__main__":
    main()
