"""Run a model dense and with candidates: losses, costs and times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.api import Handle, apply, handles
from vtr.compat.around import unwrapped
from vtr.core.calibration import Fingerprint
from vtr.core.method import Method, Reduction, Stage, TokenMethod
from vtr.core.plan import Plan
from vtr.core.site import ModelInfo
from vtr.errors import UnsupportedModelError
from vtr.strategies.batches import OUTSIDE, SearchBatch, digest, read, takes
from vtr.strategies.losses import LABELLED, LOSSES, Rows, check_objective

Tell = Callable[[int, float], None]
"""Called after each batch with its number and the mean loss so far; raises to stop."""

REPEATS = 5  # timed calls, of which the median counts


class Measurement(NamedTuple):
    """A candidate on all the data.

    Attributes:
        loss: mean over samples.
        costs: name of a cost to ``{"dense": ..., "reduced": ..., "share": ...}``.
        kept: visual tokens after each layer of the site that is cut in the last batch; of its largest sample.
    """

    loss: float
    costs: dict[str, dict[str, float]]
    kept: dict[str, Any] = {}


@dataclass(frozen=True, eq=False)
class Observer(TokenMethod):
    """Cuts nothing, and notes how many visual tokens each sample has at the entry of a site."""

    name: ClassVar[str] = "search"
    paper: ClassVar[str] = "vtr.search"
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt", "decoder")

    site: str
    seen: list[int]

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        return {self.site: frozenset()}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage(self.site, 0, cuts=False),)

    def reduce(self, site: Any) -> Reduction | None:
        """Note the numbers of tokens, and cut nothing."""
        self.seen.extend(site.counts.tolist())
        return None


class Runner:
    """A model with data and a loss, on which candidates are measured.

    Attributes:
        info: the model, for methods.
        kind: ``"encoder"``, ``"language"``, ``"pipeline"`` or ``"transformer"``.
        batches: the data.
        objective: name of the loss, or what the callable is called.
        fingerprint: the identity of the model.

    Raises:
        ValueError: the model trains or is wrapped already, the data has another form, or labels are missing.
        UnsupportedModelError: no adapter for the model.
    """

    def __init__(
        self, model: Any, data: Any, method: Method, *, objective: Any = None, seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        check_objective(objective)
        if handles(model):
            raise ValueError("the model is wrapped already; remove its handles before searching")
        if getattr(unwrapped(model), "training", False):
            raise ValueError(
                "the model is in training mode, in which methods act differently: call eval()"
            )
        self.model, self.seed, self.options = model, seed, dict(options or {})
        with apply(model, method, **self.options) as handle:
            wrapping = handle._wrapping
            self.info: ModelInfo = wrapping.info
            self.root: Any = wrapping.root
            self.fingerprint: Fingerprint = wrapping.fingerprint()
            members = getattr(wrapping, "members", [self.root])
        if not self.fingerprint.sha256:
            raise UnsupportedModelError(
                f"the weight {self.fingerprint.weight} is on the meta device, so that the plan could not tell this "
                "model from others: load it without offloading layers (no device_map, or one GPU)"
            )
        self.kind = _kind(self.info, isinstance(unwrapped(model), nn.Module))
        self.batches = read(data, members[0], self.kind, seed)
        sites = {stage.site for stage in method.stages(self.info)}
        self._writes = self.kind == "language" and (
            bool(sites & {"kv", "logits"}) or method.reads_cache
        )
        if self._writes and (callable(objective) or objective == "cosine"):
            raise ValueError(
                f"{method.name} acts while answers are written: the objective must be one of logits"
            )
        if self._writes and any(
            batch.labels is None or batch.labels.dim() != 2 for batch in self.batches
        ):
            raise ValueError(
                f"{method.name} acts while answers are written, so that batches need answers with labels (B, T): "
                "vtr.strategies.answered(model, batches) appends those of the dense model"
            )
        self._given = objective
        self._dense: list[Any] = []
        self.objective = self._name()

    # ---- facts ------------------------------------------------------------------------------

    def sha256(self) -> str:
        """The hash of the data."""
        return digest(self.batches)

    @property
    def samples(self) -> int:
        return sum(batch.samples for batch in self.batches)

    def tokens(self, site: str) -> list[int]:
        """Visual tokens of each sample (each image, for an encoder) at the entry of a site."""
        watcher = Observer(site, [])
        with self._applied(watcher):
            for batch in self.batches:
                self._call(batch)
        return watcher.seen

    def _name(self) -> str:
        given = self._given
        if callable(given):
            return getattr(given, "__name__", type(given).__name__)
        if given is None:
            given = self._default()
        if given in LABELLED and any(batch.labels is None for batch in self.batches):
            raise ValueError(f"objective={given!r} needs labels in every batch")
        return str(given)

    def _default(self) -> str:
        if self.kind in ("pipeline", "transformer"):
            return "relative-error"
        if self.kind == "language":
            return "kl"
        return "kl" if self._classifies() else "cosine"

    def _classifies(self) -> bool:
        """Tell whether the output of an encoder is that of a classifier."""
        classes = getattr(self.root, "num_classes", None)  # timm
        if isinstance(classes, int):
            return classes > 0
        return "ImageClassification" in type(self.root).__name__

    # ---- calls ------------------------------------------------------------------------------

    def evaluate(self, plan: Method | Plan, tell: Tell | None = None) -> Measurement:
        """Measure a candidate on all batches: its loss, and all costs but the latency."""
        if not self._dense:
            with self._quiet():
                self._dense = [self._reference(batch) for batch in self.batches]
        total, seen, costs = 0.0, 0, Costs()
        with self._applied(plan) as handle:
            for number, batch in enumerate(self.batches):
                loss = self._loss(batch, self._output(batch), self._dense[number])
                costs.add(handle, self.kind, batch.samples)
                total, seen = total + loss * batch.samples, seen + batch.samples
                if tell is not None:
                    tell(number, total / seen)
            kept = _schedule(handle)
        return Measurement(total / seen, costs.mean(), kept)

    def cost(self, plan: Method | Plan, everything: bool = False) -> dict[str, dict[str, float]]:
        """Measure the costs of a candidate on all batches, or on one sample. Of prompts it is the batch of the longest
        ones: the text that stays weighs most there, so that all batches together cost no larger share."""
        costs = Costs()
        one = (
            max(self.batches, key=_columns) if self.kind == "language" else self.batches[0].first()
        )
        with self._applied(plan) as handle:
            for batch in self.batches if everything else [one]:
                self._call(batch)
                costs.add(handle, self.kind, batch.samples)
        return costs.mean()

    def watch(self, method: Method) -> None:
        """Run all batches with a method that only looks."""
        with self._applied(method):
            for batch in self.batches:
                self._call(batch)

    def latency(self, plan: Method | Plan) -> dict[str, float]:
        """Time the first batch dense and with a candidate, in turn: milliseconds, the median of 5 calls."""
        batch = self.batches[0]
        times: list[list[float]] = [[], []]
        with self._applied(plan) as handle:
            for turn in range(REPEATS + 1):
                for slot in (0, 1):
                    handle.resume() if slot else handle.pause()
                    start = _now(self.root)
                    self._call(batch)
                    if turn:  # the first calls warm up
                        times[slot].append(_now(self.root) - start)
            handle.resume()
        dense, reduced = (1e3 * statistics.median(t) for t in times)
        return {"dense": dense, "reduced": reduced, "share": reduced / dense}

    @contextmanager
    def learning(self, method: Method) -> Iterator[tuple[Handle, Callable[[int], Tensor]]]:
        """Train a method's modules while the weights of an encoder stay as they are.

        Yields the handle and a function: number of a batch to its loss, a scalar with gradients: the KL divergence to
        the dense model in nats, or the cross-entropy if the objective needs labels. The model is in training
        mode inside the block.
        """
        devices = [self._device] if self._device.type == "cuda" else []
        learns = [p for p in self.root.parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(self.seed)
            with torch.no_grad():
                dense = [_tensor(self._call(b), OUTPUTS[self.kind]).double() for b in self.batches]
            try:
                for p in learns:
                    p.requires_grad_(False)
                with apply(self.model, method, **self.options) as handle:
                    self.root.train()

                    def loss(number: int) -> Tensor:
                        batch = self.batches[number]
                        out = _tensor(self._call(batch), OUTPUTS[self.kind]).double()
                        if self.objective in LABELLED:
                            assert batch.labels is not None
                            return F.cross_entropy(out, batch.labels.to(out.device))
                        p, q = dense[number].log_softmax(-1), out.log_softmax(-1)
                        return (p.exp() * (p - q)).sum(-1).mean()

                    yield handle, loss
            finally:
                self.root.eval()
                for p in learns:
                    p.requires_grad_(True)

    @contextmanager
    def _applied(self, plan: Any) -> Iterator[Handle]:
        with self._quiet(), apply(self.model, plan, **self.options) as handle:
            yield handle

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """No gradients, and random numbers that are those of the seed; the caller's stay as they were."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(self.seed)
            yield

    @property
    def _device(self) -> torch.device:
        return next(self.root.parameters()).device  # type: ignore[no-any-return]

    def _call(self, batch: SearchBatch) -> Any:
        batch.rewind()
        if self._writes:
            return self._written(batch)
        kwargs = dict(batch.kwargs)
        if (
            self.kind == "language"
            and takes(self.root, "logits_to_keep")
            and not callable(self._given)
        ):
            kwargs["logits_to_keep"] = columns(batch)
        return self.model(*batch.args, **kwargs)

    def _written(self, batch: SearchBatch) -> Tensor:
        """Let the model write the answers of a batch with its KV cache, which the method acts on; returns the logits
        (B, K, V) of the last K columns."""
        count = columns(batch)
        ids = batch.kwargs["input_ids"]
        prompt = {
            name: v[:, : ids.shape[1] - count + 1] if getattr(v, "shape", None) == ids.shape else v
            for name, v in batch.kwargs.items()
        }
        out = self.model.generate(
            **prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, output_logits=True,
            return_dict_in_generate=True, logits_processor=[_Dictated(ids)],
        )  # fmt: skip
        return torch.stack(out.logits, 1)

    def _output(self, batch: SearchBatch) -> Any:
        """Call the model; returns what the loss compares: its output, or the last hidden states of a VLM."""
        if self.kind != "language" or self.objective != "cosine":
            return self._call(batch)
        seen: list[Tensor] = []
        head = self.root.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self._call(batch)
        finally:
            hook.remove()
        return seen[-1]

    # ---- losses -----------------------------------------------------------------------------

    def _reference(self, batch: SearchBatch) -> Any:
        out = self._output(batch)
        return self._asked(batch, out) if callable(self._given) else self._rows(batch, out)

    def _asked(self, batch: SearchBatch, out: Any) -> float:
        return float(torch.as_tensor(self._given(out, batch.given)).double().mean())

    def _loss(self, batch: SearchBatch, out: Any, dense: Any) -> float:
        if callable(self._given):
            return self._asked(batch, out) - float(dense)
        return float(LOSSES[self.objective](self._rows(batch, out), dense).mean())

    def _rows(self, batch: SearchBatch, out: Any) -> Rows:
        if self.kind == "language":
            return language_rows(batch, _tensor(out, ("logits",)))
        values = _tensor(out, OUTPUTS[self.kind])
        if self.kind == "encoder" and values.dim() > 2:
            values = values.flatten(1)
        values = values.flatten(1).float().cpu()
        labels = None if self.objective not in LABELLED else batch.labels
        return Rows(values, torch.arange(len(values)), labels, len(values))


