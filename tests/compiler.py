"""The backend that the tests compile with."""

import torch

# torch's own inductor does not quote its path when it calls the C++ compiler, so it cannot work
# where torch lies in a folder with a space; the same graphs are then run without code generation.
COMPILER = "aot_eager" if " " in torch.__file__ else "inductor"
