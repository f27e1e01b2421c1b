import importlib.metadata
import itertools
import json

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.export import flatbuffer, storage, verification
from keras_renorm.src.export.storage import Layout, choose_layout, encode, largest_working

pytest.importorskip("tensorflow")
L = keras.layers


def decode(encoded, layout, shape):
    """Row by row, as the format is described."""
    innermost = shape[layout.order[-1]] // layout.block
    rows = len(encoded.segments) - 1
    dense = np.zeros((rows, innermost, layout.block), encoded.values.dtype)
    blocks = encoded.values.reshape(-1, layout.block)
    for row in range(rows):
        for position in range(encoded.segments[row], encoded.segments[row + 1]):
            dense[row, encoded.indices[position]] = blocks[position]
    return dense.reshape([shape[axis] for axis in layout.order]).transpose(np.argsort(layout.order))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("shape", [(6, 8), (3, 2, 2, 4), (1, 3, 3, 4), (300, 4)])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_every_layout_is_read_back(dtype, shape, share, generator):
    values = np.where(generator.random(shape) < share, generator.integers(1, 9, shape), 0).astype(dtype)
    layouts = [Layout(order) for order in itertools.permutations(range(len(shape)))]
    layouts.append(Layout(tuple(range(len(shape))), 4))
    for layout in layouts:
        encoded = encode(values, layout)
        np.testing.assert_array_equal(decode(encoded, layout, shape), values)
        assert encoded.bytes == storage.encoded_bytes(values, layout)


def test_by_hand():
    values = np.array([[0, 0, 0, 0, 1, 0, 0, 2], [3, 0, 0, 0, 0, 0, 0, 0]], "float32")
    blocks = encode(values, Layout((0, 1), 4, direct=True))
    assert blocks.values.tolist() == [1, 0, 0, 2, 3, 0, 0, 0]
    assert (blocks.segments.tolist(), blocks.indices.tolist()) == ([0, 1, 2], [1, 0])
    columns = encode(values, Layout((1, 0)))
    assert columns.values.tolist() == [3, 1, 2]
    assert (columns.segments.tolist(), columns.indices.tolist()) == ([0, 1, 1, 1, 1, 2, 2, 2, 3], [1, 0, 0])
    assert blocks.bytes == 8 * 4 + 3 + 2
    assert columns.bytes == 3 * 4 + 9 + 3


def test_indices_take_the_smallest_type():
    wide = np.zeros((2, 300), "float32")
    wide[:, ::3] = 1
    assert encode(wide, Layout((0, 1))).indices.dtype == np.uint16
    assert encode(wide, Layout((1, 0))).indices.dtype == np.uint8
    assert encode(np.ones((300, 300), "int8"), Layout((0, 1))).segments.dtype == np.int32


def test_the_choice(generator):
    unstructured = np.where(generator.random((64, 512)) < 0.1, 1, 0).astype("float32")
    blocks = np.repeat(np.where(generator.random((64, 128)) < 0.1, 1, 0), 4, axis=1).astype("float32")
    assert choose_layout(unstructured, block=4) == Layout((1, 0))
    assert choose_layout(blocks, block=4) == Layout((0, 1), 4, direct=True)
    assert choose_layout(blocks) == Layout((1, 0))
    assert choose_layout(np.ones((64, 512), "float32"), block=4) is None
    assert choose_layout(np.zeros((4, 4), "float32")) is None


@pytest.mark.parametrize("bad", [(), (0,), (2, 5), range(7)])
def test_all_that_work_are_found(bad):
    tried = []

    def works(some):
        tried.append(some)
        return not set(some) & set(bad)

    assert largest_working(range(7), works) == [one for one in range(7) if one not in bad]
    assert bool(bad) or len(tried) == 1


@pytest.mark.parametrize(
    ("innermost", "stored", "indices", "segments"),
    [
        (256, 255, "uint8", "uint8"),
        (257, 255, "uint16", "uint8"),
        (256, 256, "uint8", "uint16"),
        (65536, 65535, "uint16", "uint16"),
        (65537, 65536, "int32", "int32"),
    ],
)
def test_how_many_places_a_byte_tells_apart(innermost, stored, indices, segments):
    values = np.zeros((2, innermost), "int8")
    values.reshape(-1)[-stored:] = 1
    encoded = encode(values, Layout((0, 1)))
    assert (encoded.indices.dtype, encoded.segments.dtype) == (indices, segments)
    sizes = np.dtype(indices).itemsize, np.dtype(segments).itemsize
    assert storage.encoded_bytes(values, Layout((0, 1))) == encoded.bytes == stored * (1 + sizes[0]) + 3 * sizes[1]
    np.testing.assert_array_equal(decode(encoded, Layout((0, 1)), values.shape), values)


