"""The model that lmms-eval calls: a transformers vision-language model with a method applied.

``lmms_eval --model vtr --model_args pretrained=ID,method=flowcut,keep=64 --tasks gqa`` creates one through
its entry point; :mod:`vtr.evaluate.runner` keeps one and changes its cell between evaluations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from vtr.compat.lmms_eval import pads
from vtr.compat.lmms_eval import place as location
from vtr.core.version import VERSION
from vtr.evaluate.answering import Answerer, Work, explain
from vtr.evaluate.cells import DRAWS, Cell, as_methods, parse_keeps, sweep
from vtr.evaluate.fingerprint import file_hash, fingerprint
from vtr.evaluate.launch import join, place, ranks
from vtr.evaluate.prompts import prompt_of
from vtr.evaluate.store import Store, StoredAnswer
from vtr.zoo import loading

AUTO = {"cuda": 64, "cpu": 32}  # where an automatic batch size begins

_NAMES = "pretrained, method, keep, positions, seed, dtype, store, frames, retry_errors, batch_size, device"


class VTRChat(lmms):
    """A reduced model as lmms-eval's chat model.

    Args:
        pretrained: ``"builtin"``, a folder, or an id of the Hugging Face hub.
        method: name, ``name:option=value;option=value``, a dict, a method, or None for the dense
            model.
        keep: the method's budget.
        positions: of tokens after a cut, as in :func:`vtr.apply`; None is the built-in model's
            ``"original"``, else each method's own choice.
        seed: of methods that draw random tokens, and of answers that are drawn.
        batch_size: a number, or ``"auto"``: halved whenever memory runs out.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None takes a GPU if there is one.
        dtype: ``"auto"`` (as stored; float32 for the built-in model), or a name.
        store: a results store or the path of one; answers in it are not asked for again.
        frames: of a video.
        retry_errors: ask again if the store holds an error.
        max_batch_size: taken and ignored, because lmms-eval passes it.

    Raises:
        ValueError: an argument that does not exist, or a value that makes no sense.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | loading.VlmReference = "builtin",
        method: Any = None,
        keep: Any = None,
        positions: str | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        store: str | Path | Store | None = None,
        frames: int = 8,
        retry_errors: bool = False,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(
                f"unknown model_args {', '.join(sorted(unknown))}; there are: {_NAMES}"
            )
        if dtype not in loading.DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(loading.DTYPES)}, got {dtype!r}")
        cell = one_cell(method, keep, seed)
        self._rank, self._world_size = ranks()
        self._device = place(device, self._rank)
        self.ref = loading.find_vlm(pretrained) if isinstance(pretrained, str) else pretrained
        self.positions = self.ref.positions if positions is None else positions
        model, processor = loading.load_found(self.ref, self._device, dtype)
        self.fingerprint = fingerprint(model, processor)
        # Not an attribute that is a module: lmms-eval's clean() would delete it.
        self._answerer = Answerer(
            model,
            processor,
            positions=self.positions,
            size=AUTO.get(self._device.split(":")[0], 32)
            if batch_size == "auto"
            else _size(batch_size),
            adapts=batch_size == "auto",
            frames=frames,
            seed=seed,
        )
        self.retry_errors = retry_errors
        self.accelerator = join(self._device)  # lmms-eval asks for it
        self.store = store if isinstance(store, Store) else Store(store)
        self.made: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        self.use(cell)

    # ---- the cell ---------------------------------------------------------------------------

    @property
    def device(self) -> Any:
        """The device of this process's tensors, on which lmms-eval counts samples."""
        import torch

        return torch.device(self._device)

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._answerer.model

    @property
    def processor(self) -> Any:
        return self._answerer.processor

    @property
    def cell(self) -> Cell:
        return self._cell

    @property
    def new(self) -> int:
        """Number of answers generated since :meth:`use`; ``made`` has them per task."""
        return self.made.total()

    @property
    def reused(self) -> int:
        """Number of answers taken from the store since :meth:`use`; ``taken`` has them per task."""
        return self.taken.total()

    @property
    def cell_name(self) -> str:
        """Name of the cell in the store."""
        return self._cell_name

    def use(self, cell: Cell) -> str:
        """Answer as another cell from now on; returns its name in the store.

        Raises:
            UnsupportedMethodError, ValueError: a method cannot work on this model.
        """
        self._answerer.check(cell)
        self._cell = cell
        self._cell_name = self.store.cell(self.describe(cell))
        self.made, self.taken = Counter(), Counter()
        return self._cell_name

    def describe(self, cell: Cell) -> dict[str, Any]:
        """Everything that determines an answer besides the sample."""
        from importlib.metadata import version

        import transformers

        described: dict[str, Any] = {
            "model": self.fingerprint,
            "name": type(self.model).__name__,
            **cell.to_dict(),
            "vtr": VERSION,
            "lmms_eval": version("lmms_eval"),
            "transformers": transformers.__version__,
            "device": self._device.split(":")[0],
        }
        if cell.methods:
            described["positions"] = self.positions
        trained = [str(path) for m in cell.methods if (path := getattr(m, "weights", None))]
        files = {path: file_hash(path) for path in trained if Path(path).is_file()}
        if files:  # modules that a method brings: a path does not say what lies there
            described["weights"] = files
        return described

    # ---- what lmms-eval calls ---------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, in their order; answers in the store are not generated again.

        A request that only fills up a shorter process's list gets an empty answer. A sample that raises
        is recorded with its error and gets an empty answer.
        """
        results: list[Any] = [GenerationResult("", None)] * len(requests)
        stored: dict[str, dict[tuple[int, int], StoredAnswer]] = {}
        waiting: list[Work] = []
        for slot, request in enumerate(requests):
            if pads(request):
                continue
            work = self._work(slot, request, stored, results)
            if work is not None:
                waiting.append(work)
            if len(waiting) >= self._window:
                self._answer(waiting, results)
                waiting = []
        self._answer(waiting, results)
        return results

    @property
    def _window(self) -> int:
        """Prompts held at a time: whole batches of every draw, and not the pictures of a whole task."""
        return self._answerer.size * (DRAWS if self._cell.seed is not None else 4)

    def _work(
        self,
        slot: int,
        request: Any,
        stored: dict[str, dict[tuple[int, int], StoredAnswer]],
        results: list[Any],
    ) -> Work | None:
        """Return what is to be asked; None if the answer is known, or the question cannot be put."""
        doc, task, _ = location(request)
        if task not in stored:
            stored[task] = self.store.rows(self._cell_name, task)
        idx = int(request.idx or 0)
        try:
            answerer = self._answerer
            prompt = prompt_of(request, self.task_dict, answerer.frames).drawn_with(answerer.seed)
        except Exception as error:
            self.store.put(
                self._cell_name, task, [StoredAnswer(doc, idx, "", "", error=explain(error))]
            )
            self.made[task] += 1
            return None
        row = stored[task].get((doc, idx))
        if row is None or row.prompt != prompt.key or (row.error and self.retry_errors):
            return Work(slot, task, doc, idx, prompt)
        self.taken[task] += 1
        results[slot] = _result(row)
        return None

    def _answer(self, works: list[Work], results: list[Any]) -> None:
        for done in self._answerer.answers(works, self._cell):
            for task in dict.fromkeys(work.task for work, _ in done):
                self.store.put(self._cell_name, task, [r for w, r in done if w.task == task])
            for work, row in done:
                results[work.slot] = _result(row)
            self.made.update(work.task for work, _ in done)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError(
            "the model vtr answers single questions; tasks of several rounds are not supported"
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "likelihoods need the simple class of the model vtr: lmms_eval ... --force_simple"
        )

    def clean(self) -> None:
        """Keep the model: the next evaluation of a sweep needs it."""

    def close(self) -> None:
        """Close the store."""
        self.store.close()


def one_cell(method: Any, keep: Any, seed: int) -> Cell:
    """Create the cell of a single method from model arguments."""
    if isinstance(method, str):
        method = method.replace(";", ",")
    methods = as_methods(method)
    keeps = parse_keeps(keep if keep is None or isinstance(keep, str) else [keep])
    if len(methods) > 1 or len(keeps) > 1:
        raise ValueError("give one method and one keep; several are a sweep: vtr eval")
    if keeps and not any(methods):
        raise ValueError("keep= is the budget of a method: give method= as well")
    return sweep(methods, keeps, (seed,), dense=not methods)[0]


def _size(batch_size: int | str) -> int:
    try:
        size = int(batch_size)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size must be a number >= 1 or 'auto', got {batch_size!r}")
    return size


def _result(row: StoredAnswer) -> Any:
    counts = TokenCounts(input_tokens=row.prompt_tokens, output_tokens=row.new_tokens)
    return cast(Any, GenerationResult(row.answer, counts))
