"""`explain`: how the weights of a `.tflite` file are stored, and whether the runtime skips their zeros."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from typing import Any

import keras

from keras_renorm.src.core.tables import format_table
from keras_renorm.src.export import flatbuffer, operations
from keras_renorm.src.export.storage import BLOCKS
from keras_renorm.src.export.tflite import export_tflite
from keras_renorm.src.runtimes import xnnpack

# Below this share of zeros there is nothing to explain.
_FEW = 0.05


@dataclasses.dataclass(frozen=True)
class Weights:
    """A weight tensor of a file, and how the runtime treats its zeros.

    Args:
        layer: name of the Keras layer, as far as the file tells.
        name: name of the tensor.
        operation: operation that uses the tensor, by its name in TFLite.
        shape: shape in TFLite: units first.
        dtype: type of its values.
        density: share of its weights that are not zero.
        bytes: size of its values.
        storage: `"in full"`, `"sparse"` (unpacked when the model is loaded), or `"blocks of 4"` (or 16: read as they are).
        skips: whether the runtime skips the multiplications with its zeros.
        why: the reason.
        remedy: what to change for the runtime to skip them; empty if there is nothing to change.
    """

    layer: str
    name: str
    operation: str
    shape: tuple[int, ...]
    dtype: str
    density: float
    bytes: int
    storage: str
    skips: bool
    why: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How the weights of a `.tflite` file are stored and used. Print it for a table; the attributes are the data.

    Attributes:
        path: the file, or `None` if a model was given.
        bytes: size of the file.
        rows: tuple of `Weights`.
        sparse_path: whether XNNPACK computes the network without the zeros of its 1x1 convolutions (on Arm, and on x86 without
            AVX); `None` if it has no such convolution.
        breakers: tuple of `Breaker`: the layers that prevent it.
        zeros: share of zeros in the weights of all 1x1 convolutions.
        metadata: how the model was pruned, as `keras_renorm` wrote it to the file, or `None`.
    """

    path: pathlib.Path | None
    bytes: int
    rows: tuple[Weights, ...]
    sparse_path: bool | None
    breakers: tuple[xnnpack.Breaker, ...]
    zeros: float
    metadata: dict | None

    def __str__(self) -> str:
        header = ("layer", "used by", "shape", "type", "density", "bytes", "stored", "zeros")
        cells = [
            (
                row.layer,
                row.operation,
                "x".join(map(str, row.shape)),
                row.dtype,
                f"{row.density:.1%}",
                f"{row.bytes:,}",
                row.storage,
                "skipped" if row.skips else "computed" if row.density < 1 - _FEW else "few",
            )
            for row in self.rows
        ]
        lines = [f"{self.path or 'as exported'}: {self.bytes:,} bytes"]
        if self.metadata:
            version, sparsity = self.metadata["keras_renorm"], self.metadata["sparsity"]
            lines.append(f"written by keras_renorm {version}; sparsity of the Keras model {sparsity:.1%}")
        lines.append(format_table(header, cells, right=(4, 5)))
        lines += self._network()
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.why:
                reasons.setdefault((row.why, row.remedy), []).append(row.layer)
        for (why, remedy), names in reasons.items():
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"{some}: {why}. {remedy}".rstrip())
        return "\n".join(lines)

    __repr__ = __str__

    def _network(self) -> list[str]:
        if self.sparse_path is None:
            return []
        if self.sparse_path:
            return [
                f"XNNPACK's sparse path holds: {self.zeros:.0%} of the weights of its 1x1 convolutions are zero, and are "
                "skipped on Arm (and on x86 without AVX)."
            ]
        lines = ["XNNPACK's sparse path does not hold:"]
        lines += [f"  {breaker}" for breaker in self.breakers]
        if self.zeros <= xnnpack.LEAST_ZEROS:
            lines.append(f"  {self.zeros:.0%} of the weights of its 1x1 convolutions are zero; it takes more than two thirds.")
        return lines


def explain(model_or_path: keras.Model | str | os.PathLike) -> Explanation:
    """Explain for every weight tensor how it is stored, and whether the runtime skips its zeros, and why not.

    Args:
        model_or_path: a `.tflite` file of any origin, or a model, which is exported as float32 and explained.

    Returns:
        An `Explanation`. Print it for a table.

    Raises:
        ValueError: if the file is not a `.tflite` model, or the model cannot be exported.
        OSError: if the file cannot be read.

    Example:

    >>> import keras_renorm as kr
    >>> print(kr.export.explain("model.tflite"))  # doctest: +SKIP
    """
    if isinstance(model_or_path, keras.Model):
        with tempfile.TemporaryDirectory() as folder:
            path = export_tflite(model_or_path, pathlib.Path(folder, "model.tflite"), storage="sparse").path
            return dataclasses.replace(explain(path), path=None)
    if not isinstance(model_or_path, (str, os.PathLike)):
        raise TypeError(
            "Argument `model_or_path` must be a Keras model or the path of a `.tflite` file. Received: "
            f"model_or_path={model_or_path!r} (of type {type(model_or_path)})."
        )
    path = pathlib.Path(model_or_path)
    data, model = flatbuffer.read(path, "model_or_path")
    try:
        explanation = _explanation(path, data, model)
        # What cannot be shown is damaged, too.
        str(explanation)
    except Exception as error:
        raise flatbuffer.damaged(path, "model_or_path", error) from error
    return explanation


