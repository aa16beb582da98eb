"""A pretended CUDA device that computes on the CPU, to find device mistakes where there is no GPU.

Unlike torch's FakeTensorMode its tensors hold values, so that code whose shapes depend on data runs too.
Mixing it with CPU tensors raises, as CUDA does.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
_MAY_MIX = {aten.copy_.default, aten._to_copy.default}


class FakeCudaTensor(torch.Tensor):
    """Says that it is on cuda:0; `held` holds its values on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> "FakeCudaTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), dtype=real.dtype, device="cuda:0"
        )
        tensor.held = real
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class FakeCuda(TorchDispatchMode):
    """Within this, ``device="cuda"`` gives pretended CUDA tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    fakes = {id(each.held): each for each in tensors if isinstance(each, FakeCudaTensor)}
    mixed = any(not isinstance(each, FakeCudaTensor) and each.ndim > 0 for each in tensors)
    if fakes and mixed and func not in _MAY_MIX:
        raise RuntimeError(f"{func}: expected all tensors on the same device, found cuda:0 and cpu")

    device = kwargs.get("device")
    on_cuda = bool(fakes) if device is None else torch.device(device).type == "cuda"
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}

    def unwrap(each: Any) -> Any:
        return each.held if isinstance(each, FakeCudaTensor) else each

    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))

    def wrap(each: Any) -> Any:
        if not isinstance(each, torch.Tensor) or not on_cuda:
            return each
        return fakes.get(id(each)) if id(each) in fakes else FakeCudaTensor(each)

    return tree_map(wrap, result)
