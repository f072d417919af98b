"""Python programs in processes of their own, each with a torch that is imported already: that takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

# Reads a request a line, and runs it in a fork. torch has started no thread yet, and nothing of fastguide is loaded.
_SERVER = """
import json, os, sys, traceback
import torch
plain = list(sys.path[1:])
def run(code, arguments, folder, environment, said):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *plain]
    sys.argv[:] = ["-c", *arguments]
    try:
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = run(*json.loads(line))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Python:
    """``python(code, *arguments)`` is ``subprocess.run([sys.executable, "-c", code, *arguments])``."""

    def __init__(self) -> None:
        self._said = tempfile.TemporaryDirectory()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-c", _SERVER]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self._said.name, env=environment
        )

    def __call__(
        self, code: str, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None and stdout is not None
        request = [code, arguments, str(cwd or Path.cwd()), dict(os.environ if env is None else env), self._said.name]
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        status = int(stdout.readline())
        words = [(Path(self._said.name) / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess([sys.executable, "-c", code, *arguments], status, *words)

    def __enter__(self) -> Python:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.communicate()  # closes its stdin, at which it ends
        self._said.cleanup()
