"""Broken and hostile files: whatever a reader is given, it answers with a data set or with one AevlpError."""

import io
import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import aevlp.data
from aevlp.data import AevlpError, LabelledImages, decode, decoded_bytes, made_here
from aevlp.datasets import load

RNG = np.random.default_rng(0)
SCENE = Image.fromarray(np.kron(RNG.integers(0, 256, (6, 8, 3)), np.ones((6, 6, 1))).astype(np.uint8))
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def saved(suffix, **kw):
    out = io.BytesIO()
    SCENE.save(out, suffix, **kw)
    return out.getvalue()


WHOLE = {
    "jpg": saved("JPEG"),
    "progressive.jpg": saved("JPEG", progressive=True),
    "png": saved("PNG"),
    "gif": saved("GIF"),
    "tif": saved("TIFF", compression="tiff_lzw"),
    "bmp": saved("BMP"),
    "webp": saved("WEBP"),
    "ppm": saved("PPM"),
}


def picture_or_error(path):
    """A decoded picture, or one sentence that names the file."""
    try:
        found = decode(path)
    except AevlpError as e:
        assert str(path) in str(e)
        return None
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    return found


# --- pictures


@pytest.mark.parametrize("suffix", WHOLE)
def test_a_picture_cut_off_anywhere_is_an_error(tmp_path, suffix):
    path, data = tmp_path / f"a.{suffix}", WHOLE[suffix]
    path.write_bytes(data)
    assert picture_or_error(path) is not None
    for part in (0, 1, 2, 10, len(data) // 4, len(data) // 2, len(data) * 3 // 4):
        path.write_bytes(data[:part])
        assert picture_or_error(path) is None, part


@settings(max_examples=150, **COMMON)
@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8))
def test_flipped_bytes_never_do_anything_else(tmp_path, suffix, changes):
    data = bytearray(WHOLE[suffix])
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    picture_or_error(path)


@settings(max_examples=100, **COMMON)
@given(st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF"]), st.binary())
def test_random_bytes_are_no_picture(tmp_path, magic, rest):
    path = tmp_path / "a.jpg"
    path.write_bytes(magic + rest)
    picture_or_error(path)


def test_what_is_not_a_picture(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    np.save(tmp_path / "array.npy", np.ones(3))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "none.jpg")
    (tmp_path / "none.jpg").unlink(missing_ok=True)
    for path in [*tmp_path.iterdir(), tmp_path / "missing.jpg", tmp_path / ("x" * 300), "/dev/null", "a\0b.jpg"]:
        assert picture_or_error(path) is None, path


def test_a_picture_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(WHOLE["png"])

    def refuse(*args, **kw):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(AevlpError, match="Permission denied"):
        decode(path)


def png_claiming(width, height, depth=8, colour=2):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(12_000, 9_000), (40_000, 40_000), (2**31 - 1, 2**31 - 1), (1, 200_000_000)])
def test_decompression_bombs_are_refused_before_decoding(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(*size))
    with pytest.raises(AevlpError, match="bomb.png.*(pixels|decoded)"):
        decode(path)


RGBA, GREY = 6, 0


@pytest.mark.parametrize(
    ("size", "kind"), [((9000, 7000), (8, RGBA)), ((9000, 7000), (16, RGBA)), ((9500, 9500), (16, GREY))]
)
def test_what_would_take_too_much_memory_is_refused_before_decoding(tmp_path, size, kind):
    """Of the same size, a picture of 8 bit grey is decoded."""
    path = tmp_path / "deep.png"
    path.write_bytes(png_claiming(*size, *kind))
    for refuses in (decode, decoded_bytes):
        with pytest.raises(
            AevlpError, match=r"deep.png: \d+ x \d+ pixels are more than can be decoded of such a PNG; scale it"
        ):
            refuses(path)
    path.write_bytes(png_claiming(*size, 8, GREY))
    assert decoded_bytes(path) == 3 * size[0] * size[1]


