"""torchvision for the tests, also where it was built for another torch."""

import functools

import torch


@functools.cache  # what it returns must live as long as the process
def mended_torchvision() -> torch.library.Library | None:
    """Beside a CPU build of torch, PyPI's torchvision stops at operators that it cannot find, and
    timm, torchmetrics, lightning and transformers import it. With their schemas defined it imports;
    nothing here calls them."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None  # not installed: nothing to mend
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None
