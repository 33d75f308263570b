"""bfloat16 on a machine that has no bfloat16 arithmetic, at the speed of float32."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class ProductsInFloat32(TorchDispatchMode):
    """Products of bfloat16 matrices add up in float32, and are rounded once, as tensor cores do it.

    Without such hardware the kernels of a CPU take ten times as long. All other operations are untouched.

    Example:
        >>> a = torch.randn(4, 8, dtype=torch.bfloat16)
        >>> with ProductsInFloat32():
        ...     rounded = a @ a.T
        >>> torch.equal(rounded, (a.float() @ a.float().T).bfloat16())
        True
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in args if isinstance(value, Tensor)]
        if function not in PRODUCTS or not any(t.dtype == torch.bfloat16 for t in tensors):
            return function(*args, **kwargs)
        return tree_map(_rounded, function(*tree_map(_precise, args), **tree_map(_precise, kwargs)))


def _precise(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _rounded(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
