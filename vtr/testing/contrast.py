"""Laws of methods that contrast the logits while text is generated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.core.method import Method
from vtr.methods.common.contrast import ContrastMethod
from vtr.testing.trial import Inputs, Trial, close, equal


def contrasts(method: type[Method] | Method) -> bool:
    """Tell whether a method contrasts logits."""
    return issubclass(method if isinstance(method, type) else type(method), ContrastMethod)


def nothing(trial: Trial) -> None:
    """With alpha 0 the model is left as it is, bit by bit, also in sampling."""
    native = _generate(trial, None, trial.batch, do_sample=True)
    for method in trial.settings.everything:
        equal(trial.run(method, trial.batch).out, trial.native, str(method))
        found = _generate(trial, method, trial.batch, do_sample=True)
        equal(found.sequences, native.sequences, f"{method}: the sample")
        equal(torch.stack(found.scores, 1), torch.stack(native.scores, 1), f"{method}: the scores")


def best(trial: Trial) -> None:
    """With beta 1 the most probable token of the model alone is plausible."""
    found = _generate(trial, _with(trial, beta=1.0), trial.batch)
    wanted = _generate(trial, _with(trial, alpha=0.0), trial.batch)
    equal(found.sequences, wanted.sequences, "the greedy answer")


def alone(trial: Trial) -> None:
    """A sample alone equals the sample in a padded batch of two, and of eight: every score of every step."""
    samples = trial.kind.samples
    method = _with(trial, beta=0.0)
    own = [_generate(trial, method, sample) for sample in samples]
    for times in (1, 4):
        both = _generate(trial, method, trial.kind.batch(samples * times, "left"))
        for b in range(len(samples) * times):
            what = f"sample {b} of {len(samples) * times}"
            row = torch.stack(both.scores, 1)[b]
            close(row, torch.stack(own[b % len(samples)].scores, 1)[0], trial.kind.tolerance, what)


def outside(trial: Trial) -> None:
    """A call outside of generate is that of the model, also between two answers."""
    model, batch = trial.kind.model, trial.batch
    with torch.no_grad():
        wanted = trial.kind.forward(model, batch)
    with trial.applied(trial.method), torch.no_grad():
        equal(trial.kind.forward(model, batch), wanted, "the call before an answer")
        first = trial.call(batch)
        equal(trial.kind.forward(model, batch), wanted, "the call after an answer")
        equal(trial.call(batch), first, "the second answer")


def beams(trial: Trial) -> None:
    """The score of a beam is that of its text, token by token: the mean over its contrasted log-probabilities."""
    method = _with(trial, beta=0.0)
    sample = trial.kind.samples[0]
    options = {"num_beams": 3, "num_return_sequences": 3}
    found = _generate(trial, method, trial.batch, **options)
    start = trial.batch["input_ids"].shape[1]
    for score, text in zip(found.sequences_scores[:3], found.sequences[:3, start:], strict=True):
        follow = _Follow(text.tolist())
        _generate(trial, method, sample, logits_processor=[follow])
        wanted = torch.stack(follow.seen).mean()
        close(score, wanted, trial.kind.tolerance, f"the beam {text.tolist()}")


def reduces(trial: Trial) -> bool:
    """Tell whether the method changes the scores of the batch."""
    found, native = (_generate(trial, m, trial.batch) for m in (trial.method, None))
    return not torch.equal(found.scores[0], native.scores[0])


class _Follow:
    """A logits processor that lets generate write a given text, and remembers the scores that it was given."""

    def __init__(self, text: list[int]) -> None:
        self.text = text
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.text[len(self.seen)]
        self.seen.append(scores.log_softmax(-1)[0, token])
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([token]), 0.0)


def _generate(trial: Trial, method: Method | None, inputs: Inputs, **options: Any) -> Any:
    torch.manual_seed(7)
    given = {"max_new_tokens": 3, "do_sample": False, **options}

    def run() -> Any:
        return trial.kind.model.generate(
            **inputs, **given, output_scores=True, return_dict_in_generate=True
        )

    if method is None:
        return run()
    with trial.applied(method):
        return run()


def _with(trial: Trial, **options: Any) -> Method:
    return trial.method.replace(**options)
