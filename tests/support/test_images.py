"""Images as users have them: files and folders, the cache of what is prepared, .npz files.

Pictures are made here with Pillow and numpy.
"""

import hashlib
import io
import os
import resource
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import load_images, raw_images
from made import random_pixels, refusal
from runs import ROOT
from support import images
from support.files import partial_of
from support.images import fit


@pytest.fixture(autouse=True)
def cache(own_cache):
    return own_cache


def only_image(path, picture, **options):
    """The only image of a folder that holds `picture`, as raw_images reads it."""
    path.parent.mkdir(exist_ok=True)
    picture.save(path, **options)
    [image] = raw_images(path.parent)
    return image


# ---- crop and resize ----


def test_image_of_the_right_size_passes_unchanged():
    """fit is the identity on a square of that size."""
    pixels = random_pixels(1, 32, 32)[0]
    np.testing.assert_array_equal(fit(Image.fromarray(pixels), 32), pixels)


def test_shrinking_by_two_is_the_mean_of_four_pixels():
    """Box halving, within the level that Pillow rounds twice."""
    pixels = random_pixels(1, 64, 64)[0]
    mean = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert abs(fit(Image.fromarray(pixels), 32) - mean).max() <= 1


def test_the_crop_is_central():
    """Of three equal stripes the middle one is left, upright and lying."""
    stripes = np.eye(3, dtype=np.uint8).repeat(32, axis=0) * 255  # [96, 3]: red, green, blue
    lying = np.broadcast_to(stripes, (32, 96, 3)).copy()
    upright = lying.transpose(1, 0, 2).copy()
    green = np.broadcast_to([0, 255, 0], (32, 32, 3))
    for pixels in (lying, upright):
        np.testing.assert_array_equal(fit(Image.fromarray(pixels), 32), green)


@pytest.mark.parametrize(
    "height, width, size",
    [(218, 178, 64), (500, 375, 64), (64, 129, 64), (33, 200, 16), (127, 127, 64)],
)
def test_fit_is_the_published_recipe(height, width, size):
    """improved-diffusion's order, stated independently.

    Halve while the short side is >= 2 size, one bicubic scaling, crop of the array.
    """
    image = Image.fromarray(random_pixels(1, height, width)[0])
    expected = image
    for k in range(1, 1 + int(np.floor(np.log2(min(height, width) / size)))):
        expected = expected.resize((width >> k, height >> k), Image.Resampling.BOX)
    ratio = size / min(expected.size)
    sides = [round(side * ratio) for side in expected.size]
    expected = np.asarray(expected.resize(sides, Image.Resampling.BICUBIC))
    y, x = (np.array(expected.shape[:2]) - size) // 2
    np.testing.assert_array_equal(fit(image, size), expected[y : y + size, x : x + size])


def test_one_pixel_becomes_a_plain_picture(tmp_path):
    """A 1 x 1 image is enlarged to its colour everywhere."""
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / "dot.png")
    pixels = load_images(tmp_path, 16).pixels
    np.testing.assert_array_equal(pixels, np.broadcast_to([10, 200, 30], (1, 16, 16, 3)))


# ---- pictures as users have them ----

WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 200, (200, 200, 200)),
        ("1", 1, WHITE),
        ("P", 1, (9, 8, 7)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("LA", (90, 255), (90, 90, 90)),
        ("RGBA", (1, 2, 3, 255), (1, 2, 3)),
        ("RGBA", (0, 0, 0, 0), WHITE),
        ("RGBA", (0, 100, 200, 51), (204, 224, 244)),
        ("LA", (0, 0), WHITE),
        ("I;16", 257 * 77, (77, 77, 77)),
        ("I;16", 65535, WHITE),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, expected):
    """Grey, 1-bit, palette, CMYK and 16-bit pixels keep their colour.

    Transparent ones lie on white; alpha 51 is a fifth.
    """
    picture = Image.new(mode, (5, 4), colour)
    if mode == "P":
        picture.putpalette([0, 0, 0, 9, 8, 7])
    name = "a.tif" if mode == "CMYK" else "a.png"
    pixels = only_image(tmp_path / "in" / name, picture)
    np.testing.assert_array_equal(pixels, np.broadcast_to(expected, (4, 5, 3)))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    """A ramp over 0..65535 stays a ramp over 0..255, as PNG, PGM and TIFF."""
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for name in ("a.png", "b.pgm", "c.tiff"):
        folder = tmp_path / name[0]
        folder.mkdir()
        if name == "b.pgm":  # by hand: Pillow 10.3 cannot write 16 bits as PGM
            (folder / name).write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
        else:
            Image.fromarray(ramp).save(folder / name)
        [pixels] = raw_images(folder)
        expected = np.arange(256).reshape(16, 16, 1).repeat(3, axis=2)
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("name", ["a.gif", "b.png"])
def test_palette_transparency_lies_on_white(tmp_path, name):
    """A GIF's and a palette PNG's transparent index is white."""
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0, 200, 0, 0])
    picture.putpixel((1, 1), 1)
    pixels = only_image(tmp_path / "in" / name, picture, transparency=0)
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == [200, 0, 0]


