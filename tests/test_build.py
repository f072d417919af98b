"""What was built, what loads, and what is said of the rest."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastguide import doctor, ops
from fastguide.ops import _native, _operation
from fastguide.ops._operation import (
    OPERATIONS,
    ORDER,
    Backend,
    _gpu_reason,
    _warn_passed_over,
    backends,
    explain,
    select,
    why_not,
)

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_cpu_module_is_built_and_loaded():
    assert backends()["cpu"] == Backend("cpu", True, "", tuple(OPERATIONS), backends()["cpu"].details)
    assert backends()["cpu"].details["instruction_set"]
    flags = _native.build_record()["cxxflags"]
    assert "-ffp-contract=off" in flags and "fast-math" not in flags


def test_every_backend_says_why_it_cannot():
    found = backends()
    assert tuple(found) == ORDER
    assert found["reference"].operations == tuple(OPERATIONS)
    cuda = found["cuda"]
    if not torch.cuda.is_available():
        assert cuda.reason
    if not cuda.loaded:
        assert "was not built" in cuda.reason or "did not load" in cuda.reason


def described(folder: Path) -> dict:
    """How the kernels built in ``folder`` run, in a process that pytest's plugins have loaded nothing into."""
    script = ROOT / "tests" / "describe_build.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["module"]).parents[1] == folder
    return found


@pytest.fixture(scope="module")
def described_here():
    return described(ROOT)


def check_threads(found: dict) -> None:
    (library,) = found["openmp"]
    assert Path(found["torch"]).parents[1] in Path(library).parents
    assert found["busy_threads"] == 2 and found["new_threads"] == 0


def test_the_threads_are_those_of_torchs_libgomp(described_here):
    check_threads(described_here)


def test_import_touches_no_gpu():
    code = """
import torch
def refuse(*a, **k): raise AssertionError("the GPU was asked for")
torch.cuda.is_available = torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = refuse
import fastguide.ops._operation, fastguide.doctor
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- the clone and the installed package --------------------------------------------------------------------


def copy_sources(folder: Path) -> Path:
    """The package as a clone has it, unbuilt."""
    unbuilt = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    return Path(shutil.copytree(ROOT / "fastguide", folder / "fastguide", ignore=unbuilt))


def ask(code: str, clone: Path, site: Path, editable: Path | None = None) -> str:
    """What ``code`` prints in the folder ``clone``, with what is installed in ``site``, and the compiled modules of an
    editable installation of ``editable``, which it finds for any package of this name."""
    finder = f"""
import importlib.util, sys
from pathlib import Path
class Finder:
    def find_spec(self, name, path=None, target=None):
        for file in Path({str(editable)!r}).glob(name.removeprefix("fastguide.") + ".*.so"):
            return importlib.util.spec_from_file_location(name, file)
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f).lower()]  # this environment's own
sys.meta_path.append(Finder())
import torch, fastguide
from fastguide import doctor
"""
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", finder + code]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def install(site: Path) -> Path:
    """What an installation of another copy leaves, as far as Python's metadata tell."""
    package = copy_sources(site)
    metadata = site / "fastguide-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: fastguide\nVersion: 0.1.0\n")
    return package


def test_an_unbuilt_clone_before_the_installed_copy_is_named(tmp_path):
    clone, site = tmp_path / "clone", tmp_path / "site"
    sources, installed = copy_sources(clone), install(site)
    words = (
        f"was not built: Python imported the sources in {sources}, where no build has run, in place of the copy that "
        f"pip installed in {installed}. `pip install -e {clone}` builds it here"
    )
    said = ask("print(fastguide.backends()['cpu'].reason)", clone, site)
    assert f"fastguide._cpu_portable {words}" in said
    said = ask("fastguide.ops.randn((4, 3), seed=0)", clone, site)  # runs on the reference, and says so
    assert "RuntimeWarning: fastguide runs on cpu tensors without its compiled kernels" in said
    assert "slowly, in plain PyTorch: fastguide._cpu_" in said
    assert words in said
    assert words in ask("print(doctor.report())", clone, site)