def scattered(shape, stored, blocks):
    """A matrix with so many values that are not zero in so many blocks of 4."""
    values = np.zeros(shape, "float32").reshape(-1, 4)
    values[:blocks, 0] = 1
    rest = np.flatnonzero(np.arange(4 * blocks) % 4)[: stored - blocks]
    values.reshape(-1)[rest] = 1
    assert (np.count_nonzero(values), np.count_nonzero(values.any(axis=1))) == (stored, blocks)
    return values.reshape(shape)


def test_when_storing_sparse_is_worth_it():
    """Of 16384 bytes 90 % less 512 are 14233.6; a value takes 5 along rows of 256, and 17 segments take 2."""
    assert choose_layout(scattered((16, 256), 2839, 1024)) == Layout((0, 1))  # 5 * 2839 + 34
    assert choose_layout(scattered((16, 256), 2840, 1024)) is None


def test_when_blocks_are_worth_it():
    """1000 values take 5034 bytes, a tenth more are 5537.4; a block takes 17, and 17 segments take 2."""
    assert choose_layout(scattered((16, 256), 1000, 323), block=4) == Layout((0, 1), 4, direct=True)  # 17 * 323 + 34
    assert choose_layout(scattered((16, 256), 1000, 324), block=4) == Layout((0, 1))
    assert choose_layout(scattered((16, 256), 1000, 323)) == Layout((0, 1))
    # Rows of 258 are no whole blocks, and more places than a byte tells apart: 6 * 1000 + 34 against 5 * 1000 + 259 * 2.
    assert choose_layout(np.pad(scattered((16, 256), 1000, 250), ((0, 0), (0, 2))), block=4) == Layout((1, 0))
    # The first of layouts that take as much.
    cube = np.zeros((8, 8, 8, 8), "float32")
    cube[0, 0, 0, 0] = 1
    assert choose_layout(cube) == Layout((1, 2, 3, 0))