@pytest.mark.parametrize("kind", [(8, GREY), (8, 2)])
def test_a_strip_of_a_hundred_million_lines_is_refused(tmp_path, kind):
    """Pillow keeps the address of each line: more than the pixels themselves take."""
    path = tmp_path / "strip.png"
    path.write_bytes(png_claiming(1, 99_999_999, *kind))
    with pytest.raises(AevlpError, match="strip.png: .* more than can be decoded"):
        decoded_bytes(path)
    path.write_bytes(png_claiming(99_999_999, 1, 8, GREY))
    assert decoded_bytes(path) == 3 * 99_999_999


def claiming_jpeg(width, height, scans):
    """A progressive JPEG of a small scene that says it is larger, its last scan many times."""
    data = bytearray(saved("JPEG", progressive=True))
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    last = data.rindex(b"\xff\xda")
    return bytes(data[:-2] + data[last:-2] * scans + data[-2:])


SLOW = {
    "comments.ppm": (b"P3 40 40 255\n" + b"#\n" * 5000 + b"7 " * 4800, "slow variant"),
    "scans.jpg": (claiming_jpeg(5000, 4000, 60), "very many scans"),
    "plain.ppm": (b"P3 2000 2000 255\n" + b"7 " * 100, "slow variant"),
    "deep.ppm": (b"P6 2000 2000 65535\n" + b"7 " * 100, "slow variant"),
    "rle.bmp": (
        b"BM"
        + struct.pack("<IHHI", 1078, 0, 0, 1078)
        + struct.pack("<IiiHHIIiiII", 40, 2000, 2000, 1, 8, 1, 0, 0, 0, 0, 0),
        "slow variant",
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_would_take_too_much_time_is_refused_before_decoding(tmp_path, name):
    data, says = SLOW[name]
    (tmp_path / name).write_bytes(data + b"\0" * 1024)
    with pytest.raises(AevlpError, match=f"{name}.*{says}"):
        decode(tmp_path / name)


def with_chunks(kind, data, count):
    """The scene as a PNG with many more chunks."""
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return WHOLE["png"][:33] + chunk * count + WHOLE["png"][33:]


def with_segments(marker, data, count):
    """The scene as a JPEG with many more segments."""
    return WHOLE["jpg"][:2] + (marker + struct.pack(">H", len(data) + 2) + data) * count + WHOLE["jpg"][2:]


def with_tag(tag, kind, count, order="<", big=False):
    """A grey TIFF with a tag of so many values, which lie behind its pixels; to be made longer by them."""
    head, number, at = (16, "Q", 400) if big else (8, "I", 200)
    tags = [(256, 4, 1, 48), (257, 4, 1, 36), (258, 4, 1, 8), (259, 4, 1, 1), (262, 4, 1, 1), (273, 4, 1, at)]
    tags += [(278, 4, 1, 36), (279, 4, 1, 48 * 36)]
    tags = sorted([t for t in tags if t[0] != tag] + [(tag, kind, count, at + 48 * 36)])
    data = b"".join(
        struct.pack(f"{order}HH{number}", *entry[:3])
        + struct.pack(order + ("I" if entry[2] == 1 else number), entry[3]).ljust(8 if big else 4, b"\0")
        for entry in tags
    )
    version = struct.pack(order + "HHHQ", 43, 8, 0, head) if big else struct.pack(order + "HI", 42, head)
    first = {"<": b"II", ">": b"MM"}[order] + version + struct.pack(order + ("Q" if big else "H"), len(tags)) + data
    return first.ljust(at + 48 * 36, b"\0")


def long_file(path, data, size):
    """A file of so many bytes, zeros behind the data."""
    path.write_bytes(data)
    os.truncate(path, size)


@pytest.mark.parametrize("order, big", [("<", False), (">", False), ("<", True)])
def test_a_tiff_of_millions_of_values_is_refused(tmp_path, order, big):
    """Pillow makes numbers and tiles of Python's out of them: minutes and gigabytes."""
    path = tmp_path / "a.tif"
    for tag, kind, count in [(324, 1, 600_000), (273, 1, 600_000), (258, 3, 600_000), (50_000, 5, 600_000)]:
        long_file(path, with_tag(tag, kind, count, order, big), 6_000_000)
        with pytest.raises(AevlpError, match=f"a.tif: .* tag {tag} holds 600000 values"):
            decode(path)
    for kind in (1, 3, 7):  # few numbers, many bytes
        long_file(path, with_tag(50_000, kind, 500_000 if kind == 3 else 30_000_000, order, big), 31_000_000)
        assert decode(path).shape == (36, 48, 3)
    path.write_bytes(with_tag(50_000, 3, 500_001, order, big))
    with pytest.raises(AevlpError, match="500001 values"):
        decode(path)


def test_what_only_begins_as_a_tiff_is_no_picture(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II, that is two, and more text behind it")
    with pytest.raises(AevlpError, match="a.tif: not a picture in a known format"):
        decode(tmp_path / "a.tif")


def test_a_picture_that_is_read_in_one_go_may_be_large(tmp_path):
    """Of a WebP the decoder asks for the whole file at once."""
    path, whole = tmp_path / "a.webp", saved("WEBP")
    size = 20 * 2**20
    long_file(
        path,
        whole[:4] + struct.pack("<I", len(whole) + size) + whole[8:] + b"JUNK" + struct.pack("<I", size),
        len(whole) + 8 + size,
    )
    assert decode(path).shape == (36, 48, 3)


def test_what_each_read_of_a_picture_file_counts(tmp_path, monkeypatch):
    """Before the pixels all bytes of a piece, 64 at least; an eighth of a megabyte asked for; nothing of the rest."""
    path, mega = tmp_path / "a", 2**20
    path.write_bytes(bytes(2 * mega + 7))
    with aevlp.data._Patient(path) as file:

        def counted(begin, *size):
            file.seek(begin)
            before, _ = file.spent, file.read(*size)
            return file.spent - before

        assert (file.spent, counted(0, 10), counted(0, 65), counted(0, mega - 1)) == (0, 64, 65, mega - 1)
        assert (counted(0, mega), counted(0, mega + 15)) == (mega // 8, mega // 8 + 1)
        assert (counted(mega + 8), counted(mega + 7), counted(0)) == (mega - 1, 64, 64)
        file.opening = False
        assert (counted(0, 1000), counted(0, mega)) == (64, mega // 8)
        monkeypatch.setattr("aevlp.data._PATIENCE", file.spent + 64)
        file.read(1)
        with pytest.raises(ValueError, match="too much lies around its pixels"):
            file.read(1)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_long_file_that_is_cut_off_is_suspected(tmp_path, kind):
    path, data = tmp_path / f"a.{kind}", WHOLE[kind]
    path.write_bytes(data)
    assert aevlp.data._content(path)[-1] == 0
    path.write_bytes(data[:-80] if kind in ("jpg", "png", "webp", "bmp") else b"x" + data)
    assert aevlp.data._content(path)[-1] == 1


def test_a_long_tag_or_text_is_not_read_to_its_end(tmp_path):
    """Layers of 126 MiB are read, of 129 refused, as is text of 129 MiB, before the picture and after it."""
    path = tmp_path / "a.tif"
    tracemalloc.start()
    long_file(path, with_tag(37_724, 7, 126 * 2**20), 127 * 2**20)
    assert decode(path).shape == (36, 48, 3)
    long_file(path, with_tag(37_724, 7, 129 * 2**20), 130 * 2**20)
    with pytest.raises(AevlpError, match="a.tif: .*too much lies around its pixels"):
        decode(path)
    path, whole = tmp_path / "a.png", WHOLE["png"]
    for at in (33, whole.rindex(b"IEND") - 4):
        for size, says in ((129, "too much lies around its pixels"), (127, "in text chunks")):
            long_file(path, whole[:at] + struct.pack(">I", size * 2**20) + b"tEXtk\0", (size + 1) * 2**20)
            with pytest.raises(AevlpError, match=f"a.png: .*{says}"):
                decode(path)
    assert tracemalloc.get_traced_memory()[1] < 500e6
    tracemalloc.stop()


AROUND = {
    "padding.jpg": lambda n: WHOLE["jpg"][:2] + b"\xff" * (n * 1000) + WHOLE["jpg"][2:],
    "exif.jpg": lambda n: with_segments(b"\xff\xe1", b"Exif\0\0" + b"z" * 65_000, n),
    "comments.jpg": lambda n: with_segments(b"\xff\xfe", b"z", n * 1000),
    "chunks.png": lambda n: with_chunks(b"prVt", b"", n * 1000),
    "comment.gif": lambda n: WHOLE["gif"].replace(b",\0\0\0\0", b"!\xfe" + b"\1c" * (n * 1000) + b"\0,\0\0\0\0", 1),
    "text.png": lambda n: with_chunks(b"tEXt", b"k\0" + b"x" * 50_000, n),
    "spaces.ppm": lambda n: b"P6" + b" " * (n * 1000) + WHOLE["ppm"][2:],
}


@pytest.mark.parametrize("name", AROUND)
def test_what_lies_around_a_picture_takes_no_minutes(tmp_path, name):
    """Millions of bytes or parts before the pixels are refused, a few are read."""
    path = tmp_path / name
    path.write_bytes(AROUND[name](3))
    assert decode(path).shape == (36, 48, 3)
    path.write_bytes(AROUND[name](400))
    began = time.process_time()
    with pytest.raises(AevlpError, match=f"{name}: .*(too much lies around its pixels|header)"):
        decode(path)
    assert made_here(path) is False and time.process_time() - began < 3


def test_a_jpeg_of_few_scans_is_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(claiming_jpeg(48, 36, 60))
    assert decode(tmp_path / "a.jpg").shape == (36, 48, 3)


def test_the_limits_are_where_they_are_said_to_be(tmp_path):
    """A hundred million pixels, 400 MiB of memory, 600 million pixels times scans, two million in slow variants."""

    def accepts(name, data):
        (tmp_path / name).write_bytes(data + b"\0" * 1024)
        try:
            return decoded_bytes(tmp_path / name) > 0
        except AevlpError:
            return False

    assert accepts("most.png", png_claiming(10_000, 10_000, 8, GREY))
    assert not accepts("more.png", png_claiming(5_882_353, 17, 8, GREY))  # one pixel more
    assert accepts("most.png", png_claiming(10_000, 5990)) and not accepts("more.png", png_claiming(10_000, 6000))
    once = claiming_jpeg(20_000, 1500, 0).count(b"\xff\xda")
    assert accepts("most.jpg", claiming_jpeg(20_000, 1500, 20 - once))
    assert not accepts("more.jpg", claiming_jpeg(20_000, 1500, 21 - once))
    assert accepts("most.ppm", b"P3 2000 1000 255\n" + b"7 " * 100)
    assert not accepts("more.ppm", b"P3 2000 1001 255\n" + b"7 " * 100)
    comments = lambda n: b"P3 40 40 255\n" + b"#\n" * n + b"7 " * 4800  # noqa: E731
    assert accepts("few.ppm", comments(1000)) and not accepts("many.ppm", comments(1001))


@pytest.mark.parametrize("width, line", [(3, 12), (4, 8), (5, 8)])
def test_the_limit_of_memory_counts_lines(tmp_path, width, line):
    """Of a grey PNG a byte and three of RGB a pixel; of a line its address, and a fourth byte to a word's end."""
    path, most = tmp_path / "a.png", 400 * 2**20 // (4 * width + line)
    path.write_bytes(png_claiming(width, most, 8, GREY))
    assert decoded_bytes(path) == 3 * width * most
    path.write_bytes(png_claiming(width, most + 1, 8, GREY))
    with pytest.raises(AevlpError, match="more than can be decoded"):
        decoded_bytes(path)


def test_pixels_are_read_in_as_many_pieces_as_they_take(tmp_path):
    """Seventeen megabytes in pieces of 64 kB, more than may lie around a picture."""
    Image.new("RGB", (2400, 2400), "red").save(tmp_path / "a.ppm")
    assert (decode(tmp_path / "a.ppm") == (255, 0, 0)).all()


LARGEST = {  # just below the limit of its kind
    "16bit.png": lambda: Image.fromarray(np.zeros((9000, 9200), np.uint16)),
    "rgba.png": lambda: Image.new("RGBA", (7600, 7800)),
    "grey.png": lambda: Image.new("L", (10_000, 9_990)),
    "rgb.jpg": lambda: Image.new("RGB", (10_000, 9_990)),
    "rgb.webp": lambda: Image.new("RGB", (5100, 5100)),
    "rgb.tif": lambda: Image.new("RGB", (6100, 6200)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_pictures_take_three_seconds_and_half_a_gigabyte(tmp_path, name):
    LARGEST[name]().save(tmp_path / name, **({"compression": "tiff_lzw"} if name.endswith("tif") else {}))
    script = f"""import resource, time, torch, torchvision.io
from aevlp.data import decode
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
before, began = memory(), time.process_time()
decode({str(tmp_path / name)!r})
print(memory() - before, time.process_time() - began)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    megabytes, seconds = map(float, done.stdout.split())
    assert megabytes < 500 and seconds < 3, done.stdout


def as_before(path):
    """The whole picture through Pillow at once: what `decode` gave before it worked in strips."""
    with Image.open(path) as im:
        orientation = im.getexif().get(0x0112, 1) if im.format == "JPEG" else 1
        im.load()
        if im.mode.startswith("I"):
            im = Image.fromarray(((np.asarray(im).astype(np.int64) + 128) // 257).astype(np.uint8))
        elif im.has_transparency_data:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
        im = im.convert("RGB")
        return np.array(im.transpose(turn[orientation]) if orientation in turn else im)


PHOTO = SCENE.resize((701, 903), Image.Resampling.BICUBIC)
NOISE = Image.fromarray(RNG.integers(0, 256, (903, 701), dtype=np.uint8))
DEEP = Image.fromarray(RNG.integers(0, 2**16, (903, 701), dtype=np.uint16))
CLEAR = PHOTO.copy()
CLEAR.putalpha(NOISE)
PALETTE = PHOTO.quantize(16)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


ORDINARY = {
    "rgb.jpg": (PHOTO, {}),
    "progressive.jpg": (PHOTO, {"progressive": True}),
    "grey.jpg": (NOISE, {}),
    "cmyk.jpg": (PHOTO.convert("CMYK"), {}),
    **{f"turned{o}.jpg": (PHOTO, turned(o)) for o in range(1, 9)},
    "rgb.png": (PHOTO, {}),
    "rgba.png": (CLEAR, {}),
    "la.png": (CLEAR.convert("LA"), {}),
    "deep.png": (DEEP, {}),
    "deep.tif": (DEEP, {}),
    "bits.png": (NOISE.convert("1"), {}),
    "palette.png": (PALETTE, {}),
    "clear_palette.png": (PALETTE, {"transparency": 3}),
    "palette.gif": (PALETTE, {}),
    "rgb.webp": (PHOTO, {}),
    "rgba.webp": (CLEAR, {}),
    "lzw.tif": (PHOTO, {"compression": "tiff_lzw"}),
    "rgb.bmp": (PHOTO, {}),
    "rgb.ppm": (PHOTO, {}),
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("side", [None, 64])
def test_ordinary_pictures_are_what_pillow_gives_to_the_last_bit(tmp_path, name, side):
    image, how = ORDINARY[name]
    image.save(tmp_path / name, **how)
    np.testing.assert_array_equal(decode(tmp_path / name, side), as_before(tmp_path / name))


@pytest.mark.parametrize("name", [n for n in ORDINARY if n != "bits.png"])
def test_large_pictures_are_reduced_to_what_is_asked_for(tmp_path, monkeypatch, name):
    """The mean over tiles of the reduced picture is that of the whole one, and it stays upright."""
    monkeypatch.setattr(aevlp.data, "SMALL_PIXELS", 10_000)
    image, how = ORDINARY[name]
    image.save(tmp_path / name, **how)
    whole, reduced = decode(tmp_path / name), decode(tmp_path / name, 128)
    assert all(128 <= n < 256 for n in reduced.shape[:2]) and reduced.nbytes <= decoded_bytes(tmp_path / name, 128)
    tiles = [Image.fromarray(a).resize((4, 4), Image.Resampling.BOX) for a in (whole, reduced)]
    np.testing.assert_allclose(np.asarray(tiles[1], int), np.asarray(tiles[0], int), atol=4)


def test_floating_point_and_32_bit_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.full((4, 4), 10**6, np.int32)).save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        with pytest.raises(AevlpError, match=f"{name}.*8 or 16 bits"):
            decode(tmp_path / name)


# --- paths that leave the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("top")
    root = top / "root"
    (root / "deep").mkdir(parents=True)
    (top / "outside").mkdir()
    for name in (*(f"root/{i}.png" for i in range(8)), "outside/secret.png", "root/deep/a.png"):
        (top / name).write_bytes(WHOLE["png"])
    (root / "file_out.png").symlink_to(top / "outside/secret.png")
    (root / "folder_out").symlink_to(top / "outside")
    (root / "folder_up").symlink_to("..")
    (root / "circle.png").symlink_to("circle.png")
    (root / "ring").symlink_to(root / "gnir")
    (root / "gnir").symlink_to(root / "ring")
    (root / "dangling.png").symlink_to("not_there.png")
    (root / "inside.png").symlink_to("0.png")
    (root / "shallow").symlink_to("deep")
    os.mkfifo(root / "pipe.png")
    return root


def read(folder, text):
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    (folder / "t.csv").write_bytes(data)
    return load("csv", folder, csv=folder / "t.csv")


EIGHT = "".join(f"{i}.png,x\n" for i in range(8))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../outside/secret.png", "leads out of"),
        ("deep/../../outside/secret.png", "leads out of"),
        ("/etc/passwd", "leads out of"),
        ("file_out.png", "a symbolic link that leads out of"),
        ("folder_out/secret.png", "a symbolic link leads out of"),
        ("folder_up/outside/secret.png", "a symbolic link leads out of"),
        ("circle.png", "a symbolic link that leads nowhere or in a circle"),
        ("ring/a.png", "Too many levels of symbolic links"),
        ("dangling.png", "a symbolic link that leads nowhere or in a circle"),
        ("pipe.png", "not a file"),
        ("deep", "not a file"),
        (".", "leads out of"),
        ("deep/", "not a file"),
        ("0.png/x", "Not a directory"),
        ("a\0.png", "line 10"),
        ("x" * 5000, "is not in"),
        ("x" * 300 + "/a.png", "File name too long"),
    ],
)
def test_paths_that_leave_or_lead_nowhere(folder, name, says):
    with pytest.raises(AevlpError) as e:
        read(folder, f"image,label\n{EIGHT}{name},x\n")
    assert says in str(e.value) and "line 10" in str(e.value)


def test_links_that_stay_inside_are_fine(folder):
    assert len(read(folder, f"image,label\n{EIGHT}inside.png,x\nshallow/a.png,x\n")) == 10


# --- tables


def table_or_error(folder, text):
    try:
        data = read(folder, text)
    except AevlpError as e:
        assert "t.csv" in str(e)
        return
    assert isinstance(data, LabelledImages)
    assert all(os.path.realpath(p).startswith(os.path.realpath(folder)) for p in data.paths)
    assert {"train", "val", "test"} == set(data.splits)


cell = st.one_of(
    st.sampled_from([*(f"{i}.png" for i in range(8)), "x", "y", "0", "1", "", " ", "train", "val", "test", "../0.png"]),
    st.text(max_size=6),
)
header = st.one_of(
    st.lists(st.sampled_from(["image", "label", "split", "x", "y", ""]), min_size=1, max_size=4),
    st.just(["image", "label"]),
    st.just(["image", "x", "y", "split"]),
)


@settings(max_examples=300, **COMMON)
@given(header, st.lists(st.lists(cell, max_size=4), max_size=10), st.sampled_from([",", ";", "\t"]))
def test_tables_of_any_cells(folder, head, rows, separator):
    table_or_error(folder, "\n".join(separator.join(r) for r in [head, *rows]))


@settings(max_examples=200, **COMMON)
@given(
    st.permutations(range(8)),
    st.lists(st.sampled_from(["0", "1", "2", ""]), min_size=16, max_size=16),
    st.lists(st.sampled_from(["train", "train", "val", "test", "dev"]), min_size=8, max_size=8),
)
def test_nearly_good_tables(folder, order, labels, splits):
    rows = [f"{i}.png,{labels[2 * k]},{labels[2 * k + 1]},{splits[k]}" for k, i in enumerate(order)]
    table_or_error(folder, "\n".join(["image,x,y,split", *rows]))


@settings(max_examples=200, **COMMON)
@given(
    st.sampled_from([b"", b"image,label\n", b"\xef\xbb\xbfimage,label\n", b"image,x\n0.png,"]), st.binary(max_size=80)
)
@example(b"image,label\n", b'"' + b"a" * 200_000)
@example(b"image,label\n", b"0.png,\xff")
@example(b"", b"\xff\xfei\0m\0")
def test_tables_of_any_bytes(folder, start, rest):
    table_or_error(folder, start + rest)


@pytest.mark.parametrize("cell", ["['\\x','\\N{foo}']", "['a\0']", "['\\ud800']", "[" * 3000, "['" + "\\" * 5000])
def test_a_list_that_python_cannot_read_is_text(folder, cell):
    table_or_error(folder, "image\tlabel\n" + "".join(f"{i}.png\t{cell}\n" for i in range(8)))


def test_a_table_of_too_many_columns_or_of_one_line_is_refused_at_once(folder):
    began = time.process_time()
    for text, says in (
        ("image" + ",c" * 100_000, "100,001 columns, more than 100,000"),
        ("image,label\n0.png," + ",a" * 2_500_000, "line 2: more than 4,194,304 characters in one line"),
        ("image," + "c," * 99_998 + "c\n0.png" + ",1" * 99_999, "column 'c' occurs twice"),
        ("image" + "," * 99_999 + "\n0.png" + "," * 99_999, "no labels|no column"),
    ):
        with pytest.raises(AevlpError, match=says):
            read(folder, text)
    assert time.process_time() - began < 10


def test_areas_that_are_no_numbers_are_unknown(folder):
    things = dict(
        images=[dict(id=i, file_name=f"{i}.png") for i in range(8)],
        annotations=[dict(image_id=i, category_id=i % 2, area=10**400) for i in range(8)],
        categories=[dict(id=0, name="a"), dict(id=1, name="b")],
    )
    (folder / "things.json").write_text(json.dumps(things))
    data = load("own-coco", folder, csv=folder / "things.json")
    assert data.truth[:, 0].tolist() == [1, 0] * 4 and "object_area" not in data.extra


def test_a_pipe_at_the_name_of_a_table_is_refused(folder):
    for name, kind in (("p.csv", "csv"), ("p.json", "own-coco")):
        os.mkfifo(folder / name)
        try:
            with pytest.raises(AevlpError, match="it is a pipe or a device, not a file"):
                load(kind, folder, csv=folder / name)
        finally:
            (folder / name).unlink()


# --- label matrices


@pytest.fixture(scope="module")
def formatted(tmp_path_factory):
    root = tmp_path_factory.mktemp("formatted")
    for phase in ("train", "val"):
        names = [f"{phase}{i}.png" for i in range(6)]
        for name in names:
            (root / name).write_bytes(WHOLE["png"])
        np.save(root / f"good_{phase}_images.npy", names)
        np.save(root / f"good_{phase}_labels.npy", np.eye(6, 20))
    return root


PARTS = [f"{phase}_{what}.npy" for phase in ("train", "val") for what in ("images", "labels")]


def restore(root):
    for part in PARTS:
        (root / f"formatted_{part}").write_bytes((root / f"good_{part}").read_bytes())
    for phase in ("train", "val"):
        (root / f"formatted_{phase}_labels_obs.npy").unlink(missing_ok=True)


def matrix_or_error(root):
    try:
        data = load("npy", root)
    except AevlpError as e:
        assert str(root) in str(e)
        return None
    assert isinstance(data, LabelledImages)
    return data


def npy(array, **kw):
    out = io.BytesIO()
    np.save(out, array, **kw)
    return out.getvalue()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("pickle_was_run",)


@pytest.mark.parametrize(
    ("part", "data", "says"),
    [
        ("train_labels", npy(np.full((6, 20), np.nan)), "nan at row 0, column 0"),
        ("train_labels", npy(np.full((6, 20), np.inf)), "inf at row 0"),
        ("train_labels", npy(np.full((6, 20), 0.5)), "0.5 at row 0"),
        ("train_labels", npy(np.full((6, 20), -1)), "-1 at row 0"),
        ("train_labels_obs", npy(np.full((6, 20), 2)), "2 at row 0"),
        ("train_labels_obs", npy(np.ones((6, 19))), r"shape \(6, 19\)"),
        ("train_labels", npy(np.eye(5, 20)), r"shape \(5, 20\)"),
        ("train_labels", npy(np.ones(6)), r"shape \(6,\)"),
        ("train_labels", npy(np.float64(1)), r"shape \(\)"),
        ("train_labels", npy(np.eye(6, 20).astype(str)), "type <U"),
        ("train_labels", npy(np.eye(6, 20).astype(complex)), "type complex128"),
        ("train_labels", npy(np.zeros((6, 20), [("a", int)])), "type"),
        ("train_labels", npy(np.zeros((6, 20), "M8[s]")), "type datetime64"),
        ("val_labels", npy(np.eye(6, 19)), "the same classes"),
        ("train_images", npy(np.arange(6)), "a list of strings"),
        ("train_images", npy(np.array([["a"] * 6])), "a list of strings"),
        ("train_images", npy(np.array(["../a.png"] * 6)), "leads out of|is in none of"),
        ("val_images", npy(np.array(["../a.png"] * 6)), "leads out of"),
        ("val_images", npy(np.array(["none.png"] * 6)), "'none.png' is not in"),
        ("val_images", npy(np.array([b"\xff\xfe.png"] * 6)), "not UTF-8"),
        ("train_images", npy(np.array([Bomb()] * 6), allow_pickle=True), "pickled"),
        ("train_labels", npy(np.array([Bomb()] * 6), allow_pickle=True), "pickled"),
        ("train_labels", b"", "not a readable"),
        ("train_labels", b"PK\x03\x04", "not a readable"),
        ("train_labels", b"\x80\x04\x95", "not a readable"),
        ("train_labels", npy(np.eye(6, 20))[:-8], "not a readable"),
        ("train_labels", npy(np.eye(6, 20)).replace(b"(6, 20)", b"(9, 10**9)"), "not a readable"),
        (
            "train_labels",
            npy(np.eye(6, 20)).replace(b"'shape': (6, 20), }   ", b"'shape': (999999999999,)"),
            "not a readable",
        ),
    ],
)
def test_wrong_matrices(formatted, monkeypatch, tmp_path, part, data, says):
    monkeypatch.chdir(tmp_path)
    restore(formatted)
    (formatted / f"formatted_{part}.npy").write_bytes(data)
    with pytest.raises(AevlpError, match=says):
        load("npy", formatted)
    assert not (tmp_path / "pickle_was_run").exists()


def test_a_missing_matrix_is_named(formatted):
    restore(formatted)
    assert matrix_or_error(formatted) is not None
    (formatted / "formatted_val_labels.npy").unlink()
    with pytest.raises(AevlpError, match="formatted_val_labels.npy is missing"):
        load("npy", formatted)


@settings(max_examples=200, **COMMON)
@given(
    st.sampled_from(PARTS),
    st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), max_size=6),
    st.integers(0, 1200),
)
def test_flipped_and_cut_matrices(formatted, part, changes, end):
    restore(formatted)
    path = formatted / f"formatted_{part}"
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    path.write_bytes(data[: end or None])
    matrix_or_error(formatted)


@settings(max_examples=100, **COMMON)
@given(
    st.sampled_from(PARTS),
    st.sampled_from([b"", b"\x93NUMPY\x01\x00\x46\x00", b"\x93NUMPY\x03\x00"]),
    st.binary(max_size=120),
)
def test_matrices_of_any_bytes(formatted, part, start, rest):
    restore(formatted)
    (formatted / f"formatted_{part}").write_bytes(start + rest)
    matrix_or_error(formatted)