def test_the_modules_of_an_editable_installation_serve_no_other_sources(tmp_path):
    sources = copy_sources(tmp_path / "clone")
    built = ROOT / "fastguide"
    said = ask("print(fastguide.backends()['cpu'].reason)", tmp_path / "clone", tmp_path, editable=built)
    assert f"imported the sources in {sources}, where no build has run" in said
    assert f"in place of the copy that pip installed in {built}." in said


def test_an_unbuilt_clone_alone_is_named(tmp_path):
    sources = copy_sources(tmp_path / "clone")
    said = ask("print(fastguide.backends()['cpu'].reason)", tmp_path / "clone", tmp_path)
    assert f"no build has run in {sources} (`pip install -e {sources.parent}` runs it)" in said


def test_doctor_of_the_installed_copy_names_the_clone_it_runs_in(tmp_path):
    clone, site = tmp_path / "clone", tmp_path / "site"
    sources = copy_sources(clone)
    install(site)
    there = f"import os; os.chdir({str(clone)!r}); print(doctor.report())"
    assert f"python started in this folder imports {sources}, which is not built" in ask(there, tmp_path, site)
    assert "python started in this folder" not in ask("print(doctor.report())", tmp_path, site)


def test_the_readme_installs_in_place():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    (pip install .*) && (\S.*)$", text, re.M)
    assert [end for _, end in commands] == ["fastguide demo", "pytest"]
    assert all(' -e ".[' in command for command, _ in commands)


# --- choosing -----------------------------------------------------------------------------------------------


def test_select():
    assert select("randn", device=CPU, dtype=torch.float64) == "cpu"
    assert select("randn", device=CPU, dtype=torch.int32) == "reference"
    assert select("resample", device=CPU, dtype=torch.float32) == "cpu"
    assert select("reverse_step", device=CPU, dtype=torch.bfloat16) == "cpu"
    assert select("reverse_step", device=CPU, dtype=torch.bfloat16, obstacle="has no such thing") == "reference"
    assert select("randn", "reference", device=CPU, dtype=torch.float32) == "reference"
    assert select("randn", device=torch.device("meta"), dtype=torch.float32) == "reference"


def test_select_refuses_with_the_reason():
    with pytest.raises(ValueError, match=r"backend: expected one of \('auto', .*\), got 'cudnn'"):
        select("randn", "cudnn", device=CPU, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="cuda has no kernel for reverse_step"):
        select("reverse_step", "cuda", device=CPU, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="cuda serves tensors on cuda, and"):
        select("randn", "cuda", device=CPU, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"this is torch\.int64"):
        select("randn", "cpu", device=CPU, dtype=torch.int64)
    assert "float64" in why_not("cuda", "randn", device=torch.device("cuda"), dtype=torch.float64)


def test_explain_tells_what_was_passed_over():
    text = explain("reverse_step", "cpu", torch.float32)
    reason = "  not cuda: cuda has no kernel for reverse_step"
    assert text.splitlines() == ["reverse_step on cpu, torch.float32: cpu", reason]
    text = explain("reverse_step", "cpu", torch.float32, obstacle="has no such thing")
    assert text.splitlines()[0] == "reverse_step on cpu, torch.float32: reference"
    assert "  not cpu: cpu has no such thing" in text.splitlines()


def test_a_missing_module_warns_once_and_only_once(monkeypatch, recwarn):
    monkeypatch.setitem(_native._modules, "cpu", (None, "fastguide._cpu did not load: broken on purpose"))
    _warn_passed_over.cache_clear()
    for _ in range(3):
        assert select("randn", device=CPU, dtype=torch.float32) == "reference"
    assert [str(w.message) for w in recwarn if "broken on purpose" in str(w.message)] == [
        "fastguide runs on cpu tensors without its compiled kernels, slowly, in plain PyTorch: fastguide._cpu did not "
        "load: broken on purpose. `fastguide doctor` tells more."
    ]
    with pytest.raises(RuntimeError, match="broken on purpose"):
        select("randn", "cpu", device=CPU, dtype=torch.float32)
    assert not backends()["cpu"].loaded and backends()["cpu"].reason.endswith("broken on purpose")
    _warn_passed_over.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch):
    """``a_gpu(capability, driver, archs)``: as if torch saw such a GPU, and the cuda module had been built for them."""

    def pretend(capability: tuple[int, int], driver: int, archs: list[str]) -> None:
        record = {"cuda": {"status": "built", "reason": "", "nvcc": "13.0", "archs": archs, "error": []}}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        monkeypatch.setattr(_native, "build_record", lambda: record)
        monkeypatch.setitem(_native._modules, "cuda", (types.SimpleNamespace(), ""))
        monkeypatch.setattr(_operation, "_INTERPRETED", False)
        _gpu_reason.cache_clear()
        _warn_passed_over.cache_clear()

    yield pretend
    _gpu_reason.cache_clear()
    _warn_passed_over.cache_clear()


