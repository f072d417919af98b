"""Builds fastguide._cpu_* for each instruction set and, where nvcc is found, fastguide._cuda, with ninja.

FASTGUIDE_CPU=1|0            0 installs without the C++ kernels, which needs no compiler; CPU tensors take plain PyTorch
FASTGUIDE_CUDA=auto|0|1      auto builds _cuda if it can and records why if it cannot; 1 makes that an error
FASTGUIDE_CUDA_ARCHS=80;90   what to compile for, PTX kept of the last; else what nvcc knows of those in find_nvcc
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

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = "built" if os.uname().machine == "x86_64" else "skipped: for x86-64"
CPU = {"avx512": X86, "avx2": X86, "portable": "built"}
KERNELS, WISH = os.environ.get("FASTGUIDE_CPU", "1"), os.environ.get("FASTGUIDE_CUDA", "auto")
if KERNELS == "0":
    again = "install g++, and fastguide again with --force-reinstall --no-deps --no-cache-dir"
    CPU = dict.fromkeys(CPU, f"FASTGUIDE_CPU=0 was set; for the kernels, {again}")
CUDA = {"status": "skipped", "reason": "", "nvcc": "", "archs": [], "error": []}  # both as _build.json has them
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "")


class NinjaBuild(build_ext):
    def compiler_version(self):
        """What the C++ compiler calls itself. Without one, the build ends here."""
        text = subprocess.getoutput(f"{CXX or 'false'} -std=c++17 -dM -E -xc++ {os.devnull}", errors="replace")
        if version := re.search(r'^#define __VERSION__ "(.*)"', text, re.MULTILINE):
            return version[1]
        found = f"CXX={CXX!r} is none" if CXX else "CXX is not set, and g++, c++ and clang++ are not on PATH"
        advice = "Install g++ or clang++, or name one in CXX. FASTGUIDE_CPU=0 installs without kernels, which is slow"
        sys.exit(f"fastguide: no C++17 compiler: {found}. {advice}.\n{text[-800:]}")

    def find_nvcc(self):
        """nvcc, or "" and the reason in CUDA."""
        nvcc = shutil.which("nvcc", path=os.path.expandvars("$CUDA_HOME/bin:$PATH"))
        if WISH == "0" or not nvcc:
            CUDA["reason"] = "FASTGUIDE_CUDA=0" if WISH == "0" else "no nvcc under CUDA_HOME or on PATH"
            return ""
        text = subprocess.getoutput("{0} --version; {0} --list-gpu-arch".format(shlex.quote(nvcc)), errors="replace")
        wish = os.environ.get("FASTGUIDE_CUDA_ARCHS", "")
        asked = re.findall(r"\w+", wish)  # nvcc says what is wrong with a number
        if not all(arch.isdecimal() for arch in asked):
            CUDA.update(status="failed", reason=f"FASTGUIDE_CUDA_ARCHS: expected numbers such as 80;90, got {wish}")
            return ""
        archs = asked or [a for a in ("75", "80", "86", "89", "90", "100", "120") if f"compute_{a}" in text.split()]
        if not archs or not (version := re.search(r"V(\d[\d.]*)", text)):
            CUDA.update(status="failed", reason="nvcc names no version or arch", error=text.splitlines()[-12:])
            return ""
        CUDA.update(status="built", nvcc=version[1], archs=archs)  # until it fails
        return nvcc

    def ninja_text(self, nvcc):
        codes = [(a, f"sm_{a}") for a in CUDA["archs"]] + [(a, f"compute_{a}") for a in CUDA["archs"][-1:]]
        values = {name: os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")}
        values |= {"builddir": self.build_temp, "cxx": CXX, "nvcc": nvcc}
        values["archs"] = " ".join(f"-gencode arch=compute_{arch},code={code}" for arch, code in codes)
        values["headers"] = " ".join(f"-isystem {shlex.quote(folder)}" for folder in self.include_dirs)
        text = "".join(f"{name} = {value}\n" for name, value in values.items()) + "include csrc/rules.ninja\n"
        for extension in self.extensions:
            rule, name, objects = extension.language, extension.name.rpartition(".")[2], []
            for source in extension.sources:
                objects.append(f"$builddir/{name}/{source}.o")
                text += f"build {objects[-1]}: {rule} {source}\n  name = {name}\n  isa = $isa{name[4:]}\n"
            text += f"build {self.get_ext_fullpath(extension.name)}: {rule}_link {' '.join(objects)}\n"
        return text

    def build_extensions(self):
        if WISH not in ("0", "1", "auto") or KERNELS not in ("0", "1"):
            sys.exit(f"FASTGUIDE_CUDA: expected 0, 1 or auto, got {WISH!r}; FASTGUIDE_CPU: 0 or 1, got {KERNELS!r}")
        self.mkpath(self.build_temp), self.mkpath(os.path.join(self.build_lib, "fastguide"))
        *cpu, cuda = (self.get_ext_fullpath(extension.name) for extension in self.extensions)
        compiler = f"{CXX} {self.compiler_version()}" if cpu else ""  # before nvcc, which takes minutes
        nvcc, file = self.find_nvcc(), os.path.join(self.build_temp, "build.ninja")
        Path(file).write_text(self.ninja_text(nvcc))
        ninja = (sys.executable, "-m", "ninja", "-k0", "-f", file)
        if cpu and subprocess.run([*ninja, *cpu]).returncode:
            sys.exit("fastguide: the C++ part did not compile; the compiler's words are above")
        if nvcc:
            done = subprocess.run([*ninja, cuda], stdout=subprocess.PIPE, text=True, errors="replace")
            print(done.stdout, flush=True)
            if done.returncode:
                words = [line for line in done.stdout.splitlines() if not line.startswith((nvcc, "[", "ninja:"))]
                CUDA.update(status="failed", reason="compilation failed", error=words[-12:])
        if CUDA["status"] != "built":
            if WISH == "1":
                sys.exit("\n".join([f"fastguide: FASTGUIDE_CUDA=1, but {CUDA['reason']}", *CUDA["error"]]))
            self.extensions.pop()
        flags = re.findall(r"^(\w*flags|isa_\w+) = (.*)$", Path("csrc/rules.ninja").read_text(), re.MULTILINE)
        record = {"compiler": compiler, "cpu": CPU, "cuda": CUDA} | dict(flags)
        Path(self.build_lib, "fastguide", "_build.json").write_text(json.dumps(record, indent=2) + "\n")
        print("fastguide:", *(f"{isa} {said}," for isa, said in CPU.items()), "CUDA", CUDA["status"], CUDA["reason"])

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib, "fastguide", "_build.json"), "fastguide")


cpp, cu = (sorted(map(str, Path("csrc").glob(f"**/*.{suffix}"))) for suffix in ("cpp", "cu"))
modules = [Extension(f"fastguide._cpu_{i}", cpp, language="cxx") for i, said in CPU.items() if said == "built"]
modules.append(Extension("fastguide._cuda", [*cu, "csrc/common/module.cpp"], language="nvcc"))
setup(ext_modules=modules, cmdclass={"build_ext": NinjaBuild})
