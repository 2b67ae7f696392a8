"""The same with a Qwen-VL: m-RoPE, images of any size, a method inside the language model.

    python examples/wrap_qwen_vl.py                                   # the built-in model, offline
    python examples/wrap_qwen_vl.py --model Qwen/Qwen2.5-VL-3B-Instruct --image cat.jpg --keep 64
    python examples/wrap_qwen_vl.py --model Qwen/Qwen3-VL-2B-Instruct --image cat.jpg --method divprune

Kept tokens keep their two-dimensional positions; cuts inside Qwen's vision tower are refused, because
its merger needs whole 2 x 2 groups (``vtr.supported(model)`` says which methods work).
"""

from __future__ import annotations

import wrap_llava

if __name__ == "__main__":
    wrap_llava.main(method="fastv")