@pytest.mark.parametrize(
    ("capability", "driver", "archs", "reason"),
    [
        ((8, 0), 13000, ["80", "90"], ""),
        ((8, 9), 13020, ["80", "90"], ""),  # code of the same major version
        ((12, 0), 13000, ["80", "90"], ""),  # PTX of the last
        ((9, 0), 13000, ["80", "100"], "cuda was compiled for sm_80, sm_100, and this GPU is sm_90: build with"),
        ((8, 0), 13000, ["86", "90"], "this GPU is sm_80: build with FASTGUIDE_CUDA_ARCHS=80"),
        ((9, 0), 12080, ["90"], "cuda was compiled by nvcc 13.0, and this driver serves CUDA 12"),
    ],
)
def test_a_gpu_or_a_driver_that_cannot_run_the_build_is_named(capability, driver, archs, reason, a_gpu):
    a_gpu(capability, driver, archs)
    said = why_not("cuda", "randn", device=GPU, dtype=torch.float32)
    assert (reason in said) if reason else said == ""


def test_a_gpu_without_our_kernels_takes_the_next_backend_and_warns_once(a_gpu, recwarn):
    a_gpu((9, 0), 13000, ["80", "100"])
    for _ in range(3):
        assert select("randn", device=GPU, dtype=torch.float32) == "triton"
        assert select("resample", device=GPU, dtype=torch.float32) == "reference"
    said = [str(w.message) for w in recwarn if "fastguide runs" in str(w.message)]
    assert len(said) == 2 and all("sm_80, sm_100, and this GPU is sm_90" in words for words in said)
    assert "with those of triton" in said[0] and "slowly, in plain PyTorch" in said[1]
    a_gpu((7, 5), 13000, ["80"])
    assert "triton serves compute capability 8.0" in why_not("triton", "randn", device=GPU, dtype=torch.float32)


# --- callers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((0,), (0, 3), (3, 0), (5,), (5, 2, 3)))
def test_randn_takes_any_event(shape):
    out = ops.randn(shape, seed=1, backend="cpu")
    assert out.shape == shape and not out.isnan().any()


# --- doctor -------------------------------------------------------------------------------------------------


def test_doctor_names_every_backend():
    text = doctor.report()
    for name, backend in backends().items():
        assert f"backend {name}: " in text
        assert not backend.reason or backend.reason in text
    assert text.count("self-check   passed") == sum(not b.reason for b in backends().values())
    assert torch.__version__ in text and "threads" in text


def test_doctor_shows_a_wrong_count(monkeypatch):
    monkeypatch.setitem(doctor._PHILOX, "cpu", lambda counter, key: (1, 2, 3, 4))
    assert "FAILED: Philox gives 00000001 00000002 00000003 00000004, expected 6627e8d5" in doctor.report()


def test_doctor_shows_what_a_compiler_raises(monkeypatch):
    def raises(counter, key):
        raise LookupError("no ptxas\nand more of it")  # no RuntimeError, as Triton's are none

    monkeypatch.setitem(doctor._PHILOX, "cpu", raises)
    text = doctor.report()
    assert "FAILED: LookupError: no ptxas\n" in text and "and more of it" not in text
    assert "backend reference: usable" in text


