"""Build kernels/csrc with CMake into one shared library inside ``bdkd_kernels``.

This step is optional: without a compiler, the package still installs, and ``bdkd doctor`` says what
is missing. The library does not use Python's headers, so one wheel works with every Python 3 of a
platform.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARY = f"bdkd_kernels/libbdkd_native{SUFFIX}"


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_name(Path(LIBRARY).name))

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve() / "native"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = ["cmake", "-S", str(Path(__file__).resolve().parent), "-B", str(folder),
                     "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"]  # fmt: skip
        try:
            for step in (configure, ["cmake", "--build", str(folder)]):
                subprocess.run(step, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the native CPU kernel was not built: {error}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / target.name), str(target))


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        built = (
            Path(self.bdist_dir, LIBRARY).exists() or Path(self.get_build_lib(), LIBRARY).exists()
        )
        return ("py3", "none", super().get_tag()[2] if built else "any")

    def get_build_lib(self) -> str:
        return self.get_finalized_command("build").build_lib


setup(
    # setuptools needs an extension's name. The build makes LIBRARY, which ctypes loads.
    ext_modules=[Extension("bdkd_kernels.libbdkd_native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