def file_of(tensors, operators):
    """A file: constants by their names (several names may share one array), and operations with the names of their inputs."""
    schema = flatbuffer.schema()
    arrays = list({id(values): values for values in tensors.values()}.values())
    buffers = [flatbuffer.make("Buffer")]
    buffers += [flatbuffer.make("Buffer", data=np.frombuffer(values.tobytes(), np.uint8)) for values in arrays]
    kinds = {"float32": schema.TensorType.FLOAT32, "int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32}
    graph = flatbuffer.make("SubGraph", inputs=np.array([0], np.int32), outputs=np.array([1], np.int32))
    names = ["x", "y", *tensors]
    variable = dict(shape=np.array([1, 4], np.int32), type=schema.TensorType.FLOAT32, buffer=0)
    graph.tensors = [flatbuffer.make("Tensor", name=name.encode(), **variable) for name in names[:2]]
    for name, values in tensors.items():
        place = 1 + next(index for index, one in enumerate(arrays) if one is values)
        shape = np.array(values.shape, np.int32)
        graph.tensors.append(
            flatbuffer.make("Tensor", name=name.encode(), shape=shape, type=kinds[values.dtype.name], buffer=place)
        )
    model = flatbuffer.make("Model", version=3, buffers=buffers, subgraphs=[graph], operatorCodes=[])
    graph.operators = []
    for kind, inputs in operators:
        index = flatbuffer.operator_index(model, getattr(schema.BuiltinOperator, kind), 1)
        inputs = None if inputs is None else np.array([-1 if name is None else names.index(name) for name in inputs], np.int32)
        operator = flatbuffer.make("Operator", opcodeIndex=index, inputs=inputs, outputs=np.array([1], np.int32))
        graph.operators.append(operator)
    return flatbuffer.pack(model)


FULLY_CONNECTED, CONV = "FULLY_CONNECTED", "CONV_2D"


def stored(tensors, operators, **arguments):
    """Of which tensors a file can leave the zeros out, which are slower so, and which fail."""
    whole = storage.Storage(file_of(tensors, operators), **arguments)
    return tuple([whole.name(place) for place in places] for places in (whole.candidates, whole.slower, whole.fails))


def sparse(dtype="float32", block=1, shape=(64, 128)):
    values = np.zeros(shape, dtype).reshape(-1, block)
    values[::10] = 1
    return values.reshape(shape)


def test_weights_are_what_an_operation_reads_second():
    values = sparse(block=4)
    layouts = {}
    for name, inputs in {"weights": ["x", "w"], "first": ["w", "x"], "bias": ["x", "x", "w"]}.items():
        whole = storage.Storage(file_of({"w": values}, [(FULLY_CONNECTED, inputs)]))
        layouts[name] = [whole._layouts[place].direct for place in whole.candidates]
    assert layouts == {"weights": [True], "first": [False], "bias": [False]}
    # Of two that read it one cannot skip blocks.
    for other in ((CONV, ["x", "w"]), (FULLY_CONNECTED, ["w", "x"])):
        whole = storage.Storage(file_of({"w": values}, [(FULLY_CONNECTED, ["x", "w"]), other]))
        assert [whole._layouts[place].direct for place in whole.candidates] == [False]


def test_what_is_left_alone():
    operators = [(FULLY_CONNECTED, ["x", "one", None]), (FULLY_CONNECTED, ["x", "other"]), ("ADD", None)]
    one, other = sparse(), sparse()
    assert stored({"one": one, "other": other}, operators) == (["one", "other"], [], [])
    # Buffers that tensors share, what nothing reads, vectors, other types, what has hardly a zero.
    assert stored({"one": one, "other": one}, operators) == ([], [], [])
    assert stored({"one": one, "other": other}, operators[:1]) == (["one"], [], [])
    assert stored({"one": one.reshape(-1), "other": other.astype("int32")}, operators) == ([], [], [])
    assert stored({"one": np.ones_like(one), "other": other}, operators) == (["other"], [], [])


def test_integers_by_hand():
    for kind, block, smallest, expected in [
        (FULLY_CONNECTED, 16, False, (["w"], [], [])),
        (FULLY_CONNECTED, 1, False, ([], ["w"], [])),
        (FULLY_CONNECTED, 1, True, (["w"], [], [])),
        (FULLY_CONNECTED, 4, False, ([], ["w"], [])),  # blocks of 16 are those that are read
        (CONV, 16, False, ([], [], ["w"])),
        (CONV, 1, True, ([], [], ["w"])),
    ]:
        assert stored({"w": sparse("int8", block)}, [(kind, ["x", "w"])], smallest=smallest) == expected, (kind, block)


def test_a_file_by_hand():
    """One tensor in blocks, one unpacked before its two uses, one in full."""
    blocks, single, full = sparse(block=4), sparse(), sparse()
    operators = [(FULLY_CONNECTED, ["x", "blocks"]), (CONV, ["x", "single"]), (FULLY_CONNECTED, ["single", "full"])]
    whole = storage.Storage(file_of({"blocks": blocks, "single": single, "full": full}, operators))
    model = flatbuffer.parse(whole.write(whole.candidates[:2], {"by": "hand"}))
    (graph,) = model.subgraphs
    tensors = {tensor.name.decode(): tensor for tensor in graph.tensors}
    kinds = [flatbuffer.operator_name(model, operator) for operator in graph.operators]
    names = [[graph.tensors[index].name.decode() for index in operator.inputs] for operator in graph.operators]
    assert list(zip(kinds, names)) == [
        ("DENSIFY", ["single"]),
        (FULLY_CONNECTED, ["x", "blocks"]),
        (CONV, ["x", "single/dense"]),
        (FULLY_CONNECTED, ["single/dense", "full"]),
    ]
    assert [graph.tensors[index].name.decode() for index in graph.operators[0].outputs] == ["single/dense"]
    assert tensors["single/dense"].shape.tolist() == [64, 128]
    # XNNPACK leaves the version alone that reads blocks.
    assert [model.operatorCodes[operator.opcodeIndex].version for operator in graph.operators] == [1, 8, 1, 1]
    for name, values in {"blocks": blocks, "single": single}.items():
        layout = whole._layouts[whole.candidates[0 if name == "blocks" else 1]]
        sparsity, encoded = tensors[name].sparsity, encode(values, layout)
        axes = sparsity.dimMetadata
        assert [axis.format for axis in axes[:2]] == [0, 1]
        assert axes[0].denseSize == values.shape[layout.order[0]]
        assert np.asarray(axes[1].arraySegments.values).tolist() == encoded.segments.tolist()
        assert np.asarray(axes[1].arrayIndices.values).tolist() == encoded.indices.tolist()
        assert model.buffers[tensors[name].buffer].data.tobytes() == encoded.values.tobytes()
    assert tensors["blocks"].sparsity.traversalOrder.tolist() == [0, 1, 2]
    assert tensors["blocks"].sparsity.blockMap.tolist() == [1]
    assert (tensors["blocks"].sparsity.dimMetadata[2].format, tensors["blocks"].sparsity.dimMetadata[2].denseSize) == (0, 4)
    assert tensors["single"].sparsity.blockMap is None
    assert sorted(tensors["single"].sparsity.traversalOrder.tolist()) == [0, 1]
    assert tensors["full"].sparsity is None
    assert flatbuffer.read_metadata(whole.write([], {"by": "hand"})) == {"by": "hand"}


needs_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="export needs TensorFlow")