def test_doctor_shows_why_cuda_was_not_built(monkeypatch):
    cuda = {
        "status": "failed",
        "reason": "compilation failed",
        "nvcc": "13.0",
        "archs": ["90"],
        "error": ["x.cu: no"],
    }
    monkeypatch.setattr(_native, "build_record", lambda: {"compiler": "g++ 12", "cuda": cuda})
    text = doctor.report()
    assert "failed compilation failed" in text and "x.cu: no" in text and "13.0, for sm_90" in text


# --- the build itself ---------------------------------------------------------------------------------------


CUDA_SOURCES = sorted((ROOT / "csrc").glob("**/*.cu"))
CPU_SOURCES = sorted((ROOT / "csrc").glob("**/*.cpp"))
HEADERS = ("-DFG_MODULE=_test", "-isystem", sysconfig.get_paths()["include"])


def name_of(source: Path) -> str:
    return str(source.relative_to(ROOT / "csrc"))


ARCHITECTURES = ("80", "90", "100")


def rules(names: str) -> list[str]:
    """The words on the lines of the build's rules that have one of ``names``, a regular expression."""
    text = (ROOT / "csrc" / "rules.ninja").read_text()
    return " ".join(re.findall(rf"^(?:{names}) = (.*)$", text, re.M)).split()


@pytest.fixture(scope="module")
def compile_all(tmp_path_factory):
    """``compile_all(sources, *command)``: each source's future, of its object and of what the compiler said; as many
    run at a time as there are cores."""
    folder = tmp_path_factory.mktemp("objects")

    def compiled_object(source: Path, command: tuple[str, ...]) -> tuple[Path, subprocess.CompletedProcess]:
        out = folder / f"{name_of(source).replace('/', '.')}.o"
        return out, subprocess.run([*command, *HEADERS, "-c", source, "-o", out], capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield lambda sources, *command: {source: pool.submit(compiled_object, source, command) for source in sources}


@pytest.fixture(scope="module")
def cuda_objects(compile_all):
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES if f"compute_{a}" in known]
    assert gencode
    return compile_all(CUDA_SOURCES, "nvcc", *rules("nvccflags"), *gencode, "-Xptxas=-v")


@pytest.fixture(scope="module")
def cpu_objects(compile_all):
    # -O1 takes half the time of the build's -O3.
    flags = (*rules("cxxflags|module|isa_avx512"), "-O1", "-Wframe-larger-than=6000")
    return compile_all(CPU_SOURCES, *shlex.split(os.environ.get("CXX", "g++")), *flags)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=name_of)
def test_cuda_compiles_without_warnings_or_spills(source, cuda_objects):
    _, done = cuda_objects[source].result()
    words = done.stdout + done.stderr
    assert done.returncode == 0, words
    assert "warning" not in words, words
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", words)
    assert len(spills) >= sum(str(word).startswith("-gencode") for word in done.args)
    assert set(spills) == {("0", "0", "0")}, words


x86_64_only = pytest.mark.skipif(os.uname().machine != "x86_64", reason="compiles for AVX-512")


BUILT = sorted((ROOT / "fastguide").glob("_cpu_*.so"))


@x86_64_only
@pytest.mark.parametrize("module", BUILT, ids=lambda path: path.name.partition(".")[0])
def test_a_module_has_the_registers_of_its_own_instruction_set(module):
    # One that took a function from elsewhere might run AVX-512 code where there is none.
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", module], capture_output=True, text=True, check=True)
    found = {register for register in ("zmm", "ymm") if f"%{register}" in code.stdout}
    assert found == {"avx512": {"zmm", "ymm"}, "avx2": {"ymm"}, "portable": set()}[module.name[5:].partition(".")[0]]


@pytest.mark.parametrize("module", BUILT, ids=lambda path: path.name.partition(".")[0])
def test_a_module_shares_none_of_its_functions(module):
    symbols = subprocess.run(["nm", "-DC", "--defined-only", module], capture_output=True, text=True, check=True).stdout
    assert re.findall(r" T (.*)", symbols) == [f"PyInit_{module.name.partition('.')[0]}"]
    assert "fastguide" not in symbols


