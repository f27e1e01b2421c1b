"""Notes of an export: sentences for its report."""

from __future__ import annotations

from typing import Any

import keras

from keras_renorm.src.export.inputs import has_free_sides
from keras_renorm.src.export.storage import Storage

# The float or integer type of the weights for each value of `quantize`, the most exact first.
TYPES = {None: "float32", "float16": "float16", "int8": "int8"}
_SPARSE = (
    "Tensors stored sparse are read by LiteRT (and TensorFlow Lite) on CPUs. TensorFlow Lite for Microcontrollers refuses the "
    "file: export with `storage='full'` for it."
)
_ANY_SIZE = (
    "Inputs have sides of any length: set them with `resize_tensor_input` before `allocate_tensors`, or run the file by its "
    "signature, which does."
)
# A share of the largest output. Integers whose outputs are further off than this deserve a note.
_COARSE = 0.1


def how_to_run(model: keras.Model, stored_sparse: bool) -> list[str]:
    """Notes on the runtimes that read the file, and on inputs of any size."""
    return [_SPARSE] * stored_sparse + [_ANY_SIZE] * has_free_sides(model)


def stored_in_full_for_boards(storage: Storage, metadata: dict[str, Any]) -> list[str]:
    """A note if `storage="auto"` stored in full what could be sparse."""
    if not storage.candidates:
        return []
    return [
        "Stored in full, for a network as small as this may be meant for a microcontroller, which cannot read sparse "
        f"tensors: `storage='sparse'` takes {len(storage.write(storage.candidates, metadata)):,} bytes, for LiteRT."
    ]


def far_off(quantize: str | None, has_data: bool, difference: float, reach: float) -> list[str]:
    """A note if integers change the outputs much."""
    if quantize != "int8" or difference <= _COARSE * reach:
        return []
    remedies = ["`quantize='float16'`"]
    if has_data:
        remedies = ["more, and typical, `representative_data`", "integers as weights only (without it)", *remedies]
    return [
        f"Outputs differ by {difference:.2g} where they reach {reach:.2g}: integers are coarse for this network. Measure its "
        f"accuracy, and try {', '.join(remedies[:-1])}{' or ' if has_data else ''}{remedies[-1]}."
    ]


def smaller_type(quantize: str | None, estimates: dict[str, int]) -> list[str]:
    """A note if a more exact type takes fewer bytes, too."""
    order = list(TYPES.values())
    exact = {name: estimates[name] for name in order[: order.index(TYPES[quantize])]}
    least = min(exact, key=exact.get, default=None)
    # Estimates do not include the description of each tensor.
    if least is None or exact[least] + 4096 > 0.9 * estimates[TYPES[quantize]]:
        return []
    return [
        f"{least} is more exact, and smaller: about {exact[least]:,} bytes, where zeros of {TYPES[quantize]} are stored in "
        "full."
    ]


def stored_in_full(storage: Storage, kept: list, errors: list[str]) -> list[str]:
    """Notes on tensors with zeros that are stored in full."""

    def names(tensors):
        return ", ".join(storage.name(tensor) for tensor in tensors)

    notes = []
    if fell_back := [tensor for tensor in storage.candidates if tensor not in kept]:
        notes.append(f"Stored in full, for the runtime does not run them sparse ({errors[-1]}): {names(fell_back)}.")
    if storage.fails:
        notes.append(
            f"Stored in full, for the runtime fails on sparse integers of other layers than Dense: {names(storage.fails)}."
        )
    if storage.slower:
        notes.append(
            "Stored in full, for the runtime is slower with sparse integers that are not in blocks of 16 inputs (pass "
            f"`smallest=True` to store them sparse all the same): {names(storage.slower)}."
        )
    return notes