def mlp(pattern="unstructured", sparsity=0.9):
    model = keras.Sequential([keras.Input((64,)), L.Dense(128, "relu", name="one"), L.Dense(64, name="two")])
    return kr.prune(model, sparsity, pattern=pattern, allocation="uniform") if sparsity else model


@needs_tensorflow
def test_a_tensor_that_does_not_run_falls_back_alone(tmp_path, monkeypatch):
    original = verification.run

    def run(path, *rest, **kwargs):
        """A runtime that cannot do the second layer's."""
        if any(row.shape == (64, 128) and row.storage == "sparse" for row in kr.export.explain(path).rows):
            raise RuntimeError("no kernel")
        return original(path, *rest, **kwargs)

    monkeypatch.setattr(verification, "run", run)
    report = kr.export_tflite(mlp(), tmp_path / "model.tflite", storage="sparse")
    assert sorted(tensor.stored_sparse for tensor in report.tensors) == [False, True]
    assert any("does not run them sparse (no kernel): " in note for note in report.notes)


@needs_tensorflow
@pytest.mark.parametrize(
    ("pattern", "quantize", "stored"),
    [
        ("unstructured", None, "sparse"),
        ("unstructured", "float16", "sparse"),
        (kr.patterns.Block((4, 1)), None, "blocks of 4"),
        (kr.patterns.Block((16, 1)), "int8", "blocks of 16"),
        ("unstructured", "int8", "in full"),
    ],
)
def test_how_dense_kernels_are_stored(pattern, quantize, stored, tmp_path):
    report = kr.export_tflite(mlp(pattern), tmp_path / "model.tflite", quantize=quantize, storage="sparse")
    rows = kr.export.explain(report.path).rows
    assert {row.storage for row in rows} == {stored}
    assert all(row.skips == stored.startswith("blocks") for row in rows)
    assert report.stored_sparse == (stored != "in full")


@needs_tensorflow
@pytest.mark.parametrize("representative", [False, True])
def test_the_smallest_integers(representative, tmp_path, generator):
    data = generator.standard_normal((32, 64)).astype("float32") if representative else None
    arguments = dict(quantize="int8", representative_data=data, storage="sparse")
    report = kr.export_tflite(mlp(), tmp_path / "model.tflite", smallest=True, **arguments)
    faster = kr.export_tflite(mlp(), tmp_path / "faster.tflite", **arguments)
    assert report.bytes < 0.7 * faster.bytes
    assert report.difference < 0.1 * report.output_range
    assert "`smallest=True`" in faster.notes[0]
    assert [note for note in report.notes if "in full" in note] == []


