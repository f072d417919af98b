"""Builds fastguide._cpu and, where nvcc is found, fastguide._cuda: ninja drives the compilers, without torch.

FASTGUIDE_CUDA=auto|0|1      auto builds _cuda if it can and records why if it cannot; 1 makes that an error
FASTGUIDE_CUDA_ARCHS=80;90   what to compile for, PTX kept of the last; else what nvcc knows of 80, 90, 100
CXX CXXFLAGS LDFLAGS CUDA_HOME as usual. fastguide/_build.json keeps what was built, and what was not and why.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ISAS = ("avx512", "avx2", "portable") if os.uname().machine == "x86_64" else ("portable",)
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "")
WISH = os.environ.get("FASTGUIDE_CUDA", "auto")
CUDA = {"status": "skipped", "reason": "", "nvcc": "", "archs": [], "error": []}  # as _build.json has it


def output(*command):
    return subprocess.getstatusoutput(shlex.join(command), errors="replace")


def compiler_version():
    """What the C++ compiler calls itself. Without one, the build ends here."""
    command = f"{CXX or 'false'} -std=c++17 -dM -E -xc++ {os.devnull}"
    status, text = subprocess.getstatusoutput(command, errors="replace")
    version = re.search(r'^#define __VERSION__ "(.*)"', text, re.MULTILINE)
    if status or not version:
        found = f"CXX={CXX!r} is none" if CXX else "CXX is not set, and g++, c++ and clang++ are not on PATH"
        sys.exit(f"fastguide: no C++17 compiler: {found}. Install g++ or clang++, or name one in CXX.\n{text[-800:]}")
    return version[1]


def find_nvcc():
    """nvcc, or "" and the reason in CUDA."""
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")
    if WISH == "0" or not nvcc:
        CUDA["reason"] = "FASTGUIDE_CUDA=0" if WISH == "0" else "no nvcc under CUDA_HOME or on PATH"
        return ""
    (status, text), known = output(nvcc, "--version"), output(nvcc, "--list-gpu-arch")[1].split()
    version = re.search(r"V(\d[\d.]*)", text)
    asked = re.findall(r"\w+", os.environ.get("FASTGUIDE_CUDA_ARCHS", ""))  # nvcc says what is wrong with it
    archs = asked or [arch for arch in ("80", "90", "100") if f"compute_{arch}" in known]
    if status or not version or not archs:
        CUDA.update(status="failed", reason="nvcc names no version or arch", error=text.splitlines()[-12:])
        return ""
    CUDA.update(nvcc=version[1], archs=archs)
    return nvcc


class NinjaBuild(build_ext):
    def ninja_text(self, nvcc):
        headers = " ".join(f"-isystem {shlex.quote(d)}" for d in (pybind11.get_include(), *self.include_dirs))
        codes = [(a, f"sm_{a}") for a in CUDA["archs"]] + [(a, f"compute_{a}") for a in CUDA["archs"][-1:]]
        archs = " ".join(f"-gencode arch=compute_{arch},code={code}" for arch, code in codes)
        text = f"builddir = {self.build_temp}\ncxx = {CXX}\nnvcc = {nvcc}\narchs = {archs}\n"
        text += "".join(f"env_{name} = {os.environ.get(name, '')}\n" for name in ("CXXFLAGS", "LDFLAGS"))
        text += f"headers = {headers}\ninclude csrc/rules.ninja\n"
        for extension, rule in zip(self.extensions, ("cxx", "nvcc") if nvcc else ("cxx",), strict=False):
            pairs = [(src, isa) for src in extension.sources for isa in (ISAS if "kernels" in src else ("all",))]
            text += "".join(f"build $builddir/{src}.{isa}.o: {rule} {src}\n  isa = $isa_{isa}\n" for src, isa in pairs)
            objects = " ".join(f"$builddir/{src}.{isa}.o" for src, isa in pairs)
            text += f"{rule}_library = {self.get_ext_fullpath(extension.name)}\n"
            text += f"build {rule}: phony ${rule}_library\nbuild ${rule}_library: {rule}_link {objects}\n"
        return text

    def build_extensions(self):
        if WISH not in ("0", "1", "auto"):
            sys.exit(f"FASTGUIDE_CUDA: expected 0, 1 or auto, got {WISH!r}")
        self.mkpath(self.build_temp)
        version, nvcc, file = compiler_version(), find_nvcc(), os.path.join(self.build_temp, "build.ninja")
        Path(file).write_text(self.ninja_text(nvcc))
        ninja = (sys.executable, "-m", "ninja", "-k0", "-f", file)
        status, log = output(*ninja)
        print(log, flush=True)
        if status and output(*ninja, "cxx")[0]:
            sys.exit("fastguide: the C++ part did not compile; the compiler's words are above")
        words = [line for line in log.splitlines() if not line.startswith((nvcc or "[", "[", "ninja:"))]
        failure = {"status": "failed", "reason": "compilation failed", "error": words[-12:]}
        CUDA.update((failure if status else {"status": "built"}) if nvcc else {})
        if CUDA["status"] != "built":
            if WISH == "1":
                sys.exit("\n".join([f"fastguide: FASTGUIDE_CUDA=1, but {CUDA['reason']}", *CUDA["error"]]))
            Path(self.get_ext_fullpath("fastguide._cuda")).unlink(missing_ok=True)  # of an earlier build
            self.extensions = self.extensions[:1]
        record = {"compiler": f"{CXX} {version}", "cuda": CUDA}
        record |= dict(re.findall(r"^(\w*flags) = (.*)$", Path("csrc/rules.ninja").read_text(), re.MULTILINE))
        Path(self.build_lib, "fastguide", "_build.json").write_text(json.dumps(record, indent=2) + "\n")
        print(f"fastguide: CUDA {CUDA['status']} {CUDA['reason']}")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib, "fastguide", "_build.json"), "fastguide")
        if CUDA["status"] != "built":
            Path("fastguide", self.get_ext_filename("_cuda")).unlink(missing_ok=True)


cpu, cuda = (sorted(map(str, Path("csrc").glob(pattern))) for pattern in ("cpu/**/*.cpp", "cuda/*.c*[pu]"))
modules = [Extension("fastguide._cpu", ["csrc/bindings.cpp", *cpu]), Extension("fastguide._cuda", cuda)]
setup(ext_modules=modules, cmdclass={"build_ext": NinjaBuild})