def test_the_module_that_is_loaded():
    isas = _native.instruction_sets()
    code = "import sys, fastguide; print(fastguide.backends()['cpu'].details['instruction_set'], *sys.modules)"
    for wish, expected in ((None, isas[0]), ("", isas[0]), *zip(isas, isas, strict=True)):
        environment = {name: value for name, value in os.environ.items() if name != "FASTGUIDE_ISA"}
        environment |= {} if wish is None else {"FASTGUIDE_ISA": wish}
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        name, *modules = found.stdout.split()
        assert name == expected
        loaded = {module for module in modules if module.startswith("fastguide._cpu")}
        assert loaded == {"fastguide._cpu_portable", f"fastguide._cpu_{expected}"}


@pytest.mark.parametrize("processor", (["portable"], ["avx2", "portable"]), ids=lambda sets: sets[0])
def test_an_instruction_set_that_the_processor_lacks_is_not_loaded(processor, monkeypatch):
    portable = types.SimpleNamespace(instruction_sets=lambda: processor)
    monkeypatch.setattr(_native, "_load", lambda name: (portable if name == "_cpu_portable" else name, ""))
    monkeypatch.delenv("FASTGUIDE_ISA", raising=False)
    assert _native._load_cpu()[0] == (portable if processor == ["portable"] else "_cpu_avx2")
    for wish in ("avx512", "mmx"):
        monkeypatch.setenv("FASTGUIDE_ISA", wish)
        with pytest.raises(ValueError, match=f"FASTGUIDE_ISA: expected one of {', '.join(processor)} .*, got '{wish}'"):
            _native._load_cpu()


