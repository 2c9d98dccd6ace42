"""Choose the torch.compile backend that tests can use on this machine."""

import os
import shutil

import torch

# CMake and inductor search for a compiler in the same way.
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None

# Inductor needs a C++ compiler. It does not quote torch's path when it calls the compiler, so it
# fails if torch is in a folder with a space in its name. aot_eager then runs the same graphs
# without generated code.
COMPILER = "inductor" if HAS_COMPILER and " " not in torch.__file__ else "aot_eager"
