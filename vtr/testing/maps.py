"""Checks that every token map, record and trace passes."""

from __future__ import annotations

from torch import Tensor

from vtr.core.tokens import TokenMap
from vtr.core.trace import StageRecord, Trace
from vtr.testing.trial import require


def check_map(map: TokenMap, valid: Tensor | None = None) -> None:
    """Check a map: kept indices ascend, are unique and in range; every token is accounted for.

    Args:
        map: of B samples.
        valid: (B, N_in) bool, False for padding in front of the map, which no slot may hold; or None.

    Raises:
        AssertionError: a sample, and what is wrong with it.
    """
    sources, rows, sizes = map.source.tolist(), map.kept.tolist(), map.size.tolist()
    for b, (source, row, size) in enumerate(zip(sources, rows, sizes, strict=True)):
        kept = [j for j in row if j >= 0]
        where = f"sample {b} keeps {kept}"
        require(row[len(kept) :] == [-1] * (len(row) - len(kept)), f"{where}: padding comes last")
        require(all(0 <= j < map.n_in for j in kept), f"{where}, of {map.n_in} tokens")
        require(kept == sorted(set(kept)), f"{where}: not ascending, or one of them twice")
        require(
            all(source[j] == slot for slot, j in enumerate(kept)),
            f"{where}: a representative is not in its own slot",
        )
        require(
            all(-1 <= slot < len(kept) for slot in source),
            f"{where}: a token went to a slot that does not exist",
        )
        require(
            all(n == 0 for n in size[len(kept) :]), f"{where}: padding slots have the sizes {size}"
        )
        if valid is not None:
            padding = [j for j in kept if not valid[b, j]]
            require(not padding, f"sample {b} keeps the padding {padding}")


def check_mass(map: TokenMap) -> None:
    """Check that a map from the model's input counts every token that went into a slot, once."""
    for b, (source, size) in enumerate(zip(map.source.tolist(), map.size.tolist(), strict=True)):
        stands = sum(1 for slot in source if slot >= 0)
        require(
            sum(size) == stands,
            f"the slots of sample {b} count {sum(size):g} tokens; {stands} of {map.n_in} went into one",
        )


def check_record(record: StageRecord, valid: Tensor | None = None) -> None:
    """Check the maps of one stage, and that its counts are theirs."""
    check_map(record.map, valid)
    check_map(record.total)
    check_mass(record.total)
    sizes = (record.tokens_out, record.map.n_out, record.total.n_out)
    require(len(set(sizes)) == 1, f"tokens_out, and the slots of map and total, are {sizes}")
    frozen = record.total.frozen
    if frozen is not None:
        for b in range(record.total.batch):
            active = {j for j in record.total.kept[b].tolist() if j >= 0}
            away = set(frozen[b].nonzero()[:, 0].tolist())
            require(
                not active & away and len(active | away) == record.total.n_in,
                f"sample {b}: a token is neither active nor frozen, or both",
            )


def check_trace(trace: Trace, rows: tuple[str, ...]) -> None:
    """Check all records of a trace, and that those of sites with one row per sample follow each other."""
    before: StageRecord | None = None
    for record in trace.stages:
        check_record(record)
        if record.site not in rows:
            continue
        if before is not None and record.map.n_in != before.total.n_in:
            require(
                record.tokens_in == before.tokens_out == record.map.n_in,
                f"{record.site}[{record.layer}] starts with {record.tokens_in} tokens, and "
                f"{before.tokens_out} were left",
            )
            both = before.total.then(record.map)
            require(
                both.kept.equal(record.total.kept) and both.source.equal(record.total.source),
                f"the total map of {record.site}[{record.layer}] is not that of the stages one after "
                "the other",
            )
        before = record
