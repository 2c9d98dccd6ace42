"""Check an installed bdkd without the packages of the trainer.

The script checks the loss on every backend, and which modules of ``bdkd`` can be imported. The
wheel test and cibuildwheel run it in an environment that has only the wheel, torch and the packages
that torch requires.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch

import bdkd
from bdkd.extras import TRAINER_PACKAGES

OPTIONS = {"temperature": 2.0, "gamma": 3.0, "label_smoothing": 0.1}


def check_backend(backend: str, device: str) -> None:
    """Compare values, statistics and gradients of every entry point with the reference."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(2, 33, 17, device=device)).unbind()
    target = torch.randint(17, (33,), device=device)

    def values(loss: Callable[..., bdkd.BDKDOutput]) -> list[torch.Tensor]:
        leaves = [one.clone().requires_grad_() for one in logits]
        out = loss(*leaves, target)
        (out.student + out.teacher).backward()
        return [out.student, out.teacher, *out.stats, *(leaf.grad for leaf in leaves)]

    expected = values(bdkd.BDKDLoss(**OPTIONS, backend="reference"))
    out, gradients = bdkd.bdkd_loss_and_grad(*logits, target, **OPTIONS, backend=backend)
    for found in (
        values(lambda *inputs: bdkd.bdkd_loss(*inputs, **OPTIONS, backend=backend)),
        values(bdkd.BDKDLoss(**OPTIONS, backend=backend)),
        [out.student, out.teacher, *out.stats, *gradients],
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def refused_modules() -> list[str]:
    """Import every module of ``bdkd``. Return those whose error names the missing extra.

    The modules of commands are skipped, because ``bdkd.cli.main`` checks for the extra.
    """
    refused = []
    for module in pkgutil.walk_packages(bdkd.__path__, "bdkd.", onerror=lambda _: None):
        if module.name.startswith("bdkd.cli.") or module.name == "bdkd.__main__":
            continue
        try:
            import_module(module.name)
        except ImportError as error:
            if not str(error).endswith("pip install 'bdkd[train]'"):
                raise
            refused.append(module.name)
    return refused


def main() -> None:
    missing = [name for name, module in TRAINER_PACKAGES.items() if find_spec(module) is None]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    available = [name for name, can in bdkd.available_backends().items() if can]
    for backend in available:
        check_backend(backend, "cpu" if backend == "native" else device)
    assert bdkd.create_model("resnet8", num_classes=10)
    refused = refused_modules()
    assert bool(refused) == bool(missing), (refused, missing)
    print(f"backends: {' '.join(available)}")
    print(f"not installed: {' '.join(missing)}")
    print(f"modules without the extra: {' '.join(refused)}")


if __name__ == "__main__":
    main()
