"""The simple form of the model for lmms-eval: tasks that compare likelihoods of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtr.compat.lmms_eval import likelihood, pads
from vtr.compat.transformers import cache_of, with_cache
from vtr.evaluate.model import VTRChat
from vtr.evaluate.prompts import _flat, _part, make_prompt


class VTRSimple(VTRChat):
    """:class:`~vtr.evaluate.model.VTRChat` with ``is_simple`` and likelihoods (``--force_simple``)."""

    is_simple = True

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Compute the log-likelihood of each given answer, and whether greedy decoding would write it.

        The question goes through the prefill, where the method cuts; the answer follows in a second
        call on the shortened cache, so that a method never sees it. Not taken from the store.
        """
        out: list[tuple[float, bool]] = []
        for request in requests:
            if pads(request):
                out.append((0.0, False))
                continue
            context, target, to_visual, doc, task, split = likelihood(request)
            sample = self.task_dict[task][split][doc]
            answer = target(sample) if callable(target) else str(target)
            shown = to_visual(sample) if to_visual is not None else []
            content = [_part(v) for v in _flat(shown or [])]
            content.append({"type": "text", "text": context})
            out.append(self._likelihood([{"role": "user", "content": content}], answer, doc))
        return out

    @torch.inference_mode()
    def _likelihood(self, turns: list[dict[str, Any]], answer: str, doc: int) -> tuple[float, bool]:
        answerer = self._answerer
        inputs = answerer.encode([make_prompt(turns, {"max_new_tokens": 1})])
        tokens = self.processor.tokenizer(
            answer, add_special_tokens=False, return_tensors="pt"
        ).input_ids.to(self.model.device)
        if tokens.shape[1] == 0:
            raise ValueError("the answer whose likelihood is asked for is empty")
        with answerer.apply(self.cell.draw(doc), self.cell.plan):
            first = self.model(**inputs, logits_to_keep=1, use_cache=True)
            logits = [first.logits[:, -1:]]
            if tokens.shape[1] > 1:
                length = inputs["input_ids"].shape[1]
                # As generate counts positions: those of the prompt as it came in.
                mask = torch.ones(1, length + tokens.shape[1] - 1, device=tokens.device).long()
                logits.append(
                    self.model(
                        input_ids=tokens[:, :-1],
                        attention_mask=mask,
                        **with_cache(type(self.model).forward, cache_of(first)),
                        use_cache=True,
                    ).logits
                )
        scores = torch.cat(logits, 1).float().log_softmax(-1)[0]
        chosen = scores.gather(1, tokens[0][:, None]).sum()
        return float(chosen), bool((scores.argmax(-1) == tokens[0]).all())
