"""Ask a Qwen-VL about pictures, with all visual tokens and with a few, as wrap_llava.py does.

    python examples/wrap_qwen_vl.py                                   # the built-in model, offline
    python examples/wrap_qwen_vl.py --model Qwen/Qwen2.5-VL-3B-Instruct --image cat.jpg --keep 64
    python examples/wrap_qwen_vl.py --model Qwen/Qwen3-VL-2B-Instruct --image cat.jpg --method divprune

Qwen-VL takes images of any size and has m-RoPE; kept tokens keep their two-dimensional positions. The
default method cuts inside the language model; cuts inside Qwen's vision tower are refused, because
its merger needs whole 2 x 2 groups (``vtr.supported(model)`` says which methods work).
"""

from __future__ import annotations

import wrap_llava

if __name__ == "__main__":
    wrap_llava.main(method="fastv")