class _Dictated:
    """Makes generate write the tokens of given sequences (B, T), whatever the logits are."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, written: Tensor, scores: Tensor) -> Tensor:
        place = min(written.shape[1], self.ids.shape[1] - 1)
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.ids[:, place, None].to(scores.device), 0.0)


OUTPUTS = {
    "encoder": ("logits", "pooler_output", "image_embeds", "last_hidden_state"),
    "pipeline": ("frames", "images"),
    "transformer": ("sample",),
}
"""Names under which outputs have what a loss compares, the first that is there."""


class Costs:
    """Sums of the costs of calls."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.samples = 0

    def add(self, handle: Handle, kind: str, samples: int) -> None:
        """Add the last call of a wrapped model."""
        report = handle.report()
        found: dict[str, tuple[float, float]] = {}
        parts = dict(report.flops)
        if kind in ("pipeline", "transformer"):
            wanted = "this run" if kind == "pipeline" else "last call"
            parts = {name: pair for name, pair in parts.items() if wanted in name}
        found["flops"] = (sum(d for d, _ in parts.values()), sum(r for _, r in parts.values()))
        tokens = _mean_tokens(handle)
        if tokens is not None:
            found["tokens"] = tokens
        if report.cache is not None:
            found["kv"] = (report.cache.full / samples, report.cache.bytes / samples)
        elif report.kv_bytes is not None:
            found["kv"] = report.kv_bytes
        for name, pair in found.items():
            held = self.sums.setdefault(name, [0.0, 0.0])
            held[0] += pair[0] * samples
            held[1] += pair[1] * samples
        self.samples += samples

    def mean(self) -> dict[str, dict[str, float]]:
        """The costs of a sample, dense and reduced, and the share."""
        return {
            name: {
                "dense": d / self.samples,
                "reduced": r / self.samples,
                "share": r / max(d, 1e-30),
            }
            for name, (d, r) in self.sums.items()
        }


