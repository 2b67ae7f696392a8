"""The comparison of masks on the built-in generator: its baselines, its numbers and its page."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

import vtr
from recipes import diffusion_cards, evaluate_wan, mask_pictures, wan_plot, wan_report
from recipes.evaluate_wan import Nearest, Top
from recipes.wan_methods import RunTime, Searched, mean_density, run_time, search
from vtr.core.registry import registry
from vtr.evaluate import digit_judge
from vtr.evaluate.generator import measure
from vtr.methods.base import DynamicAttention
from vtr.zoo import wan


@pytest.fixture(scope="module")
def pipe():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = wan.pipeline(wan.build().eval())
    made.set_progress_bar_config(disable=True)
    return made


def mask_of(pipe, method):
    with vtr.apply(pipe, method) as handle:
        pipe("7 right", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
        return handle.trace.notes["attention"][0]["mask"].to_dense(blocks=True)


def test_the_radial_order_takes_own_rows_first_and_thins_out_with_distance(pipe):
    live = mask_of(pipe, Nearest(density=0.25, block=16))
    assert live.shape == (40, 40) and (live.sum(1) == 10).all() and live.diagonal().all()
    by_frame = live.view(5, 8, 5, 8).sum((1, 3)).float()
    assert by_frame[0, 0] > by_frame[0, 1] > by_frame[0, 2] > by_frame[0, 4]


def test_the_own_frame_is_all_that_own_frame_sees(pipe):
    whole = mask_of(pipe, Nearest(density=0.5, order="frame", block=16))
    assert torch.equal(whole, torch.block_diag(*[torch.ones(8, 8)] * 5).bool())
    window = mask_of(pipe, Nearest(density=0.125, order="frame", block=16))
    assert (window.sum(1) == 5).all() and (window <= whole).all()


def test_the_nearest_blocks_want_whole_blocks():
    with pytest.raises(ValueError, match="no multiple of 128"):
        Nearest(block=128).grid_mask((5, 8, 10))


def test_the_top_of_the_dense_map_is_the_blocks_with_the_most_attention():
    q, k, v = torch.randn(3, 2, 3, 48, 8, generator=torch.Generator().manual_seed(0)) * 2
    said = []
    site = SimpleNamespace(q=q, k=k, v=v, scale=0.5, count=said.append)
    share = (q @ k.mT * 0.5).softmax(-1)
    mass = share.view(2, 3, 3, 16, 3, 16).sum((3, 5))
    seen = torch.zeros(2, 3, 48, 48)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)):
        b, h, row = index.tolist()
        for column in mass[b, h, row].argsort(descending=True)[:2].tolist():
            seen[b, h, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 1
    expected = (share * seen) @ v / (share * seen).sum(-1, keepdim=True)
    out = Top(density=0.67, block=16).attend(site)
    torch.testing.assert_close(out, expected)
    assert float(said[0]) == pytest.approx(2 / 3)
    torch.testing.assert_close(Top(density=1.0, block=16).attend(site), share @ v)


def test_every_case_is_a_method_of_about_its_density(pipe):
    with_density = []
    for case in evaluate_wan.cases(0.5, (0.25,)):
        assert case.method.block == 16 and case.method.dense_steps == 0.5
        row, videos = measure(pipe, case.method, 2, None, steps=2)
        assert videos.shape == (2, 1, 5, 16, 32) and videos.isfinite().all()
        assert 0.19 <= row["density"] <= 0.3, case
        if "Re-ttention" not in case.label:  # whose second step is a dense refresh
            assert row["work"] == pytest.approx((1 + row["density"]) / 2, abs=0.01), case
        with_density.append(case.label)
    assert len(set(with_density)) == 8


ROW = {
    "density": 0.5, "work": 0.7, "digit": 0.9, "per_frame": 0.8, "agreement": 0.9,
    "direction": 0.9, "halfway": 0.9, "psnr": None, "seconds": 0.5,
}  # fmt: skip


def test_the_page_says_how_much_of_the_loss_comes_back(tmp_path):
    dense = {"attention": "dense", "target": 1.0, "dense_steps": 1.0, **ROW}
    bare = {**dense, "attention": "radial", "target": 0.5, "dense_steps": 0.2, "psnr": 15.0}
    bare |= {"digit": 0.5, "direction": 0.88}
    back = {**bare, "attention": "Re-ttention of it", "digit": 0.7, "direction": 0.9, "psnr": 18.0}
    lines = wan_report.recovered([bare, back], dense)
    assert lines == [
        "- Re-ttention at 0.5: digit 50% to 70% (50% of what the mask lost), direction 88% to 90%, "
        "PSNR +3.0 dB."
    ]
    sheets = {"dense": torch.zeros(2, 1, 5, 16, 32), "radial 0.5 0.2": torch.ones(2, 1, 5, 16, 32)}
    verdict = digit_judge.Verdict(1.0, 1.0, 1.0, 1.0, 1.0)._asdict()
    wan_report.write(tmp_path / "page", [dense, bare, back], sheets, verdict, 100)
    assert json.loads((tmp_path / "page.json").read_text())["rows"][1] == bare
    page = (tmp_path / "page.md").read_text()
    assert lines[0] in page and "| radial | 0.50 | 0.70 | 50 %" in page
    assert (tmp_path / "page.png").stat().st_size > 500


# ---- methods that choose at run time -------------------------------------------------------------


def test_every_method_chosen_at_run_time_keeps_about_its_density(pipe):
    seen = []
    for case in run_time(0.5, (0.25,)):
        if case.searched is None:
            row, _ = measure(pipe, case.method, 1, None, steps=4)
            assert 0.22 <= row["density"] <= 0.27, case
        else:
            option, ends = case.searched.option, (case.searched.at(0.0), case.searched.at(1.0))
            methods = [case.method.replace(**{option: end}) for end in ends]
            low, high = (measure(pipe, m, 1, None, steps=4)[0]["density"] for m in methods)
            assert low < 0.6 < 0.9 < high, case
        seen.append(case.label)
    assert seen == [
        "AdaSpa", "LiteAttention", "SVG2", "SpargeAttn", "XAttentionDiT", "DraftAttention", "Jenga",
        "VSA, untrained", "ToDo",
    ]  # fmt: skip
    assert "LiteAttention" not in [case.label for case in run_time(0.2, (0.125,))]


@dataclasses.dataclass(frozen=True)
class Knob:
    """Stands in for a method with one option."""

    p: float = 0.0

    def replace(self, p):
        return Knob(p)


def test_a_search_finds_the_value_of_the_density():
    """Work is 0.2 + 0.8 density: a fifth of the steps is dense."""
    asked = []

    def work(method):
        asked.append(method.p)
        return 0.2 + 0.8 * method.p**2

    case = RunTime("knob", 0.25, Knob(), Searched("p", 0.0, 1.0))
    assert search(case, 0.2, work) == Knob(0.5)
    assert asked == [0.0, 0.5]
    case = RunTime("knob", 0.33, Knob(), Searched("p", 0.0, 1.0))
    assert abs(search(case, 0.2, work).p ** 2 - 0.33) < 0.01
    # The sparsest value keeps more than was asked for.
    case = RunTime("knob", 0.1, Knob(), Searched("p", 0.5, 1.0))
    asked.clear()
    assert search(case, 0.2, work) == Knob(0.5)
    assert asked == [0.5]
    falling = RunTime("knob", 0.25, Knob(), Searched("p", -1.0, -0.1))
    assert search(falling, 0.2, lambda m: 0.2 + 0.8 * (1 + m.p)).p == pytest.approx(-0.75, abs=0.02)
    assert mean_density(0.4, 0.2) == pytest.approx(0.25)


def test_rows_are_written_one_by_one_and_not_run_again(pipe, tmp_path, monkeypatch, capsys):
    ran = []

    def measured(pipe, method, n, reference, **_):
        ran.append("dense" if method is None else method.name)
        return dict(ROW, psnr=None if reference is None else 12.0), torch.zeros(n, 1, 5, 16, 32)

    monkeypatch.setattr(evaluate_wan, "measure", measured)
    monkeypatch.setattr("vtr.zoo.load_pipeline", lambda *_: pipe)
    sure = digit_judge.Verdict(1.0, 1.0, 1.0, 1.0, 1.0)
    monkeypatch.setattr(digit_judge, "accuracy", lambda: sure)
    page = tmp_path / "page"
    old = {"attention": "random", "target": 0.25, "dense_steps": 0.2, **ROW, "psnr": 9.0}
    dense = {"attention": "dense", "target": 1.0, "dense_steps": 1.0, **ROW}
    page.with_suffix(".json").write_text(
        json.dumps({"judge": {}, "videos": 12, "rows": [dense, old]})
    )
    common = [
        "--sparse", "--videos", "12", "--densities", "0.25", "--dense-steps", "0.2", "--results",
        str(tmp_path / "rows"), "--out", str(page),
    ]  # fmt: skip
    evaluate_wan.main([*common, "--only", "radial", "random 0.25", "Jenga"])
    assert ran == ["dense", "nearest", "jenga"]
    assert "not run yet: " in capsys.readouterr().out
    evaluate_wan.main([*common, "--only", "radial", "random 0.25", "Jenga", "ToDo"])
    assert ran[3:] == ["todo"]  # the reference is in the folder, too
    names = [job.label for job in evaluate_wan.jobs((0.2,), (0.25,))]
    ran.clear()
    for part in ("1/2", "2/2"):
        evaluate_wan.main([*common, "--part", part])
    assert {"random-sparse", "jenga", "todo"}.isdisjoint(ran)
    assert ran.count("adaspa") == 1
    ran.clear()
    evaluate_wan.main([*common, "--collect"])
    assert ran == []
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    assert [row["attention"] for row in rows] == ["dense", *names]
    assert next(row for row in rows if row["attention"] == "random")["psnr"] == 9.0
    assert "threshold" in next(r for r in rows if r["attention"] == "LiteAttention")["searched"]
    # The dense row is of the earlier page, whose picture stays.
    assert (tmp_path / "page-chosen.png").stat().st_size > 500
    assert "(page-chosen.png)" in page.with_suffix(".md").read_text()
    with pytest.raises(SystemExit):
        evaluate_wan.main([*common, "--part", "3/2"])
    assert "a part is a number and a count" in capsys.readouterr().err


# ---- the plot and the cards -----------------------------------------------------------------------


def test_lines_of_the_plot_differ(tmp_path):
    rows = json.loads(diffusion_cards.NUMBERS.read_text())["rows"]
    labels = list(dict.fromkeys(row["attention"] for row in rows[1:]))
    looks = wan_plot.styles([*labels, "SLA, fine-tuned"])
    assert len({tuple(sorted(look.items())) for look in looks.values()}) == len(looks)
    assert looks["SLA, fine-tuned"]["ls"] == "-."
    assert [wan_plot.kind(x) for x in ("random", "radial", "Jenga")] == [
        "bound",
        "static",
        "chosen",
    ]
    wan_plot.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_cards_are_current():
    rows = json.loads(diffusion_cards.NUMBERS.read_text())["rows"]
    text = diffusion_cards.PAGE.read_text()
    assert diffusion_cards.page(text, rows) == text, "run python -m recipes.diffusion_cards"
    with pytest.raises(ValueError, match="has no lines"):
        diffusion_cards.page("no cards", rows)
    table = diffusion_cards.numbers(diffusion_cards.CARDS[0], [])
    assert table == ["No row in the comparison.", ""]


def test_every_run_time_method_has_a_card():
    named = {name for card in diffusion_cards.CARDS for name in card.name.split(", ")}
    assert all(hasattr(vtr, name) for name in named)
    chosen = {cls.__name__ for cls in registry().values() if issubclass(cls, DynamicAttention)}
    assert chosen <= named
    pictures = {card.picture for card in diffusion_cards.CARDS if card.picture}
    assert pictures == set(mask_pictures.methods())
    folder = diffusion_cards.PAGE.with_name("masks")
    assert pictures == {path.stem for path in folder.glob("*.png")}


def test_the_pictures_of_masks_are_current():
    """One of them, drawn again: a quarter of the blocks in every row."""
    shares = mask_pictures.live(mask_pictures.methods()["rectified"])
    assert shares.shape == (40, 40)
    assert set(np.unique(shares)) == {0.0, 1.0}
    assert (shares.sum(1) == 10).all()
    drawn = np.asarray(mask_pictures.picture(shares).convert("L")).astype(int)
    path = diffusion_cards.PAGE.with_name("masks") / "rectified.png"
    held = np.asarray(Image.open(path).convert("L")).astype(int)
    assert drawn.shape == held.shape == (202, 202)
    assert (np.abs(drawn - held) < 8).mean() > 0.95
