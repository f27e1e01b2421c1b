"""Recovery of a pruned network as a whole: the dense model teaches it on samples without labels."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_renorm.src.calibration.samples import Samples, count_samples, take_samples
from keras_renorm.src.core import validation
from keras_renorm.src.core.arrays import copied
from keras_renorm.src.core.run_folder import RunFolder, digest
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.models.graph import functional_of
from keras_renorm.src.models.model_copies import copy_model
from keras_renorm.src.pruning.conversion import strip
from keras_renorm.src.pruning.recovery import augmentation
from keras_renorm.src.pruning.recovery.course import Course, Training, take_course
from keras_renorm.src.pruning.recovery.layer_errors import layer_errors
from keras_renorm.src.pruning.recovery.lesson import Lesson, divergence, float_values, is_choice, relative_error, with_places
from keras_renorm.src.pruning.recovery.report import Place, RecoveryReport
from keras_renorm.src.pruning.recovery.zeros import zeros_held

STEPS = 1000
_FEWEST_SAMPLES = 32
_MOST_HELD_OUT = 1000
_TEMPERATURE = 2.0
# Numbers that are kept: half a gigabyte.
_MOST_ANSWERS = 2**27


def recover(
    pruned: keras.Model,
    model: keras.Model,
    samples: Any,
    epochs: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    from_logits: bool | None = None,
    augment: Any = None,
    seconds: float | None = None,
    directory: str | os.PathLike | None = None,
    seed: int = 0,
    verbose: Any = "auto",
) -> keras.Model:
    """Train a pruned model to compute what the dense model computes, on samples without labels.

    The loss compares the outputs of the two models: class probabilities by the Kullback-Leibler divergence at a temperature of
    2, other outputs by the squared error relative to their variance. It also compares the sums inside the models where branches
    meet (residual connections), by the mean of their relative squared errors. Batch normalization follows the batches, unless
    that alone would move the dense model more than 0.3 times as far as pruning did. All other layers compute as in inference.

    Zeros of kernels are kept, so that sparsity, patterns and removed units remain. A part of the samples is held out. The
    weights that are nearest to the dense model there are returned: at worst, those of the model that was passed in.

    The models that are passed in are not changed.

    Args:
        pruned: a pruned model: the result of `keras_renorm.prune`, or any copy of `model` whose kernels hold zeros. Prunable
            layers are stripped.
        model: the dense model.
        samples: unlabelled samples, as `calibration` in `keras_renorm.prune`; at least 32. The more, the better.
        epochs: number of passes over the samples. Defaults to `None`: as many as make about 1000 steps.
        batch_size: number of samples in a training step. Not used if the inputs of the model have a batch size. Defaults to 64.
        learning_rate: the first learning rate of Adam. It decays to zero along a cosine. Defaults to 0.003.
        from_logits: whether the outputs are logits of classes, whose probabilities are compared. Probabilities are recognized
            by their values; all other outputs are compared as numbers. Defaults to `None`: as the loss says that `model` is
            compiled with; `False` if it is not compiled.
        augment: what maps a batch of inputs to other inputs of the same kind, for both models: for images `"flip"` (left and
            right) and `"shift"` (by at most a tenth); a Keras layer, which is called with `training=True`; a function; or a
            list of these. Defaults to `None`.
        seconds: time limit. Defaults to `None`: no limit.
        directory: folder for the state, which is written about 20 times. If the folder holds the state of the same recovery,
            it is continued: after an interrupt it ends with the same weights as in one go; with more `seconds` the learning
            rate begins to decay again from there. Defaults to `None`: no state is kept.
        seed: integer that determines which samples are held out, their order, and all random numbers: it is passed to
            `keras.utils.set_random_seed`. Defaults to 0.
        verbose: `"auto"`, 0, 1, or 2: the progress bar. Defaults to `"auto"`: shown where Keras logs interactively.

    Returns:
        A new model with the layers of `pruned`. It is compiled if `pruned` is, with a fresh optimizer. Its attribute
        `recovery_report` tells how much nearer to the dense model it is; it keeps the `pruning_report` of `pruned`.

    Raises:
        ValueError: if the models are not built or do not fit together, `pruned` has no trainable weights, the samples are too
            few, of the wrong shape or not finite, or the directory holds the state of another recovery.
        TypeError: if `augment` is none of the above.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(4)])
    >>> samples = np.random.default_rng(0).standard_normal((512, 16)).astype("float32")
    >>> pruned = kr.prune(model, 0.8, calibration=samples, verbose=0)
    >>> better = kr.recover(pruned, model, samples, epochs=20, verbose=0)
    >>> better.recovery_report.after < better.recovery_report.before
    True
    """
    for value, argument in ((pruned, "pruned"), (model, "model")):
        validation.check_model(value, argument)
    numbers_given = dict(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seconds=seconds, seed=seed)
    check_options(model, dict(numbers_given, augment=augment))
    _check_pair(pruned, model)
    verbose = validation.check_verbose(verbose)
    pruning_report = getattr(pruned, "pruning_report", None)
    pruned = strip(pruned) if prunable_layers(pruned) else pruned
    # `prune` has checked its samples, and put them into the structure of the model.
    checked = isinstance(samples, Samples)
    with contextlib.nullcontext(samples) if checked else Samples(samples, model, batch_size, argument="samples") as batches:
        x = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches)
    fixed = _fixed_batch_size(model)
    learn, held_out = _split(x, seed, fixed or 1)
    first = take_samples(x, slice(1))
    student, _ = copy_model(pruned, inputs=first)
    teacher, _ = copy_model(model, inputs=first)
    from_logits = _has_logits(model) if from_logits is None else from_logits
    count = count_samples(learn)
    batch_size = fixed or min(batch_size, count)
    lesson, names = _lesson(student, teacher, held_out, learning_rate, from_logits, augmentation.get(augment, model))
    lesson.follows = lesson.can_follow(take_samples(learn, slice(batch_size)))
    steps = STEPS if epochs is None else max(1, epochs * count // batch_size)
    training = Training(steps, batch_size, learning_rate, seconds, seed, verbose)
    settings = [steps, batch_size, learning_rate, seed, from_logits, names, _name_of(augment)]
    kept = _with_answers(lesson, held_out, batch_size)
    few = fixed or min(batch_size, _FEWEST_SAMPLES)
    before = layer_errors(student, teacher, held_out, few)
    with _folder(directory, settings, student, teacher, x) as folder, zeros_held(student):
        taught = _with_answers(lesson, learn, batch_size) if augment is None else {"inputs": learn}
        course = take_course(lesson, taught, kept, training, folder)
    after = layer_errors(student, teacher, held_out, few)
    layers = tuple(Place(name, one, other) for (name, one), (_, other) in zip(before, after))
    student.recovery_report = _report(lesson, names, layers, course, count, count_samples(held_out))
    if pruning_report is not None:
        student.pruning_report = pruning_report
    return student


def _folder(directory: str | os.PathLike | None, settings: list, student: keras.Model, teacher: keras.Model, x: Any) -> Any:
    """The folder of this recovery, which knows it by its settings and a digest of the models and the samples."""
    if directory is None:
        return contextlib.nullcontext()
    arrays = [copied(variable) for variable in (*student.weights, *teacher.weights)] + keras.tree.flatten(x)
    return RunFolder(directory, [*settings, digest(np.ascontiguousarray(one).tobytes() for one in arrays)])


def _with_answers(lesson: Lesson, x: Any, batch_size: int) -> dict[str, Any]:
    """The samples, with what the teacher computes for them if memory holds it."""
    one = take_samples(x, slice(_fixed_batch_size(lesson.teacher) or 1))
    size = sum(math.prod(answer.shape[1:]) for answer in float_values(lesson.teacher(one, training=False)))
    if size * count_samples(x) > _MOST_ANSWERS:
        return {"inputs": x}
    return {"inputs": x, "wanted": lesson.answers(x, batch_size)}


def _name_of(augment: Any) -> Any:
    """What tells augmentations apart, the same in every process."""
    if isinstance(augment, (list, tuple)):
        return [_name_of(one) for one in augment]
    if isinstance(augment, keras.Layer):
        with contextlib.suppress(NotImplementedError):
            # Keras draws a name for every layer, and a seed for some.
            settings = {key: value for key, value in augment.get_config().items() if key not in ("name", "seed")}
            return [type(augment).__qualname__, repr(settings)]
    return augment if isinstance(augment, str) else getattr(augment, "__qualname__", type(augment).__qualname__)


def check_options(model: keras.Model, options: Mapping[str, Any]) -> None:
    """Raise if an argument of `recover` is not valid, before anything is done. Only those in `options` are checked."""
    checks = dict(
        epochs=validation.check_count,
        batch_size=validation.check_count,
        learning_rate=validation.check_positive,
        seconds=validation.check_positive,
        seed=_check_seed,
    )
    for argument in checks.keys() & options.keys():
        if options[argument] is not None or argument not in ("epochs", "seconds"):
            checks[argument](options[argument], argument)
    augmentation.get(options.get("augment"), model)
    if options.get("directory") is not None:
        # Raises if it cannot be used.
        with RunFolder(options["directory"], None):
            pass


def _check_seed(value: Any, argument: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"Argument `{argument}` must be an integer of at least 0. Received: {argument}={value!r}.")


def _check_pair(pruned: keras.Model, model: keras.Model) -> None:
    if pruned is model:
        raise ValueError("Arguments `pruned` and `model` must be two models. Received: the same model twice.")
    # Subclassed models do not tell the shapes of their outputs.
    shapes = [[tuple(one.shape) for one in getattr(value, "outputs", None) or []] for value in (pruned, model)]
    if all(shapes) and shapes[0] != shapes[1]:
        raise ValueError(
            f"Arguments `pruned` and `model` must have outputs of the same shapes. Received: {shapes[0]} and {shapes[1]}."
        )
    if not pruned.trainable_variables:
        raise ValueError(
            f"Model '{pruned.name}' has no trainable weights, so it cannot learn. Set `trainable = True` on its layers first."
        )


def _fixed_batch_size(model: keras.Model) -> int | None:
    """The batch size with which a model was built, if it takes no other."""
    inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
    return next((tensor.shape[0] for tensor in inputs if tensor.shape and tensor.shape[0]), None)


def _split(x: Any, seed: int, multiple: int) -> tuple[Any, Any]:
    """The samples to learn from, and the samples that are held out: a tenth, at most a thousand, in whole batches."""
    count = count_samples(x)
    fewest = max(_FEWEST_SAMPLES, 2 * multiple)
    if count < fewest:
        raise ValueError(
            f"Argument `samples` must hold at least {fewest} samples, so that some can be held out. Received: {count}."
        )
    order = np.random.default_rng(seed).permutation(count)
    held_out = min(max(count // 10, _FEWEST_SAMPLES // 4), _MOST_HELD_OUT) // multiple * multiple or multiple
    return take_samples(x, order[held_out:]), take_samples(x, order[:held_out])


def _lesson(
    student: keras.Model, teacher: keras.Model, x: Any, learning_rate: float, from_logits: bool, augment: Callable | None
) -> tuple[Lesson, list[str]]:
    """The compiled lesson, and the names of the places whose losses it sums."""
    pair = [with_places(one) for one in (student, teacher)]
    shapes = [[tuple(one.shape) for one in keras.tree.flatten(model.outputs)] for model, names in pair if names]
    names = pair[0][1] if len(shapes) == 2 and shapes[0] == shapes[1] else []
    models = [model for model, _ in pair] if names else [student, teacher]
    few = take_samples(x, slice(_fixed_batch_size(teacher) or _FEWEST_SAMPLES))
    outputs = float_values(teacher(few, training=False))
    if not outputs:
        raise ValueError(f"Model '{teacher.name}' has no outputs of floats, so nothing can be compared.")
    losses = [relative_error] * len(names) + [_loss_of(one, from_logits) for one in outputs]
    lesson = Lesson(*models, losses, [is_choice(one) for one in outputs], augment)
    # On CPUs XLA takes longer than TensorFlow's own convolutions, and long to compile.
    on_cpu = keras.backend.backend() == "tensorflow" and not keras.distribution.list_devices("gpu")
    lesson.compile(keras.optimizers.Adam(learning_rate), jit_compile=False if on_cpu else "auto")
    return lesson, [*names, *_output_names(teacher, len(outputs))]


def _has_logits(model: keras.Model) -> bool:
    return model.compiled and bool(getattr(model.loss, "from_logits", False))


def _loss_of(outputs: Any, from_logits: bool) -> Callable:
    """The divergence for class probabilities and logits, the relative error for all other outputs."""
    values = keras.ops.convert_to_numpy(outputs)
    if not is_choice(values):
        return relative_error
    if values.min() >= 0 and np.allclose(values.sum(axis=-1), 1, atol=1e-2):
        return divergence(_TEMPERATURE, from_logits=False)
    return divergence(_TEMPERATURE, from_logits=True) if from_logits else relative_error


def _output_names(model: keras.Model, count: int) -> list[str]:
    names = list(getattr(functional_of(model), "output_names", None) or [])
    return names if len(names) == count else [f"output {index}" for index in range(count)]


def _report(
    lesson: Lesson, names: list[str], layers: tuple[Place, ...], course: Course, samples: int, held_out: int
) -> RecoveryReport:
    keys = [f"distance_{index}" for index in range(len(names))]
    start, best = course.start, course.best
    agreement = [one["agreement"] if lesson.compares_choices else None for one in (start, best)]
    unchanged = "No step came nearer to the dense model on the samples that were held out, so nothing was changed."
    return RecoveryReport(
        tuple(Place(name, start[key], best[key]) for name, key in zip(names, keys)),
        layers,
        start["loss"],
        best["loss"],
        *agreement,
        samples,
        held_out,
        course.steps,
        course.best_step,
        course.seconds,
        (*course.notes, *([] if course.best_step else [unchanged])),
    )