def _schedule(handle: Handle) -> dict[str, Any]:
    """The visual tokens of the last call after each layer of the site that is cut; empty if none is."""
    trace = handle.trace
    site = "decoder" if trace.tokens.get("decoder") else "encoder"
    counts = trace.tokens.get(site)
    if not counts:
        return {}
    cut = [s for s in trace.stages if s.site in (site, "prompt" if site == "decoder" else "image")]
    whole = cut[0].tokens_in if cut else counts[min(counts)][0]
    return {
        "site": site,
        "tokens": whole,
        "kept": [after for _, (_, after) in sorted(counts.items())],
    }


def _mean_tokens(handle: Handle) -> tuple[float, float] | None:
    """Visual tokens dense and reduced, mean over the layers of the site that is cut."""
    found = _schedule(handle)
    return (float(found["tokens"]), statistics.fmean(found["kept"])) if found else None


def _kind(info: ModelInfo, module: bool) -> str:
    if "denoising" in info.signals.get("attention", ()):
        return "transformer" if module else "pipeline"
    return "language" if info.language is not None else "encoder"


def _tensor(out: Any, names: tuple[str, ...]) -> Tensor:
    if isinstance(out, Tensor):
        return out
    for name in names:
        value = getattr(out, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        return out[0]
    raise ValueError(
        f"the model returned a {type(out).__name__}, in which there is no tensor to compare "
        f"({', '.join(names)}): give an objective(output, batch)"
    )


def _columns(batch: SearchBatch) -> float:
    """The mean number of columns of a batch's prompts, without padding."""
    ids, mask = batch.kwargs.get("input_ids"), batch.kwargs.get("attention_mask")
    if mask is not None:
        return float(mask.sum() / len(mask))
    return 0.0 if ids is None else float(ids.shape[1])


def _now(root: nn.Module) -> float:
    device = next(root.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- rows of a prompt ---------------------------------------------------------------------------


def places(batch: SearchBatch) -> tuple[Tensor, Tensor]:
    """Sample and column of the logits that are compared: before each label, or the last token's."""
    ids = batch.kwargs["input_ids"]
    labels = batch.labels
    if labels is not None and labels.dim() == 2:
        sample, column = (labels[:, 1:] != OUTSIDE).nonzero(as_tuple=True)
        return sample, column
    mask = batch.kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    place = torch.arange(ids.shape[1])
    return torch.arange(len(ids)), (mask.cpu().bool() * place).amax(1)


def columns(batch: SearchBatch) -> int:
    """Columns at the end of the prompt that hold all the compared logits."""
    return int(batch.kwargs["input_ids"].shape[1] - places(batch)[1].min())


def language_rows(batch: SearchBatch, logits: Tensor) -> Rows:
    """Take the logits of a prompt that are compared; ``logits`` (B, K, V) are those of the last K columns.

    With labels (B, T) they are those that predict a label; else that of the last token of each prompt.
    """
    sample, column = places(batch)
    first = batch.kwargs["input_ids"].shape[1] - logits.shape[1]
    values = logits[sample.to(logits.device), (column - first).to(logits.device)].float().cpu()
    labels = batch.labels
    if labels is not None:
        labels = labels[sample, column + 1] if labels.dim() == 2 else labels[sample]
    return Rows(values, sample, labels, len(logits))