def _explanation(path: pathlib.Path, data: bytes, model: Any) -> Explanation:
    metadata = flatbuffer.read_metadata(data)
    layers = frozenset(layer["layer"] for layer in (metadata or {}).get("layers", ()))
    nodes = operations.nodes_of(model, layers)
    uses = list(_uses(model, layers))
    zeros = xnnpack.pointwise_zeros(nodes)
    has_path = any(node.is_pointwise for node in nodes)
    breakers = tuple(xnnpack.find_breakers(nodes)) if has_path else ()
    # XNNPACK looks for the path only in a network with tensors that were unpacked.
    is_sparse = any(use.tensor.sparsity is not None and not use.direct for use in uses)
    holds = has_path and not breakers and zeros > xnnpack.LEAST_ZEROS and is_sparse
    rows = tuple(_explain(model, use, holds, breakers) for use in uses)
    return Explanation(path, len(data), rows, holds if has_path else None, breakers, zeros, metadata)


@dataclasses.dataclass(frozen=True)
class _Use:
    """A constant tensor, the layer and the operation that use it, and whether no operation unpacks it in between."""

    tensor: Any
    layer: str
    operation: str
    direct: bool


def _uses(model: Any, layers: frozenset[str]):
    seen = set()
    for graph in model.subgraphs:
        constants = operations.Constants(model, graph)
        for operator in graph.operators:
            if operator in constants.unpacking:
                continue
            for index in operations.inputs_of(operator):
                tensor = constants.source(index)
                if (
                    tensor is None
                    or id(tensor) in seen
                    or len(operations.shape_of(tensor)) < 2
                    or flatbuffer.dtype_of(tensor) is None
                ):
                    continue
                seen.add(id(tensor))
                outputs = [graph.tensors[output] for output in operations.outputs_of(operator)]
                layer = operations.layer_name([tensor, *outputs], layers)
                yield _Use(tensor, layer, flatbuffer.operator_name(model, operator), not constants.is_unpacked(index))


def _explain(model: Any, use: _Use, holds: bool, breakers: tuple) -> Weights:
    report = flatbuffer.describe(model, use.tensor)
    storage = "in full"
    if report.stored_sparse:
        block = use.tensor.sparsity.dimMetadata[-1].denseSize if use.direct and use.tensor.sparsity.blockMap is not None else 0
        storage = f"blocks of {block}" if block else "sparse"
    skips, why, remedy = False, "", ""
    if report.sparsity > _FEW:
        skips, why, remedy = _judge(use, report, storage, holds, breakers)
    return Weights(
        layer=use.layer,
        name=flatbuffer.first_name(use.tensor),
        operation=use.operation,
        shape=report.shape,
        dtype=report.dtype,
        density=1 - report.sparsity,
        bytes=report.bytes,
        storage=storage,
        skips=skips,
        why=why,
        remedy=remedy,
    )


def _judge(use: _Use, report: Any, storage: str, holds: bool, breakers: tuple) -> tuple[bool, str, str]:
    """Whether the runtime skips the zeros of a tensor, the reason, and what to change."""
    units = "Prune whole units (`pattern='unit'`) and take them out with `keras_renorm.compact`."
    if use.operation == "FULLY_CONNECTED":
        if storage.startswith("blocks"):
            return True, f"the runtime's own kernel reads {storage} inputs and skips the others", ""
        block = BLOCKS.get(report.dtype)
        if block is None:
            return False, f"no kernel skips zeros of {report.dtype} weights", "Export float32 or int8."
        where = "unpacks them when the model is loaded" if storage == "sparse" else "stores them in full"
        return (
            False,
            f"zeros that do not come in blocks of {block} inputs: the file {where}, and all weights are computed with",
            f"Prune with `pattern=keras_renorm.patterns.Block(({block}, 1))`.",
        )
    if use.operation == "CONV_2D" and report.shape[1:3] == (1, 1):
        if report.dtype == "int8":
            return (
                False,
                "XNNPACK skips zeros of 1x1 convolutions in float networks only",
                f"Export float32 or float16. Or: {units}",
            )
        if holds:
            return True, "XNNPACK skips them on Arm, and on x86 without AVX", ""
        if breakers:
            return False, f"XNNPACK's sparse path is broken, first by '{breakers[0].layer}'", breakers[0].remedy
        return (
            False,
            "XNNPACK's sparse path takes more than two thirds of zeros over all 1x1 convolutions, stored sparse",
            "Prune more.",
        )
    if use.operation in ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"):
        rows, columns = report.shape[1:3]
        if use.operation == "DEPTHWISE_CONV_2D":
            return False, "no kernel of the runtime skips zeros of a depthwise convolution, where there is little to gain", ""
        return False, f"no kernel of the runtime skips zeros of a {rows}x{columns} convolution", units
    if use.operation in ("GATHER", "EMBEDDING_LOOKUP"):
        return False, "rows are looked up, so that zeros cost nothing but bytes", ""
    return False, f"no kernel of the runtime skips zeros in {use.operation}", units
