"""What the tests that need torch share."""

REASON = "torch is optional: pip install -r tests/requirements-torch.txt"


def declare_operators(torch):
    """Lets torchvision for CUDA, which is what PyPI has, be imported by torch for the CPU.

    It stops at the fake versions of two operators that are then not loaded, and transformers
    with it; nothing here calls them. The result must be kept: the operators go with it.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
