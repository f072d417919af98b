"""What was built, what loads, and the messages about what is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import check_wheel
import pytest
from fresh import Python

import fastguide
from fastguide.ops import _native

ROOT = Path(__file__).parents[1]


def described(folder: Path) -> dict:
    """How the kernels built in ``folder`` run."""
    found = check_wheel.described(folder)
    assert Path(found["module"]).parents[1] == folder
    return found


@pytest.fixture(scope="module")
def described_here():
    return described(ROOT)


def test_the_threads_are_those_of_torchs_libgomp(described_here):
    check_wheel.check_threads(described_here)


def test_import_touches_no_gpu(python):
    code = """
import torch
def refuse(*a, **k): raise AssertionError("the GPU was asked for")
torch.cuda.is_available = torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = refuse
import fastguide.ops._operation, fastguide.doctor
"""
    python(code, cwd=ROOT).check_returncode()


# --- the clone and the installed package --------------------------------------------------------------------


def copy_sources(folder: Path) -> Path:
    """Copy the package into ``folder`` like an unbuilt clone."""
    unbuilt = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    return Path(shutil.copytree(ROOT / "fastguide", folder / "fastguide", ignore=unbuilt))


@pytest.fixture
def ask(python):
    return partial(asked, python)


def asked(python: Python, code: str, clone: Path, site: Path, editable: Path | None = None) -> str:
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
    done = python(finder + code, cwd=clone, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def install(site: Path) -> Path:
    """Write the metadata that an installation of another copy leaves."""
    package = copy_sources(site)
    metadata = site / "fastguide-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: fastguide\nVersion: 0.1.0\n")
    return package


def test_an_unbuilt_clone_before_the_installed_copy_is_named(ask, tmp_path):
    clone, site = tmp_path / "clone", tmp_path / "site"
    sources, installed = copy_sources(clone), install(site)
    words = (
        f"was not built: Python imported the sources in {sources}, where no build has run, in place of the copy that "
        f"pip installed in {installed}. `pip install -e {clone}` builds it here"
    )
    code = """
fastguide.ops.randn((4, 3), seed=0)  # runs on the reference, and says so on stderr
print(fastguide.backends()['cpu'].reason, "---", doctor.report(), "---")
"""
    reason, report, warning = ask(code, clone, site).split("---")
    assert f"fastguide._cpu_portable {words}" in reason
    assert "RuntimeWarning: fastguide runs on cpu tensors without its compiled kernels" in warning
    assert "slowly, in plain PyTorch: fastguide._cpu_" in warning
    assert words in warning and words in report


def test_the_modules_of_an_editable_installation_serve_no_other_sources(ask, tmp_path):
    sources = copy_sources(tmp_path / "clone")
    built = ROOT / "fastguide"
    said = ask("print(fastguide.backends()['cpu'].reason)", tmp_path / "clone", tmp_path, editable=built)
    assert f"imported the sources in {sources}, where no build has run" in said
    assert f"in place of the copy that pip installed in {built}." in said


def test_an_unbuilt_clone_alone_is_named(ask, tmp_path):
    sources = copy_sources(tmp_path / "clone")
    said = ask("print(fastguide.backends()['cpu'].reason)", tmp_path / "clone", tmp_path)
    assert f"no build has run in {sources} (`pip install -e {sources.parent}` runs it)" in said


def test_doctor_of_the_installed_copy_names_the_clone_it_runs_in(ask, tmp_path):
    clone, site = tmp_path / "clone", tmp_path / "site"
    sources = copy_sources(clone)
    install(site)
    code = f"import os; print(doctor.report(), '---'); os.chdir({str(clone)!r}); print(doctor.report())"
    here, there = ask(code, tmp_path, site).split("---")
    assert f"python started in this folder imports {sources}, which is not built" in there
    assert "python started in this folder" not in here


def test_the_readme_installs_in_place():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    (pip install .*) && (\S.*)$", text, re.M)
    assert [end for _, end in commands] == ["fastguide demo", "pytest -n 2 --dist loadgroup"]
    assert all(' -e ".[' in command for command, _ in commands)


# --- the build itself ---------------------------------------------------------------------------------------


CUDA_SOURCES = sorted((ROOT / "csrc").glob("**/*.cu"))
HEADERS = ("-DFG_MODULE=_test", "-isystem", sysconfig.get_paths()["include"])


def name_of(source: Path) -> str:
    return str(source.relative_to(ROOT / "csrc"))


ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def rules(names: str) -> list[str]:
    """The words on the lines of the build rules that define one of ``names``, a regular expression."""
    text = (ROOT / "csrc" / "rules.ninja").read_text()
    return " ".join(re.findall(rf"^(?:{names}) = (.*)$", text, re.M)).split()


@pytest.fixture(scope="module")
def compile_all(tmp_path_factory):
    """``compile_all(commands)``, with a command for each source: a future for each source, with its object and the
    compiler's output. As many compilers run at a time as there are cores."""
    folder = tmp_path_factory.mktemp("objects")

    def compiled_object(source: Path, command: tuple[str, ...]) -> tuple[Path, subprocess.CompletedProcess]:
        out = folder / f"{name_of(source).replace('/', '.')}.o"
        return out, subprocess.run([*command, *HEADERS, "-c", source, "-o", out], capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield lambda commands: {source: pool.submit(compiled_object, source, c) for source, c in commands.items()}


@pytest.fixture(scope="module")
def cuda_objects(compile_all):
    # The sources have no code of an architecture's own: their PTX is made once, and the machine code for one of the
    # architectures, each for another. FASTGUIDE_EVERY_KERNEL=1 makes that of all.
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    codes = [code for code in ARCHITECTURES if code in known]
    assert codes
    arch = codes[0].replace("sm", "compute")
    commands = {}
    for i, source in enumerate(CUDA_SOURCES):
        some = codes if os.environ.get("FASTGUIDE_EVERY_KERNEL") == "1" else [codes[i % len(codes)]]
        gencode = f"-gencode=arch={arch},code=[{','.join(some)}]"
        commands[source] = ("nvcc", *rules("nvccflags"), gencode, "-Xptxas=-v")
    return compile_all(commands)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=name_of)
