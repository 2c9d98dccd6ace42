"""What the tests may compile with on this machine."""

import os
import shutil

import torch

# As CMake and inductor look for it.
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None

# Inductor needs a C++ compiler, and does not quote torch's path when it calls one, so it cannot
# work where torch lies in a folder with a space; the same graphs then run without generated code.
COMPILER = "inductor" if HAS_COMPILER and " " not in torch.__file__ else "aot_eager"
