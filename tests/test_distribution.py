"""Masks are the same on all replicas, and those of a training on one device."""

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

PROGRAM = pathlib.Path(__file__).with_name("train_distributed.py")
on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a strategy of TensorFlow")


def start(way, path, **variables):
    environment = {**os.environ, **variables}
    return subprocess.Popen(
        [sys.executable, PROGRAM, way, path], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def results(**processes):
    """What the processes wrote, once all have ended."""
    for _, process in processes.values():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    return {name: dict(np.load(path)) for name, (path, _) in processes.items()}


def check_same(distributed, alone, replicas):
    names = {name.rsplit(" ", 1)[0] for name in alone}
    assert len(names) == 6
    for name in names:
        values = [distributed[f"{name} {replica}"] for replica in range(replicas)]
        if "mask" in name:
            assert 0.5 < 1 - values[0].mean() < 0.9
        for value in values:
            np.testing.assert_array_equal(value, values[0])
            np.testing.assert_allclose(value, alone[f"{name} 0"], rtol=1e-4, atol=1e-5)


@on_tensorflow
def test_mirrored_on_two_devices(tmp_path):
    paths = {way: tmp_path / f"{way}.npz" for way in ("one", "mirrored")}
    found = results(**{way: (path, start(way, path)) for way, path in paths.items()})
    check_same(found["mirrored"], found["one"], replicas=2)


@on_tensorflow
def test_two_workers(tmp_path):
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in (first, second)]
    processes = {"one": (tmp_path / "one.npz", start("one", tmp_path / "one.npz"))}
    for index in range(2):
        cluster = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
        path = tmp_path / f"{index}.npz"
        processes[f"worker{index}"] = (path, start("workers", path, TF_CONFIG=cluster))
    found = results(**processes)
    for worker in ("worker0", "worker1"):
        check_same(found[worker], found["one"], replicas=1)


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_data_parallel_on_jax(tmp_path):
    paths = {way: tmp_path / f"{way}.npz" for way in ("one", "data_parallel")}
    devices = dict(KERAS_BACKEND="jax", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    found = results(**{way: (path, start(way, path, **devices)) for way, path in paths.items()})
    check_same(found["data_parallel"], found["one"], replicas=2)
