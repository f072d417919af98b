"""Fails unless the installed fastguide has its kernels, and they run on torch's threads. Run it outside the clone."""

import json
import subprocess
import sys
from pathlib import Path


def described(folder: Path) -> dict:
    """How the kernels that Python finds in ``folder`` run, in a new process without pytest's plugins."""
    script = Path(__file__).parent / "describe_build.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_threads(found: dict) -> None:
    (library,) = found["openmp"]  # fails if the wheel has its own libgomp too
    assert Path(found["torch"]).parents[1] in Path(library).parents
    assert found["busy_threads"] == 2 and found["new_threads"] == 0


if __name__ == "__main__":
    found = described(Path.cwd())
    assert "site-packages" in found["module"], found["module"]
    check_threads(found)
    print(f"{found['module']}: on the threads of {found['openmp'][0]}, for {', '.join(found['bits'])}")
