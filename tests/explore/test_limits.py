"""Uploads: what is read, and the message for what is not."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from vtr.explore.limits import UploadLimits, read_upload


def png(path, width, height):
    """A PNG that states a size, without pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    return path


def test_pictures_are_read_upright_in_their_order(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg", exif=tags)
    Image.new("L", (8, 9), 200).save(tmp_path / "b.png")
    shown = read_upload([tmp_path / "a.jpg", tmp_path / "b.png"])
    assert [p.size for p in shown.pictures] == [(20, 40), (8, 9)]
    assert shown.names == ("a.jpg", "b.png") and {p.mode for p in shown.pictures} == {"RGB"}


@pytest.mark.parametrize("size", [(4001, 4000), (30000, 30000), (100000, 100000)])
def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path, size, monkeypatch
):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"bomb.png has .* pixels, at most 16 million"):
        read_upload([png(tmp_path / "bomb.png", *size)])


def test_what_is_broken_says_so_without_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # importing lmms_eval sets it
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 60)
    (tmp_path / "text.txt").write_text("no picture")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    for name in ("broken.png", "text.txt", "cut.png"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
            read_upload([tmp_path / name])
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ValueError, match=r"text\.txt is no picture: upload pictures, or one clip"):
        read_upload([tmp_path / "whole.png", tmp_path / "text.txt"])


def test_formats_that_run_programs_are_not_opened(tmp_path):
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(ValueError, match="neither a picture nor a clip"):
        read_upload([tmp_path / "a.eps"])


def test_numbers_and_sizes_of_files_are_limited(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    with pytest.raises(ValueError, match=r"a\.png has 0 MiB, at most 0"):
        read_upload([tmp_path / "a.png"], UploadLimits(bytes=1000))
    with pytest.raises(ValueError, match="3 files were uploaded, at most 2"):
        read_upload([tmp_path / "a.png"] * 3, UploadLimits(pictures=2))
    with pytest.raises(ValueError, match="no file"):
        read_upload([])
    with pytest.raises(ValueError, match="501 characters, at most 500"):
        UploadLimits().check_text("x" * 501)
    assert UploadLimits().check_text(" a ") == "a"


def test_a_clip_is_read_and_a_long_or_large_one_refused(tmp_path):
    pytest.importorskip("av")
    pytest.importorskip("sklearn")
    from vtr.zoo import video_qa
    from vtr.zoo.clips import write

    file = write(
        tmp_path / "clip.mp4", video_qa(1, seed=0, per_second=2)[0].frames, rate=2, scale=1
    )
    shown = read_upload([file])
    assert shown.video(8).frames.shape == (8, 96, 96, 3) and len(shown.thumbnails()) == 8
    with pytest.raises(ValueError, match=r"clip.mp4 has 16 frames in 8 s, at most 10"):
        read_upload([file], UploadLimits(frames=10))
    with pytest.raises(ValueError, match=r"at most 10000 in 2 s"):
        read_upload([file], UploadLimits(seconds=2.0))
    with pytest.raises(ValueError, match=r"96 x 96 pixels a frame"):
        read_upload([file], UploadLimits(pixels=5000))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"clip\.mp4 is neither a picture nor a clip"):
        read_upload([file])
