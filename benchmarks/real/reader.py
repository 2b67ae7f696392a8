"""Read formulas: the published decoder with a cache, on whatever tokens the encoder has kept."""

from __future__ import annotations

import json
import re
from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from torch import Tensor
from weights import State, ocr_assets, ocr_config  # beside this script

Pair = tuple[Tensor, Tensor]


class Reader:
    """Greedy decoding of one formula per row of the encoder's output.

    Args:
        tensors: of the published model.
    """

    def __init__(self, tensors: State) -> None:
        config = ocr_config()
        self.tensors, self.heads = tensors, config["num_heads"]
        self.layers, self.longest = config["num_decoder_layers"], config["max_length"]
        names = json.loads((ocr_assets() / "tokenizer.json").read_text())["token_to_id"]
        self.begin, self.end, self.pad = names["<bos>"], names["<eos>"], names["<pad>"]
        self.characters = {number: name for name, number in names.items()}

    @torch.inference_mode()
    def read(self, memory: Tensor, longest: int = 256, seen: Tensor | None = None) -> list[str]:
        """Decode ``memory`` (B, N, D), the encoder's tokens; ``seen`` (B, N) bool, those that count."""
        rows = len(memory)
        across = [self._pair(memory, f"decoder_blocks.{i}.cross_attn") for i in range(self.layers)]
        mask = None if seen is None else seen[:, None, None]
        past: list[Pair | None] = [None] * self.layers
        last = torch.full((rows,), self.begin)
        lines: list[list[int]] = [[] for _ in range(rows)]
        done = torch.zeros(rows, dtype=torch.bool)
        for step in range(min(longest, self.longest) - 1):
            logits = self._step(last, step, past, across, mask)
            logits[:, [self.pad, self.begin]] = -torch.inf
            last = logits.argmax(-1).where(~done, torch.tensor(self.end))
            done |= last == self.end
            for line, number in zip(lines, last.tolist(), strict=True):
                if number != self.end:
                    line.append(number)
            if done.all():
                break
        return ["".join(self.characters[n] for n in line) for line in lines]

    def _step(
        self, last: Tensor, step: int, past: list[Pair | None], across: list[Pair], mask: Tensor | None
    ) -> Tensor:  # fmt: skip
        t = self.tensors
        x = t["decoder_embed.token_emb.weight"][last] + t["decoder_embed.pos_emb.weight"][step]
        x = self._norm(x, "decoder_embed.norm")[:, None]
        for i in range(self.layers):
            name = f"decoder_blocks.{i}"
            normed = self._norm(x, f"{name}.self_norm")
            pair, before = self._pair(normed, f"{name}.self_attn"), past[i]
            if before is not None:
                pair = torch.cat([before[0], pair[0]], 2), torch.cat([before[1], pair[1]], 2)
            past[i] = pair
            x = x + self._attend(normed, pair, f"{name}.self_attn", None)
            normed = self._norm(x, f"{name}.cross_norm")
            x = x + self._attend(normed, across[i], f"{name}.cross_attn", mask)
            hidden = F.gelu(self._linear(self._norm(x, f"{name}.ffn_norm"), f"{name}.ffn.0"))
            x = x + self._linear(hidden, f"{name}.ffn.3")
        return self._linear(self._norm(x[:, 0], "decoder_norm"), "lm_head")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _pair(self, x: Tensor, name: str) -> Pair:
        width = x.shape[-1]
        weight = self.tensors[f"{name}.in_proj_weight"][width:]
        bias = self.tensors[f"{name}.in_proj_bias"][width:]
        keys, values = F.linear(x, weight, bias).chunk(2, -1)
        return self._split(keys), self._split(values)

    def _attend(self, x: Tensor, pair: Pair, name: str, mask: Tensor | None) -> Tensor:
        width = x.shape[-1]
        weight = self.tensors[f"{name}.in_proj_weight"][:width]
        queries = self._split(F.linear(x, weight, self.tensors[f"{name}.in_proj_bias"][:width]))
        found = F.scaled_dot_product_attention(queries, *pair, attn_mask=mask)
        return self._linear(found.transpose(1, 2).flatten(2), f"{name}.out_proj")


_SPACE = re.compile(r"\\[,;:! ]|\\q?quad|\s|~")
_SIZES = re.compile(r"\\(left|right|[Bb]igg?[lr]?|displaystyle|textstyle|dfrac(?=\{))")
_FONTS = re.compile(
    r"\\(cal|bf|rm|it|mathcal|mathbf|mathrm|mathit|boldsymbol|mit|operatorname)(?![a-zA-Z])"
)


def plain(formula: str) -> str:
    """Remove spaces, fonts, sizes of brackets, and braces, which do not change what is read."""
    for pattern in (_FONTS, _SIZES, _SPACE):  # a space ends the name of a font
        formula = pattern.sub("", formula)
    return formula.replace("{", "").replace("}", "").replace(r"\rightarrow", r"\to")


def similarity(read: str, truth: str) -> float:
    """Share of characters in common, in order (Ratcliff and Obershelp), from 0 to 1."""
    return SequenceMatcher(None, plain(read), plain(truth), autojunk=False).ratio()