@x86_64_only
def test_the_processor_is_asked_for_all_of_an_instruction_set():
    # /proc/cpuinfo leaves out what the system does not save the registers of.
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    v3 = flags >= {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
    v4 = v3 and flags >= {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    assert _native.instruction_sets() == ["avx512"] * v4 + ["avx2"] * v3 + ["portable"]


@x86_64_only
@pytest.mark.parametrize("source", CPU_SOURCES, ids=name_of)
def test_kernels_keep_large_buffers_off_the_stack(source, cpu_objects):
    _, done = cpu_objects[source].result()
    assert done.returncode == 0, done.stderr
    assert "-Wframe-larger-than" not in done.stderr, done.stderr


def test_a_stack_of_64_kb_is_enough_for_every_kernel():
    # Where it is enough for torch, which the script looks at first. The last line names the call that crashed.
    size = 64 * 1024
    command = [sys.executable, ROOT / "tests" / "small_stacks.py", str(size)]
    environment = os.environ | {"OMP_STACKSIZE": f"{size}B", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["all done"], (done.stdout.splitlines()[-1:], done.returncode, done.stderr)


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def clone(folder: Path) -> Path:
    """What setup.py needs, in ``folder``, and a package of one empty file."""
    for module in ("ninja", "setuptools"):
        pytest.importorskip(module, reason="setup.py needs it")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "csrc"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    (folder / "fastguide").mkdir(exist_ok=True)
    (folder / "fastguide" / "__init__.py").touch()
    return folder


def build(folder: Path, **environment: str | None) -> subprocess.CompletedProcess:
    """setup.py run in ``folder``; None unsets a variable."""
    values = {name: value for name, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True)


# In place of a compiler: the bookkeeping is what is tested, and g++ would take seconds. Answers for the compiler's
# macros, and leaves an empty file at each -o and -MF.
COMPILES = (
    'case "$*" in *-dM*) echo "#define __VERSION__ \\"1.2\\"";; esac\n'
    'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; [ "$1" = -MF ] && : > "$2"; shift; done'
)

BREAKS = 'case "$1" in --version) echo "release 13.0, V13.0.1";; --list*) echo compute_90;; '
BREAKS += '*) echo "this compiler is broken" >&2; exit 1;; esac'


@pytest.mark.parametrize(
    ("wish", "nvcc", "status", "words"),
    (
        ("0", "exit 1", "skipped", "FASTGUIDE_CUDA=0"),
        ("auto", "exit 1", "failed", "nvcc names no version or arch"),
        ("auto", BREAKS, "failed", "this compiler is broken"),
        ("1", BREAKS, None, "this compiler is broken"),
        ("maybe", "exit 1", None, "FASTGUIDE_CUDA: expected 0, 1 or auto, got 'maybe'"),
    ),
)
def test_setup_without_cuda(wish, nvcc, status, words, tmp_path):
    executable(tmp_path / "home" / "bin" / "nvcc", nvcc)
    cxx = executable(tmp_path / "cxx", COMPILES)
    done = build(clone(tmp_path), FASTGUIDE_CUDA=wish, CUDA_HOME=str(tmp_path / "home"), CXX=str(cxx))
    record = tmp_path / "fastguide" / "_build.json"
    if status is None:
        assert done.returncode != 0 and words in done.stdout + done.stderr
        assert not record.exists()
        return
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(record.read_text())
    cuda = record["cuda"]
    assert set(record["cpu"]) == {"avx512", "avx2", "portable"} and record["cpu"]["portable"] == "built"
    assert cuda["status"] == status
    assert words in " ".join([cuda["reason"], *cuda["error"]])
    found = {path.name.partition(".")[0] for path in (tmp_path / "fastguide").glob("*.so")}
    assert found == {f"_cpu_{isa}" for isa, said in record["cpu"].items() if said == "built"}
    assert f"fastguide: avx512 {record['cpu']['avx512']}, " in done.stdout and f", CUDA {status} " in done.stdout


@pytest.mark.parametrize(
    ("cxx", "words"),
    (
        (None, "CXX is not set, and g++, c++ and clang++ are not on PATH. Install g++ or clang++, or name one in CXX"),
        ("nosuch", "CXX='nosuch' is none. Install g++ or clang++, or name one in CXX.\n.*nosuch: .*not found"),
        ("env nosuch", "CXX='env nosuch' is none"),
        ("echo", "CXX='echo' is none"),  # runs, and is no compiler
    ),
)
def test_a_missing_compiler_is_named_before_nvcc_runs(cxx, words, tmp_path):
    executable(tmp_path / "home" / "bin" / "nvcc", f": > {tmp_path}/nvcc-ran")
    for name in ("sh", "env", "echo"):
        (tmp_path / "path").mkdir(exist_ok=True)
        (tmp_path / "path" / name).symlink_to(str(shutil.which(name)))
    home = str(tmp_path / "home")
    done = build(clone(tmp_path), FASTGUIDE_CUDA="1", CUDA_HOME=home, CXX=cxx, PATH=str(tmp_path / "path"))
    assert done.returncode != 0
    assert re.search(f"fastguide: no C\\+\\+17 compiler: {words.replace('++', '[+][+]')}", done.stderr), done.stderr
    assert not (tmp_path / "nvcc-ran").exists()


@pytest.mark.parametrize(
    ("cxx", "there", "taken"),
    (
        (None, ("clang++", "c++", "g++"), "g++"),
        (None, ("clang++",), "clang++"),
        ("", ("c++",), "c++"),
        ("env mine", ("g++", "mine"), "env mine"),  # as "ccache g++"
    ),
)
def test_the_compiler_that_is_taken(cxx, there, taken, tmp_path):
    for name in there:
        executable(tmp_path / "path" / name, COMPILES)
    path = f"{tmp_path}/path:{tmp_path}/tools"
    for name in ("sh", "env"):
        executable(tmp_path / "tools" / name, f'exec {shutil.which(name)} "$@"')
    done = build(clone(tmp_path), FASTGUIDE_CUDA="0", CXX=cxx, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "fastguide" / "_build.json").read_text())["compiler"] == f"{taken} 1.2"


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++ on PATH")
def test_clang_makes_the_same_bits_on_torchs_threads(described_here, tmp_path):
    copy_sources(tmp_path)
    rules = clone(tmp_path) / "csrc" / "rules.ninja"
    rules.write_text(rules.read_text().replace(" -O3 ", " -O0 "))  # a fifth of the time
    done = build(tmp_path, FASTGUIDE_CUDA="0", CXX="clang++")
    words = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("[")]
    assert done.returncode == 0 and not re.search("(warning|error): ", "\n".join(words)), words
    found = described(tmp_path)
    check_threads(found)
    assert found["bits"] == described_here["bits"]  # and so the same instruction sets, in the same order
