"""Options of the methods for diffusion by position: the one that says how much, and no other."""

from __future__ import annotations

import dataclasses

import pytest

from vtr.core.method import TokenMethod
from vtr.core.registry import registry
from vtr.methods.common.schedule import Scheduled

LEAD = {
    "adaspa": ("density", 0.5),
    "draft-attention": ("density", 0.5),
    "jenga": ("drop", 0.5),
    "liteattention": ("threshold", -3.0),
    "neighborhood": ("window", (3, 3, 3)),
    "optiprune": ("ratio", 0.25),
    "own-frame": ("radius", 2),
    "radial": ("decay", 0.5),
    "random-sparse": ("density", 0.5),
    "rectified-sparse": ("drop", 0.5),
    "rettention": ("density", 0.5),
    "searched-tile": ("density", 0.5),
    "sito": ("ratio", 0.25),
    "sla": ("density", 0.5),
    "sliding-tile": ("window", 9),
    "spargeattn": ("density", 0.25),
    "svg2": ("p", 0.5),
    "todo": ("factor", 3),
    "toma": ("ratio", 0.25),
    "tomesd": ("ratio", 0.25),
    "topk-sparse": ("density", 0.5),
    "vsa": ("density", 0.5),
    "xattention-dit": ("threshold", 0.5),
}
METHODS = {name: cls for name, cls in registry().items() if issubclass(cls, Scheduled)}


@pytest.mark.parametrize("name", METHODS)
def test_one_option_by_position(name):
    cls, (option, value) = METHODS[name], LEAD[name]
    assert cls(value) == cls(**{option: value}) != cls()
    assert cls(value).dense_layers == cls(value).dense_steps == 0
    with pytest.raises(TypeError, match=rf"takes {option} without a name.*dense_layers="):
        cls(value, 2)


def test_the_first_option_of_a_token_method_is_how_much_it_keeps():
    first = {
        name: next(f.name for f in dataclasses.fields(cls) if f.init and not f.kw_only)
        for name, cls in registry().items()
        if issubclass(cls, TokenMethod) and name not in METHODS
    }
    assert {name: option for name, option in first.items() if option != "keep"} == {
        "adaptive-sparse-vit": "layers",  # how much follows from thresholds, which are learned
        "algm": "threshold",  # how alike tokens are that merge
        "avit": "scale",  # of the halting score; how much follows from the weights
        "damro": "k",  # the paper's option: tokens of a picture that its second run sees
        "debias": "method",  # it wraps one
        "dtop": "confidence",  # how certain the class of a token is that leaves
        "expedit": "layer",  # from which on windows are smaller
        "mustdrop": "overall",  # least attention; how much follows from the content
        "pixelprune": "threshold",  # what difference of pixels counts as none
        "sttm": "threshold",  # how alike tokens are that merge
        "tofu": "r",  # as in ToMe
        "tome": "r",  # the paper's option: tokens merged per layer
    }
