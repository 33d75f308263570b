"""Capabilities of the machine."""

import torch


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is multiplied in hardware; elsewhere it is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "bf16"))
