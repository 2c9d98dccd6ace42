"""Import timm and torchvision. A failure is an error of one line that says what to install."""

import importlib.util
import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

from bdkd.errors import RunError, first_line

_ALTERNATIVE = "the imagenet_ networks of bdkd need neither timm nor torchvision"
# The error of a torchvision that was built for another torch: its compiled operators do not load,
# and _meta_registrations.py, which every import of torchvision runs, needs two of them.
# https://github.com/pytorch/vision/blob/v0.28.0/torchvision/_meta_registrations.py#L163
_NO_OPERATORS = "operator torchvision::nms does not exist"
_placeholders: list[torch.library.Library] = []  # an operator lives as long as its library
_warned: list[str] = []

# timm requires torchvision, whose newest version would replace the installed torch.
INSTALL = f"pip install 'bdkd[imagenet]' torch=={torch.__version__}"


def import_library(library: str) -> ModuleType:
    """Return the module ``timm`` or ``torchvision``.

    If the installed torchvision was built for another torch, placeholders replace the operators
    that it lacks, and one line on standard error says so. Networks do not call these operators.

    Raises:
        RunError: the library is not installed, or cannot be imported.
    """
    try:
        try:
            return import_module(library)
        except RuntimeError as error:
            if _NO_OPERATORS not in str(error):
                raise
        _define_placeholders()
        module = import_module(library)
        _warn()
        return module
    except ModuleNotFoundError as error:
        if error.name != library:
            raise RunError(f"{library} needs {error.name}: pip install {error.name}") from error
        raise RunError(f"{library} is not installed: {INSTALL} ({_ALTERNATIVE})") from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # The usual cause is a torchvision for another torch version, which timm imports too.
        raise RunError(
            f"{library} is installed but does not import ({described(error)}): install the "
            f"torchvision that belongs to torch {torch.__version__} ({_ALTERNATIVE})"
        ) from error


def is_installed(library: str) -> bool:
    """Return whether a library is installed. It may still fail to import."""
    try:
        return importlib.util.find_spec(library) is not None
    except (ImportError, ValueError):  # ValueError: sys.modules has an entry without a spec
        return False


def lacks_operators() -> bool:
    """Return whether :func:`import_library` has imported a torchvision that was built for another
    torch."""
    return bool(_warned)


def described(error: Exception) -> str:
    """Return the type and the first line of an error."""
    name, text = type(error).__name__, str(error).strip()
    return f"{name}: {first_line(error)}" if text else name


def _define_placeholders() -> None:
    """Define the operators that torchvision lacks, and remove the modules that its failed import
    left partly imported."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _placeholders.append(library)
    for package in ("torchvision", "timm"):
        if package not in sys.modules:  # Python removes the failed module, but not its parts
            for module in [name for name in sys.modules if name.startswith(f"{package}.")]:
                del sys.modules[module]


def _warn() -> None:
    try:
        found = f"torchvision {version('torchvision')}"
    except PackageNotFoundError:  # a source tree on PYTHONPATH
        found = "torchvision"
    text = (
        f"warning: the installed {found} does not belong to torch {torch.__version__}: only its "
        "networks can be used; install the torchvision built for this torch"
    )
    if not _warned and os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
    _warned.append(text)