def test_cuda_compiles_without_warnings_or_spills(source, cuda_objects):
    _, done = cuda_objects[source].result()
    words = done.stdout + done.stderr
    assert done.returncode == 0, words
    assert "warning" not in words, words
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", words)
    assert len(spills) >= sum(code in words for code in ARCHITECTURES) > 0
    assert set(spills) == {("0", "0", "0")}, words


x86_64_only = pytest.mark.skipif(os.uname().machine != "x86_64", reason="compiles for AVX-512")


BUILT = sorted((ROOT / "fastguide").glob("_cpu_*.so"))


of_each_module = pytest.mark.parametrize("module", BUILT, ids=lambda path: path.name.partition(".")[0])


def instructions(module: Path) -> str:
    command = ["objdump", "-d", "--no-show-raw-insn", module]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@x86_64_only
@of_each_module
def test_a_module_has_the_registers_of_its_own_instruction_set(module):
    # A module that took a function from another module might run AVX-512 code on a processor without it.
    code = instructions(module)
    found = {register for register in ("zmm", "ymm") if f"%{register}" in code}
    assert found == {"avx512": {"zmm", "ymm"}, "avx2": {"ymm"}, "portable": set()}[module.name[5:].partition(".")[0]]


@x86_64_only
@of_each_module
def test_kernels_keep_large_buffers_off_the_stack(module):
    # A function allocates its frame at once, or page by page: in consecutive lines, or in a loop down to %r11. It may
    # free a frame by subtracting a negative number.
    page = r"\tsub +\$0x1000,%rsp\n.*\tor[ql] +\$0x0,\(%rsp\)\n.*"
    at_once = r"\t(?:sub +\$0x(?!f{9})(\w+),%rsp|lea +-0x(\w+)\(%rsp\),%r11)\n"
    frames = re.findall(rf"((?:{page})*){at_once}", instructions(module))
    sizes = [4096 * pages.count("\tsub") + int(rest or end, 16) for pages, rest, end in frames]
    assert len(sizes) > 100 and max(sizes) < 8000


@of_each_module
def test_a_module_shares_none_of_its_functions(module):
    symbols = subprocess.run(["nm", "-DC", "--defined-only", module], capture_output=True, text=True, check=True).stdout
    assert re.findall(r" T (.*)", symbols) == [f"PyInit_{module.name.partition('.')[0]}"]
    assert "fastguide" not in symbols


