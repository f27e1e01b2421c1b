"""The report of an export, as data and as a table."""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One weight tensor of a file: its name and shape there, the fraction of zeros, its size in bytes, and its storage."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    bytes: int
    stored_sparse: bool


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """A written `.tflite` file, beside a file of the same network with every tensor stored in full.

    Attributes:
        path: the file.
        quantize: `None`, `"float16"` or `"int8"`.
        bytes: size of the file.
        gzip_bytes: size of the file when compressed, as in an app package or a download.
        dense_bytes: size of the dense export: the same network with every tensor stored in full.
        dense_gzip_bytes: size of the dense export when compressed.
        stored_sparse: whether any tensor is stored sparse.
        tensors: weight tensors of rank two or more.
        difference: largest absolute difference between the outputs of the file and of the Keras model.
        output_range: largest absolute output of the Keras model on the same samples.
        notes: sentences on fallbacks and their reasons, and on how to run the file.
        estimated_bytes: estimated size of the file as `"float32"`, `"float16"` and `"int8"`; exact for its own type.
    """

    path: pathlib.Path
    quantize: str | None
    bytes: int
    gzip_bytes: int
    dense_bytes: int
    dense_gzip_bytes: int
    stored_sparse: bool
    tensors: tuple[TensorReport, ...]
    difference: float
    output_range: float
    notes: tuple[str, ...]
    estimated_bytes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Size of the file over the size of the dense export."""
        return self.bytes / self.dense_bytes

    def __str__(self) -> str:
        # A fused operation has the names of all it was made of; the first is enough to find it.
        names = [tensor.name.split(";")[0] for tensor in self.tensors]
        width = max(map(len, names), default=0)
        lines = [
            f"{self.path} ({self.quantize or 'float32'}, {'sparse' if self.stored_sparse else 'dense'} storage)",
            f"  bytes       {self.bytes:>12,}   dense export {self.dense_bytes:>12,}   {self.ratio:.2f} of it",
            f"  gzipped     {self.gzip_bytes:>12,}   dense export {self.dense_gzip_bytes:>12,}",
            *self._formats(),
            f"  difference from Keras: {self.difference:.2g} (outputs reach {self.output_range:.2g})",
        ]
        for name, tensor in zip(names, self.tensors):
            lines.append(
                f"  {name.ljust(width)}  {'x'.join(map(str, tensor.shape)):>14}  {tensor.dtype:>8}  "
                f"{tensor.sparsity:6.1%} zeros  {tensor.bytes:>10,} bytes  {'sparse' if tensor.stored_sparse else 'dense'}"
            )
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    __repr__ = __str__

    def _formats(self) -> list[str]:
        if not self.estimated_bytes:
            return []
        own, least = self.quantize or "float32", min(self.estimated_bytes.values())
        sizes = (
            f"{'' if name == own else 'about '}{size:,} as {name}{' (the smallest)' if size == least else ''}"
            for name, size in self.estimated_bytes.items()
        )
        return [f"  bytes by type: {', '.join(sizes)}"]
