"""The files of the built-in benchmarks are written once: other pictures need another version."""

from __future__ import annotations

from vtr.evaluate import tasks
from vtr.zoo import clips, scenes


def test_the_version_is_that_of_the_pictures():
    assert (tasks._VERSION, scenes.BOX, clips.BOX) == (2, (17.0, 25.0), (26.0, 34.0)), (
        "people have the old pictures in their cache folder: raise vtr.evaluate.tasks._VERSION"
    )