def test_the_module_that_is_loaded(python):
    isas = _native.instruction_sets()
    expected = {"unset": isas[0], "": isas[0]} | {isa: isa for isa in isas[1:]}
    code = "import fastguide, sys; print(fastguide.backends()['cpu'].details['instruction_set'], *sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "FASTGUIDE_ISA"}
    for wish, isa in expected.items():
        env = environment if wish == "unset" else environment | {"FASTGUIDE_ISA": wish}
        done = python(code, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stderr
        name, *modules = done.stdout.split()
        assert name == isa
        loaded = {module for module in modules if module.startswith("fastguide._cpu")}
        assert loaded == {"fastguide._cpu_portable", f"fastguide._cpu_{isa}"}


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
    # /proc/cpuinfo leaves out instruction sets whose registers the system does not save.
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    v3 = flags >= {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
    v4 = v3 and flags >= {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    assert _native.instruction_sets() == ["avx512"] * v4 + ["avx2"] * v3 + ["portable"]


def test_a_stack_of_64_kb_is_enough_for_every_kernel():
    # The script first checks that the stack is large enough for torch. The last line names the call that crashed.
    size = 64 * 1024
    command = [sys.executable, ROOT / "tests" / "small_stacks.py", str(size)]
    environment = os.environ | {"OMP_STACKSIZE": f"{size}B", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["all done"], (done.stdout.splitlines()[-1:], done.returncode, done.stderr)


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def clone(folder: Path) -> Path:
    """Make a clone in ``folder`` with what setup.py needs, and a package of one file if there is none."""
    for module in ("ninja", "setuptools"):
        pytest.importorskip(module, reason="setup.py needs it")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "csrc"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    package = folder / "fastguide" / "__init__.py"
    package.parent.mkdir(exist_ok=True)
    if not package.exists():
        package.write_text('__version__ = "0"\n')
    return folder


def setup(folder: Path, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Run setup.py in ``folder``. None unsets an environment variable."""
    values = {name: value for name, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True)


def build(folder: Path, **environment: str | None) -> subprocess.CompletedProcess:
    return setup(folder, "build_ext", "--inplace", **environment)


# A stand-in for a compiler: these tests are about bookkeeping, and g++ would take seconds. It prints the compiler's
# macros, and writes an empty file for each -o and -MF.
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


def test_an_unknown_wish_for_the_cpu_is_named(tmp_path):
    assert "FASTGUIDE_CPU: 0 or 1, got 'no'" in build(clone(tmp_path), FASTGUIDE_CPU="no").stderr


@pytest.mark.parametrize(
    ("cxx", "words"),
    (
        (None, "CXX is not set, and g++, c++ and clang++ are not on PATH. Install g++ or clang++, or name one in CXX"),
        ("nosuch", "CXX='nosuch' is none. Install g++ or clang++, or name one in CXX. .*\n.*nosuch: .*not found"),
        ("env nosuch", "CXX='env nosuch' is none"),
        ("echo", "CXX='echo' is none"),  # it runs, but is not a compiler
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


def test_without_kernels_no_compiler_is_needed_and_the_first_call_says_how_to_get_them(ask, tmp_path):
    copy_sources(tmp_path)
    done = build(clone(tmp_path), FASTGUIDE_CPU="0", CUDA_HOME=None, CXX=None, PATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "fastguide" / "_build.json").read_text())
    assert record["compiler"] == "" and record["cuda"]["status"] == "skipped"
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    for _ in range(2):
        fastguide.ops.randn((4, 3), seed=0)
(warning,) = caught
print(warning.message, "---", doctor.report())
"""
    warning, report = ask(code, tmp_path, tmp_path).split("---")
    words = "FASTGUIDE_CPU=0 was set; for the kernels, install g++, and fastguide again with --force-reinstall "
    assert warning.startswith("fastguide runs on cpu tensors without its compiled kernels, slowly, in plain PyTorch")
    assert words in warning and f"why not      fastguide._cpu_portable was not built: {words}" in report
    assert "compiler     nothing was compiled here" in report


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
    check_wheel.check_threads(found)
    assert found["bits"] == described_here["bits"]  # so it has the same instruction sets, in the same order


# --- what is published --------------------------------------------------------------------------------------


def test_the_source_distribution_builds_a_whole_wheel(tmp_path):
    folder = tmp_path / "clone"
    copy_sources(folder)
    for name in ("MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, folder)
    clone(folder)
    sources = {path.relative_to(folder) for part in ("fastguide", "csrc") for path in (folder / part).rglob("*.*")}
    done = setup(folder, "sdist", "--formats=tar", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar")
    shutil.unpack_archive(archive, tmp_path)
    unpacked = tmp_path / archive.stem
    assert sources <= {path.relative_to(unpacked) for path in unpacked.rglob("*.*")}
    cxx = executable(tmp_path / "cxx", COMPILES)
    done = setup(unpacked, "bdist_wheel", "--dist-dir", str(tmp_path), FASTGUIDE_CUDA="0", CXX=str(cxx))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        built = json.loads(opened.read("fastguide/_build.json"))
    suffix, isas = (
        sysconfig.get_config_var("EXT_SUFFIX"),
        [isa for isa, said in built["cpu"].items() if said == "built"],
    )
    modules = {f"fastguide/_cpu_{isa}{suffix}" for isa in isas}
    package = {str(path) for path in sources if path.parts[0] == "fastguide"}
    assert {"fastguide/py.typed", "fastguide/ops/_modules.pyi"} < package
    assert names == package | modules | {"fastguide/_build.json"}
    assert wheel.name.startswith(f"fastguide-{fastguide.__version__}-")


def test_the_citation_has_the_version():
    assert f'version: "{fastguide.__version__}"' in (ROOT / "CITATION.cff").read_text()