@pytest.mark.parametrize(
    "orientation, turned",
    [
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_270),
        (8, Image.Transpose.ROTATE_90),
    ],
)
def test_exif_rotation_is_applied(tmp_path, orientation, turned):
    """A camera's orientation tag turns the picture upright."""
    picture = Image.fromarray(random_pixels(1, 3, 5)[0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = only_image(tmp_path / "in" / "a.png", picture, exif=exif)
    np.testing.assert_array_equal(pixels, np.asarray(picture.transpose(turned)))


def test_float_pixels_are_refused(tmp_path):
    """A float TIFF has no agreed range."""
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    assert "range" in refusal(tmp_path)


# ---- folders ----


def test_extensions_nesting_and_foreign_files(tmp_path):
    """Upper-case and unusual endings and nested folders are read in sorted order.

    Hidden and foreign files are not.
    """
    names = ["B/x.PNG", "a/deep/er/y.JPeG", "a/z.jfif", "q.TIF", "r.webp", "s.tga", "t.ppm"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {".jfif": "JPEG", ".TIF": "TIFF"}.get(Path(name).suffix)
        Image.new("RGB", (8, 8), (10 * i, 10 * i, 10 * i)).save(tmp_path / name, format=kind)
    for name in (".hidden.png", ".folder/w.png", "notes.txt", "a/Thumbs.db", "picture.eps"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not a picture")
    os.mkfifo(tmp_path / "pipe.png")
    found = load_images(tmp_path, 8)
    np.testing.assert_array_equal(found.pixels[:, 4, 4, 0], np.arange(7) * 10)
    assert found.labels is None


def test_postscript_is_never_opened(tmp_path, monkeypatch):
    """A PostScript file under a picture's name is refused, not handed to ghostscript."""
    called = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *how, **_: called.append(how))
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png", "EPS")
    assert "a.png cannot be read" in refusal(tmp_path) and not called


def test_symbolic_links_are_followed_without_looping(folder):
    """A link to another folder is read, one to a parent is not read again."""
    other = folder.parent / "other"
    other.mkdir()
    Image.new("RGB", (8, 8)).save(other / "x.png")
    (other / "back").symlink_to(folder)
    (folder / "in").symlink_to(other)
    (folder / "self").symlink_to(folder)
    assert len(raw_images(folder)) == 7


@pytest.mark.parametrize(
    "names, labels",
    [
        (["a/1.png", "b/c/2.png", "b/3.png"], [0, 1, 1]),
        (["a/1.png", "a/c/2.png"], None),
        (["1.png", "b/2.png"], None),
        (["1.png"], None),
    ],
)
def test_top_folders_are_labels(names, labels, tmp_path):
    """Where every image lies in one of at least two: their index, sorted; otherwise None."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    found = load_images(tmp_path, 4).labels
    assert (None if found is None else found.tolist()) == labels


def test_folders_take_the_papers_size(folder):
    """Without a size, 64 (Cas-DM Sec. 5)."""
    assert load_images(folder).pixels.shape == (6, 64, 64, 3)


def test_file_that_is_no_npz_is_one_line(folder):
    """A single picture is no data set."""
    assert "npz" in refusal(folder / "0.png")


# ---- bad files ----


def cut(content):
    return content[: len(content) // 2]


def flipped(content):
    return content[:60] + bytes([content[60] ^ 255]) + content[61:]


def jpeg(png):
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).resize((90, 90)).save(file, "JPEG")
    return file.getvalue()


BAD_FILES = {
    "empty.png": lambda png: b"",
    "text.png": lambda png: b"hello",
    "html.jpg": lambda png: b"<html>404</html>",
    "cut.png": cut,
    "cut.jpg": lambda png: cut(jpeg(png)),
    "flip.png": flipped,
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_and_skippable(folder, cache, name):
    """An empty, foreign, truncated or damaged file stops the preparation, leaving nothing.

    --skip-bad leaves it out and counts it, the second time from the cache.
    """
    (folder / name).write_bytes(BAD_FILES[name]((folder / "0.png").read_bytes()))
    message = refusal(folder, 16)
    assert str(folder / name) in message and "--skip-bad" in message
    assert not list(cache.iterdir())
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of the 7 image files"):
            assert len(load_images(folder, 16, skip_bad=True).pixels) == 6
    with pytest.warns(UserWarning, match="1 of the 7"):
        assert len(list(raw_images(folder, skip_bad=True))) == 6
    with pytest.raises(ValueError, match=name):
        list(raw_images(folder))


def test_skipped_files_take_their_labels_with_them(tmp_path):
    """The labels of what is left still fit, from the cache too."""
    for i, name in enumerate(["a/0.png", "a/1.png", "b/2.png", "c/3.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / name)
    (tmp_path / "a/1.png").write_bytes(b"")
    for _ in range(2):
        with pytest.warns(UserWarning):
            found = load_images(tmp_path, 4, skip_bad=True)
        assert found.pixels[:, 0, 0, 0].tolist() == [0, 2, 3]
        assert found.labels.tolist() == [0, 1, 2] and found.labels.dtype == np.int64


@pytest.mark.parametrize("pixels", [Image.MAX_IMAGE_PIXELS, 3 * Image.MAX_IMAGE_PIXELS])
def test_decompression_bomb_is_one_line(folder, pixels):
    """Above Pillow's threshold of a warning and of an error alike: a bad file, never a warning."""
    Image.new("1", (10_000, pixels // 10_000 + 1)).save(folder / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = refusal(folder, 16)
    assert "bomb.png" in message and "decompression bomb" in message
    with pytest.warns(UserWarning, match="1 of the 7"):
        assert len(load_images(folder, 16, skip_bad=True).pixels) == 6


def test_thread_thin_picture_is_refused_before_it_fills_the_memory(tmp_path):
    """1 x 1,000,000 pixels would be 64 x 64,000,000 before the crop."""
    Image.new("L", (1_000_000, 1)).save(tmp_path / "a.png")
    assert "too thin" in refusal(tmp_path)


def test_link_to_nowhere_is_a_bad_file(folder):
    """A broken symbolic link is named like an unreadable file."""
    (folder / "lost.png").symlink_to(folder / "nothing.png")
    assert "lost.png" in refusal(folder)


def test_folder_without_a_good_image_is_an_error(tmp_path, cache):
    """Empty folders, foreign files only, and bad files only."""
    assert "holds no images" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"")
    assert "holds no images" in refusal(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.warns(UserWarning):
        assert "none of the 1" in refusal(tmp_path, skip_bad=True)
    assert not list(cache.iterdir())


def test_mutated_files_are_read_or_refused(folder):
    """300 pictures with random bytes changed or cut: an array or a bad file each."""
    draw = np.random.default_rng(3)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "TGA"):
        whole = io.BytesIO()
        Image.fromarray(random_pixels(1, 12, 9)[0]).save(whole, kind)
        for i in range(50):
            content = bytearray(whole.getvalue())
            for place in draw.integers(min(len(content), 200), size=3):
                content[place] = draw.integers(256)
            if i % 5 == 0:
                content = content[: draw.integers(len(content))]
            (folder / f"{kind}-{i}.{kind.lower()}").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_images(folder, 8, skip_bad=True)
    assert 6 < len(found.pixels) < 306 and found.pixels.shape[1:] == (8, 8, 3)


# ---- the cache ----


def test_folder_is_prepared_once(folder, cache, capsys, monkeypatch):
    """The second time nothing is decoded or said, and the memory-mapped pixels are the same."""
    first = load_images(folder, 8)
    assert isinstance(first.pixels, np.memmap) and not first.pixels.flags.writeable
    assert str(cache) in capsys.readouterr().err
    expected = [fit(Image.open(folder / f"{i}.png"), 8) for i in range(6)]
    np.testing.assert_array_equal(first.pixels, expected)
    monkeypatch.setattr(images, "fit", None)
    second = load_images(folder, 8)
    np.testing.assert_array_equal(second.pixels, first.pixels)
    assert second.fingerprint == first.fingerprint and capsys.readouterr().err == ""


def test_changed_data_is_prepared_afresh(folder):
    """A new fingerprint and new pixels each.

    Of a new file, a removed one, a renamed one, a rewritten one of the same length, another size,
    and --skip-bad.
    """
    seen = {load_images(folder, 8).fingerprint}

    def fresh(size=8, **options):
        found = load_images(folder, size, **options)
        assert found.fingerprint not in seen
        seen.add(found.fingerprint)
        return found.pixels

    Image.new("RGB", (9, 9)).save(folder / "9.png")
    assert len(fresh()) == 7
    (folder / "9.png").rename(folder / "90.png")
    assert len(fresh()) == 7
    (folder / "90.png").unlink()
    os.utime(folder / "0.png", ns=(1, 1))
    assert len(fresh()) == 6
    fresh(size=9)
    fresh(skip_bad=True)


DAMAGES = {
    "shorter": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "garbage": lambda content: b"garbage" * 400,
    "header alone": lambda content: content[:100],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_cache_is_made_again(folder, cache, damage):
    """A prepared file whose length is not its header's, or that is no array, is replaced."""
    good = np.array(load_images(folder, 8).pixels)
    [path] = cache.glob("*.npy")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    np.testing.assert_array_equal(load_images(folder, 8).pixels, good)
    assert path.read_bytes() == whole


def test_lost_labels_are_made_again(tmp_path, cache):
    """Labels and pixels in the cache go together."""
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / name / "x.png")
    load_images(tmp_path / "in", 4)
    [path] = cache.glob("*.labels.npy")
    for damage in (lambda: path.write_bytes(b""), lambda: np.save(path, np.zeros(3)), path.unlink):
        damage()
        assert load_images(tmp_path / "in", 4).labels.tolist() == [0, 1]


def test_stray_of_a_killed_process_is_removed(folder, cache):
    """What a dead process left half-written goes; what a living one is writing stays."""
    load_images(folder, 8)
    [path] = cache.glob("*.npy")
    path.unlink()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = partial_of(path).name  # .NAME.HOST.PID.partial
    stray = cache / ours.replace(f".{os.getpid()}.partial", f".{dead.pid}.partial")
    living = cache / ours.replace(f".{os.getpid()}.partial", f".{os.getppid()}.partial")
    for half in (stray, living):
        half.write_bytes(b"half")
    load_images(folder, 8)
    assert not stray.exists() and living.exists()


def test_full_disk_leaves_nothing_and_says_where(folder, cache):
    """No room for the prepared file: one line with its path, no partial file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        message = refusal(folder, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no room for" in message and str(cache) in message and not list(cache.iterdir())


def test_cache_that_cannot_be_made_is_one_line(folder, tmp_path, monkeypatch):
    """A file where the cache folder should be: says so, and names XDG_CACHE_HOME."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "XDG_CACHE_HOME" in refusal(folder, 8)


PREPARING = """
import hashlib, sys
from data import load_images
print("ready", flush=True)
folder = sys.stdin.readline().strip()
print(hashlib.sha256(load_images(folder, 32).pixels.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_preparing_at_once_both_have_it(tmp_path, cache):
    """Both start on an empty cache, end with the same whole array, and nothing else stays."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, picture in enumerate(random_pixels(300, 40, 40)):
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    command = [sys.executable, "-c", PREPARING]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    assert [p.stdout.readline() for p in both] == ["ready\n", "ready\n"]
    for p in both:
        p.stdin.write(f"{folder}\n")
        p.stdin.flush()
    answers = [p.communicate()[0].strip() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    pixels = load_images(folder, 32).pixels
    assert set(answers) == {hashlib.sha256(pixels.tobytes()).hexdigest()}
    assert len(list(cache.iterdir())) == 1


# ---- npz ----


def test_uncompressed_npz_is_mapped_where_it_lies(tmp_path, cache):
    """No copy, no cache: the pixels are the file's own bytes, labels beside them."""
    pixels = random_pixels(9, 8, 8)
    np.savez(tmp_path / "a.npz", pixels, np.arange(9, dtype=np.int32))
    found = load_images(tmp_path / "a.npz")
    assert isinstance(found.pixels.base, np.memmap) and not cache.exists()
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.labels.dtype == np.int64 and found.labels.tolist() == list(range(9))
    np.testing.assert_array_equal(list(raw_images(tmp_path / "a.npz")), pixels)


def test_compressed_npz_is_unpacked_through_the_cache(tmp_path, cache):
    """The same pixels and labels as uncompressed; raw_images streams them."""
    pixels = random_pixels(9, 8, 8)
    np.savez_compressed(tmp_path / "a.npz", arr_0=pixels, arr_1=np.arange(9))
    found = load_images(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.labels.tolist() == list(range(9)) and len(list(cache.iterdir())) == 2
    raw = raw_images(tmp_path / "a.npz")
    assert len(raw) == 9
    for _ in range(2):
        np.testing.assert_array_equal(list(raw), pixels)


either_npz = pytest.mark.parametrize("save", [np.savez, np.savez_compressed])


@either_npz
def test_npz_of_another_size_is_fitted(tmp_path, save):
    """20 x 12 images are cropped and resized like files.

    Without a size they are refused, as they are not square.
    """
    pixels = random_pixels(3, 12, 20)
    save(tmp_path / "a.npz", pixels)
    expected = [fit(Image.fromarray(image), 8) for image in pixels]
    np.testing.assert_array_equal(load_images(tmp_path / "a.npz", 8).pixels, expected)
    assert "--image-size" in refusal(tmp_path / "a.npz")
    assert next(iter(raw_images(tmp_path / "a.npz"))).shape == (12, 20, 3)


def zeros(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


GOOD = zeros(2, 8, 8, 3)


@pytest.mark.parametrize(
    "got, arrays",
    [
        ("float32", {"arr_0": zeros(2, 8, 8, 3, dtype=np.float32)}),
        ("int64", {"arr_0": zeros(2, 8, 8, 3, dtype=np.int64)}),
        ("[2, 3, 8, 8]", {"arr_0": zeros(2, 3, 8, 8)}),
        ("[2, 8, 8]", {"arr_0": zeros(2, 8, 8)}),
        ("[0, 8, 8, 3]", {"arr_0": zeros(0, 8, 8, 3)}),
        ("Fortran", {"arr_0": np.asfortranarray(random_pixels(2, 8, 8))}),
        ("object", {"arr_0": np.array([{}, None], object)}),
        ("mu.npy, sigma.npy", {"mu": np.zeros(3), "sigma": np.eye(3)}),
        ("arr_1", {"arr_0": GOOD, "arr_1": np.zeros(3, np.int64)}),
        ("arr_1", {"arr_0": GOOD, "arr_1": np.zeros(2)}),
    ],
)
def test_npz_that_holds_something_else_is_one_line(tmp_path, got, arrays):
    """What was got and what was expected.

    Of floats, channels first, no images, objects, statistics, labels that do not fit.
    """
    np.savez(tmp_path / "a.npz", **arrays)
    message = refusal(tmp_path / "a.npz")
    assert got in message and "expected" in message


def test_pickled_npz_never_runs(tmp_path):
    """Neither images nor labels made of pickled objects are unpickled."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    evil = np.array([Evil(), Evil()], object)
    for arrays in ({"arr_0": evil}, {"arr_0": GOOD, "arr_1": evil}):
        np.savez(tmp_path / "a.npz", **arrays)
        refusal(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


@either_npz
def test_damaged_npz_is_loaded_right_or_refused(tmp_path, save, monkeypatch):
    """200 files with one bit changed or cut short: the right pixels, or one line.

    Its 60 images are more than zipfile reads at once.
    """
    path, draw = tmp_path / "a.npz", np.random.default_rng(0)
    pixels = random_pixels(60, 8, 8)
    save(path, pixels, np.arange(60))
    whole, refused = path.read_bytes(), 0
    for i in range(200):
        content = bytearray(whole)
        content[draw.integers(len(content))] ^= 1 << draw.integers(8)
        if i % 4 == 0:
            content = whole[: draw.integers(len(whole))]
        path.write_bytes(content)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{i}"))
        try:
            found = load_images(path, 8).pixels
        except (ValueError, OSError) as e:
            assert str(e).startswith(str(tmp_path)) and "\n" not in str(e)
            refused += 1
        else:
            np.testing.assert_array_equal(found, pixels)
    assert refused > 100


def test_flipped_bit_in_the_pixels_is_noticed(tmp_path):
    """The zip's checksum is compared, although the pixels are only mapped."""
    np.savez(tmp_path / "a.npz", random_pixels(30, 8, 8))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[3000] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert "checksum" in refusal(tmp_path / "a.npz")


def test_npz_fingerprint_follows_the_content(tmp_path):
    """One level of one pixel, one label or the size changes it; the file's name and date do not."""
    pixels, labels = random_pixels(4, 8, 8), np.arange(4)
    np.savez(tmp_path / "a.npz", pixels, labels)
    same = load_images(tmp_path / "a.npz").fingerprint
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    os.utime(tmp_path / "b.npz", (1, 1))
    assert load_images(tmp_path / "b.npz").fingerprint == same
    assert load_images(tmp_path / "b.npz", 4).fingerprint != same
    pixels[2, 3, 4, 1] ^= 1
    np.savez(tmp_path / "a.npz", pixels, labels)
    other_pixels = load_images(tmp_path / "a.npz").fingerprint
    np.savez(tmp_path / "a.npz", pixels, labels[::-1])
    other_labels = load_images(tmp_path / "a.npz").fingerprint
    assert len({same, other_pixels, other_labels}) == 3


def test_member_behind_others_and_extra_fields_is_found(tmp_path):
    """arr_0 may stand anywhere in the zip, with a local header of any length."""
    pixels, array = random_pixels(2, 4, 4), io.BytesIO()
    np.save(array, pixels)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "x" * 77)
        member = zipfile.ZipInfo("arr_0.npy")
        member.extra = b"\x99\x99\x05\x00hello"
        archive.writestr(member, array.getvalue())
    np.testing.assert_array_equal(load_images(tmp_path / "a.npz").pixels, pixels)


@either_npz
def test_npz_is_never_read_whole(tmp_path, save):
    """500 images of 64 x 64, 6.1 MB, are prepared and read with less than 2 MB at any time."""
    save(tmp_path / "a.npz", zeros(500, 64, 64, 3))
    load_images(tmp_path / "a.npz", 8)  # imports and first calls
    tracemalloc.start()
    try:
        load_images(tmp_path / "a.npz", 60)
        assert sum(1 for _ in raw_images(tmp_path / "a.npz")) == 500
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
