"""Import torchvision in tests, even if it was built for another torch."""

import functools

import torch


@functools.cache  # the returned library must live as long as the process
def mended_torchvision() -> torch.library.Library | None:
    """Make torchvision importable with a CPU build of torch.

    PyPI's torchvision fails to import with it, because operators are missing. timm, torchmetrics,
    lightning and transformers import torchvision. Defining the schemas of these operators is
    enough, because no test calls them.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None  # torchvision is not installed
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None