def litert_version():
    try:
        return int(importlib.metadata.version("ai-edge-litert").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


@needs_tensorflow
@pytest.mark.skipif(litert_version() < 2, reason="older runtimes bring the process down")
def test_known_failure_integers_of_convolutions(tmp_path):
    """XNNPACK does not find integers of convolutions that were unpacked. When this fails, the runtime was mended: let
    `Storage` store them."""
    model = keras.Sequential([keras.Input((8, 8, 32)), L.Conv2D(64, 3, name="conv")])
    path = tmp_path / "model.tflite"
    report = kr.export_tflite(kr.prune(model, 0.9), path, quantize="int8")
    assert "fails on sparse integers" in report.notes[0]
    whole = storage.Storage(path.read_bytes())
    (place,) = whole.fails
    whole._layouts[place] = Layout((1, 2, 3, 0))
    path.write_bytes(whole.write([place], {}))
    with pytest.raises(RuntimeError, match="failed to delegate"):
        verification.run(path, [np.ones((1, 8, 8, 32), "float32")], ["x"])


@needs_tensorflow
def test_buffers_are_aligned(tmp_path):
    path = kr.export_tflite(mlp(), tmp_path / "model.tflite").path
    data = path.read_bytes()
    model = flatbuffer.parse(data)
    whole = np.frombuffer(data, np.uint8)
    for buffer in model.buffers:
        if buffer.data is not None:
            assert (np.asarray(buffer.data).__array_interface__["data"][0] - whole.__array_interface__["data"][0]) % 16 == 0


@needs_tensorflow
def test_metadata_says_how_it_was_pruned(tmp_path):
    path = kr.export_tflite(mlp(), tmp_path / "model.tflite").path
    metadata = flatbuffer.read_metadata(path.read_bytes())
    assert metadata["keras_renorm"] == kr.__version__
    assert metadata["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert [row["layer"] for row in metadata["layers"]] == ["one", "two"]
    assert metadata["layers"][0]["criterion"] == "Magnitude"
    json.dumps(metadata)


@needs_tensorflow
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_bytes_against_what_they_tell(sparsity, tmp_path, generator):
    """At most 1.4 times the entropy of the mask and the values that are kept."""
    model = keras.Sequential([keras.Input((1024,)), L.Dense(512, "relu"), L.Dense(256)])
    report = kr.export_tflite(kr.prune(model, sparsity, renormalize=None), tmp_path / "model.tflite")
    told = sum(information(tensor, 32) for tensor in report.tensors)
    assert sum(tensor.bytes for tensor in report.tensors) < 1.4 * told
    assert report.bytes < 1.4 * told + 8192


def information(tensor, bits):
    zeros, size = tensor.sparsity, np.prod(tensor.shape)
    entropy = -zeros * np.log2(zeros) - (1 - zeros) * np.log2(1 - zeros)
    return size * (entropy + (1 - zeros) * bits) / 8


@needs_tensorflow
@pytest.mark.parametrize(("quantize", "least"), [("float16", 1.3), ("int8", 1.42)])
def test_wide_layers_are_stored_in_parts(quantize, least, tmp_path, generator):
    """So that a place takes one byte."""
    inputs = keras.Input((5, 600))
    x = L.Dense(520, "relu", name="wide")(inputs)
    model = keras.Model(inputs, L.Dense(300, "softmax", name="not_elementwise")(L.Dense(100, use_bias=False)(x)))
    report = kr.export_tflite(kr.prune(model, 0.9), tmp_path / "model.tflite", quantize=quantize, smallest=True)
    assert report.notes[0] == "'wide' is stored in 3 parts of 256 units, which take fewer bytes."
    assert sorted(tensor.shape for tensor in report.tensors) == [(8, 600), (100, 520), (256, 600), (256, 600), (300, 100)]
    wide = [tensor for tensor in report.tensors if tensor.shape[1] == 600]
    bits = 16 if quantize == "float16" else 8
    assert sum(tensor.bytes for tensor in wide) < least * sum(information(tensor, bits) for tensor in wide)
    assert report.difference < 0.05 * report.output_range


@needs_tensorflow
@pytest.mark.skipif(litert_version() < 2, reason="older runtimes bring the process down")
def test_known_failure_sparse_weights_taken_for_dense_ones(tmp_path, monkeypatch):
    """XNNPACK does, if the operation has not the version that it leaves alone: the file loads and computes nonsense, which the
    export sees. When this fails, the runtime was mended."""
    monkeypatch.setattr(storage, "_NOT_DELEGATED", 1)
    report = kr.export_tflite(mlp(kr.patterns.Block((4, 1))), tmp_path / "model.tflite", storage="sparse")
    assert not report.stored_sparse
    assert any("does not run them sparse (outputs differ" in note for note in report.notes)
