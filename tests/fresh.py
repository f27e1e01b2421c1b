"""Programs in processes of their own that have imported `keras_renorm` and nothing else.

Importing takes seconds. So one process imports the package, and forks for each program.
"""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback


def run(program: str, *arguments: object, path: tuple = ()) -> str:
    """Run a program with arguments (`sys.argv[1:]`) and return what it prints.

    Args:
        program: source code.
        arguments: are turned into strings.
        path: folders that are put in front of `sys.path`.
    """
    if not hasattr(os, "fork") or os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        # JAX has threads as soon as it is imported, and they do not survive a fork.
        code = f"import keras_renorm, sys\nsys.path[:0] = {[str(one) for one in path]}\n{program}"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300
        )
        status, printed, errors = done.returncode, done.stdout, done.stderr
    else:
        with tempfile.TemporaryDirectory() as folder:
            request = dict(program=program, arguments=[str(one) for one in arguments], path=[str(one) for one in path])
            server = _server()
            print(json.dumps({**request, "folder": folder}), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            printed, errors = (pathlib.Path(folder, name).read_text() for name in ("1", "2"))
    assert status == 0, errors[-3000:]
    return printed


@functools.cache
def _server() -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-c", "import keras_renorm, tests.fresh; tests.fresh.serve()"]
    paths = [str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(server.communicate)
    return server


def serve() -> None:
    """Run the programs that are asked for on the standard input, until it is closed."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run_here(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run_here(program: str, arguments: list, path: list, folder: str) -> None:
    for descriptor in (1, 2):
        os.dup2(os.open(pathlib.Path(folder, str(descriptor)), os.O_CREAT | os.O_WRONLY), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv[1:], sys.path[:0] = arguments, path
    status = 1
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
