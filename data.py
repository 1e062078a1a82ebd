r"""Images in: the named data sets, folders, `.npz` files and the embedded `shapes`; the one home of the image range.

    range      `from_pixels`, `to_pixels`          uint8 0..255 <-> [-1, 1]
    chance     `stream`, `batch_indices`           every draw follows from (seed, purpose, index)
    images     `load_images`, `raw_images`         DATASETS names the sets of Cas-DM Sec. 5, and `shapes`

    Cas-DM   arXiv:2401.02414v1
    IDDPM    arXiv:2102.09672v1, whose code (improved-diffusion) crops and resizes as `fit` does

Training data is one uint8 array [N, H, W, 3], resident or memory-mapped: no worker processes, and 3 million images take no memory. What is
not such an array yet (a folder, a compressed .npz, another size) is made one once, in a cache named by a fingerprint of the data:
$XDG_CACHE_HOME/cas-dm, or ~/.cache/cas-dm. There is no augmentation: the paper names none and improved-diffusion uses none.
"""
import hashlib
import math
import os
import stat
import struct
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from support import edges


class Images(NamedTuple):
    """A training set."""
    pixels: np.ndarray          # [N, H, W, 3] uint8 0..255, resident or memory-mapped
    labels: np.ndarray | None   # [N] int64
    name: str                   # for messages
    fingerprint: str            # hex digits that change when the images or their size do


class Dataset(NamedTuple):
    """What is known of a named set."""
    image_size: int             # the paper's (Cas-DM Sec. 5)
    num_classes: int | None = None
    label_names: tuple = ()


DATASETS = {
    "shapes": Dataset(16, 3, ("disc", "square", "triangle")),
    "cifar10": Dataset(32, 10, ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")),
    "celebahq": Dataset(64),
    "lsun-bedroom": Dataset(64),
    "imagenet64": Dataset(64, 1000),
}
FOLDER_SIZE = 64        # CHOICE: the paper's size beside CIFAR-10's 32
EXTENSIONS = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
              ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif", ".jp2", ".j2k"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")     # not EPS: Pillow hands it to ghostscript
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"     # of cifar-10-python.tar.gz
HERE = Path("data")     # where CIFAR-10 is or goes, if no --data-dir says otherwise
VERSION = 1             # of what a prepared file holds; part of every fingerprint


# ---- range ----

def from_pixels(pixels):
    """uint8 0..255 [B, H, W, 3], array or tensor -> float32 [-1, 1] [B, 3, H, W]: v / 127.5 - 1."""
    pixels = pixels if torch.is_tensor(pixels) else torch.from_numpy(np.array(pixels))      # a copy: a memory map cannot be written
    assert pixels.dtype == torch.uint8, f"expected uint8 pixels, got {pixels.dtype}"
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_pixels(x):
    """[-1, 1] [B, 3, H, W], clamped -> uint8 0..255 [B, H, W, 3] on the same device; the inverse of `from_pixels` on all 256 values.

    CHOICE: the nearest level; improved-diffusion truncates, which darkens by half a level.
    ValueError for NaN, which would be black.
    """
    if x.isnan().any():
        raise ValueError("the images hold NaN; expected numbers; the network that made them has diverged")
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# ---- chance ----

def stream(seed, purpose, index):
    """The numpy Generator of draw `index` for `purpose`: nothing else in the project draws, so nothing needs a saved random state."""
    return np.random.default_rng([*purpose.encode(), seed, index])


def batch_indices(n, batch_size, step, seed):
    """Which of n images batch `step` (0, 1, ...) holds -> int64 [batch_size].

    An epoch is one permutation of 0..n-1, from (seed, epoch); batches run on from one into the next, so n < batch_size is no error.
    """
    epoch, place = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    return np.concatenate([_order(n, seed, e)[place[epoch == e]] for e in range(epoch[0], epoch[-1] + 1)])


@lru_cache(maxsize=2)
def _order(n, seed, epoch):
    return stream(seed, "order", epoch).permutation(n)


# ---- images ----

def load_images(source, image_size=None, data_dir=None, skip_bad=False):
    """The images of `source`, centre-cropped and resized to `image_size` -> Images.

    source     : a name in DATASETS, a folder (recursive; its top sub-folders are the labels where every image lies in one of at least two),
                 or an images .npz (arr_0 uint8 [N, H, W, 3]; arr_1, if there, integer labels [N])
    image_size : None: a named set's own, an .npz file's own, FOLDER_SIZE for folders
    data_dir   : where CIFAR-10 is or goes (None: ./data); for celebahq, lsun-bedroom and imagenet64 the folder or .npz itself
    skip_bad   : leave out the image files that cannot be read, and count them in one warning
    ValueError, FileNotFoundError or OSError, one line, where that fails.
    """
    frames, labels, digest, own_size = _open(source, image_size, data_dir, skip_bad)
    size = image_size or own_size
    if size is None:
        raise ValueError(f"{source} holds images that are not square; expected square ones or a size to crop them to; give --image-size")
    fingerprint = hashlib.sha256(f"{VERSION} {size} {digest}".encode()).hexdigest()[:16]
    if isinstance(frames, np.ndarray) and frames.shape[1:3] == (size, size):
        return Images(frames, labels, str(source), fingerprint)
    return Images(*_prepared(frames, labels, size, fingerprint, source), str(source), fingerprint)


def raw_images(source, data_dir=None, skip_bad=False):
    """The images of `source` at their own size: an object with len() that yields uint8 [H, W, 3] arrays, in constant memory.

    A named set yields what `load_images` prepares. With skip_bad a folder may yield fewer than len().
    """
    return load_images(source, None, data_dir, skip_bad).pixels if source in DATASETS else _open(source, None, data_dir, skip_bad)[0]


def _open(source, image_size, data_dir, skip_bad):
    # -> frames (len() and iteration over uint8 [H, W, 3]), labels or None, digest of the content, own size or None
    own_size = DATASETS[source].image_size if source in DATASETS else None
    if source == "shapes":
        return *shapes(image_size or own_size), "shapes", own_size
    if source == "cifar10":
        cifar10 = _cifar10(Path(data_dir or HERE))
        return cifar10.data, np.array(cifar10.targets, np.int64), CIFAR10_SHA256, own_size
    if own_size and data_dir is None:
        raise ValueError(f"{source} has no download and no --data-dir was given; expected your copy, a folder of images or "
                         "an .npz with arr_0 uint8 [N, H, W, 3]; add --data-dir PATH")
    path = Path(data_dir if own_size else source)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected {', '.join(DATASETS)}, a folder of images or an .npz; check the path")
    frames, labels, digest, size = _open_folder(path, skip_bad) if path.is_dir() else _open_npz(path)
    return frames, labels, digest, own_size or size


def shapes(image_size=16):
    """4096 bright discs, squares and triangles on plain dark grounds -> uint8 [4096, S, S, 3], labels int64 [4096]; always the same."""
    draw = stream(0, "shapes", 0)
    n = 4096
    labels = draw.integers(3, size=n)
    centre = draw.uniform(-0.25, 0.25, (n, 2, 1, 1)).astype(np.float32)         # the picture is [-1, 1]^2, y down
    radius = draw.uniform(0.4, 0.6, (n, 1, 1)).astype(np.float32)
    bright, dark = 0.2 + 0.8 * _hue(draw.uniform(size=(n, 1))), 0.35 * _hue(draw.uniform(size=(n, 1)))      # [n, 3]
    grid = ((np.arange(image_size) + 0.5) * 2 / image_size - 1).astype(np.float32)
    pixels = np.empty((n, image_size, image_size, 3), np.uint8)
    for part in np.split(np.arange(n), 16):                                     # in parts, so that large sizes fit
        x, y = grid - centre[part, 0], grid[:, None] - centre[part, 1]          # [n/16, 1, S], [n/16, S, 1]
        outside = np.choose(labels[part, None, None], [                         # distance to the outline, negative inside: [n/16, S, S]
            np.hypot(x, y) - radius[part],
            np.maximum(abs(x), abs(y)) - 0.85 * radius[part],
            np.maximum(y, math.sqrt(0.75) * abs(x) - 0.5 * y) - radius[part] / 1.6])
        cover = np.clip(0.5 - outside * image_size / 2, 0, 1)[..., None]        # the pixel's share inside: anti-aliased
        pixels[part] = np.rint(255 * (dark[part, None, None] + cover * (bright - dark)[part, None, None]))
    return pixels, labels


def _hue(h):
    # [n, 1] in 0..1 -> the fully saturated colour [n, 3] in 0..1
    return np.clip(abs((h + np.array([0, 2, 1]) / 3) % 1 * 6 - 3) - 1, 0, 1).astype(np.float32)


def _cifar10(folder):
    try:
        return CIFAR10(folder)          # compares MD5 sums before it opens anything
    except RuntimeError:                # not unpacked there, or not whole
        archive = edges.download(CIFAR10.url, 170, "--data cifar10", "train the same model in small, offline: "
                                 "python train.py --model casdm --metric ssim=0.1 --data shapes", CIFAR10_SHA256, folder)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != CIFAR10_SHA256:
        raise ValueError(f"{archive} is damaged or another file; expected SHA-256 {CIFAR10_SHA256}; delete it and start again")
    return CIFAR10(folder, download=True)       # finds the archive, so it only unpacks


# ---- one image ----

def fit(image, size):
    """A Pillow RGB image -> uint8 [size, size, 3], exactly as improved-diffusion does.

    Halved by box filter while its shorter side is at least 2 size, scaled by bicubic filter until that side is size, centre-cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too thin to be cropped to a square")
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)))


def _rgb(image):
    # any Pillow image -> upright RGB. DEVIATION: improved-diffusion converts after resizing, drops alpha and clips 16 bits to white.
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("float pixels have no agreed range")
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("its pixels need more than 16 bits")
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))         # 0..65535 -> 0..255, to the nearest
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)        # CHOICE: on white
    return image.convert("RGB")


# ---- folders ----

class _Folder:
    # The images of a folder as uint8 [H, W, 3], at their own size or fitted to `size`; `bad` lists the indices that the last pass left out.

    def __init__(self, root, files, skip_bad, size=None):
        self.root, self.files, self.skip_bad, self.size, self.bad = root, files, skip_bad, size, []

    def __len__(self):
        return len(self.files)

    def __iter__(self):
        self.bad = []
        ahead = 2 * (os.cpu_count() or 1)       # Pillow decodes outside the interpreter's lock, so threads are enough
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self.files), ahead):
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    decoded = list(pool.map(self._decode, self.files[start:start + ahead]))
                for i, pixels in enumerate(decoded, start):
                    if isinstance(pixels, np.ndarray):
                        yield pixels
                    else:
                        self._refuse(i, pixels)
        self.warn(len(self.bad))

    def _decode(self, file):
        try:
            with Image.open(self.root / file, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                image = _rgb(image)
                return np.array(image) if self.size is None else fit(image, self.size)
        except Exception as e:      # a bad file can fail anywhere inside Pillow, and with any exception
            return e

    def _refuse(self, i, reason):
        if not self.skip_bad:
            reason = " ".join(str(reason).split())[:200] or type(reason).__name__
            raise ValueError(f"{self.root / self.files[i]} cannot be read ({reason}); expected a whole image; "
                             "use --skip-bad to leave such files out")
        self.bad.append(i)

    def warn(self, count):
        if count:
            warnings.warn(f"{count} of the {len(self)} image files in {self.root} cannot be read and are left out (--skip-bad)", stacklevel=2)


def _open_folder(root, skip_bad):
    Image.init()                    # registers every format, so that FORMATS can be looked up
    digest = hashlib.sha256(f"folder {bool(skip_bad)}".encode())
    files = []
    for file in _image_files(root):
        try:
            s = os.stat(root / file)
            regular, size, time = stat.S_ISREG(s.st_mode), s.st_size, s.st_mtime_ns
        except OSError:             # a link to nowhere: decoding names it
            regular, size, time = True, 0, 0
        if regular:                 # a pipe with a picture's name would never end
            files.append(file)
            digest.update(os.fsencode(file) + f"\0{size} {time}\n".encode())
    if not files:
        raise ValueError(f"{root} holds no images; expected files that end in {' '.join(sorted(EXTENSIONS))}; check the path")
    return _Folder(root, files, skip_bad), _folder_labels(files), digest.hexdigest(), FOLDER_SIZE


def _image_files(root):
    # paths relative to root, "/" between, sorted; hidden and foreign files left out; links followed, each real folder once
    files, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_unlistable):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        prefix = Path(folder).relative_to(root).as_posix() + "/"
        files += [(prefix + name).removeprefix("./") for name in names
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS]
    return sorted(files)


def _unlistable(e):
    raise OSError(f"{e.filename} cannot be listed ({e.strerror}); expected a folder that can be read; change its permissions or move it away")


def _folder_labels(files):
    # CHOICE: top sub-folders are classes where every image lies in one and there are at least two
    tops, labels = np.unique([file.split("/")[0] if "/" in file else "" for file in files], return_inverse=True)
    return labels.astype(np.int64) if len(tops) > 1 and tops[0] else None


# ---- npz ----

class _Packed:
    # The images of a compressed .npz as uint8 [H, W, 3], unpacked one by one.

    def __init__(self, path, shape, header):
        self.path, self.shape, self.header = path, shape, header

    def __len__(self):
        return self.shape[0]

    def __iter__(self):
        with edges.readable_npz(self.path), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            member.read(self.header)
            for _ in range(len(self)):
                yield np.frombuffer(bytearray(member.read(math.prod(self.shape[1:]))), np.uint8).reshape(self.shape[1:])


def _open_npz(path):
    with edges.readable_npz(path), zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        info = members.get("arr_0.npy")
        if info:
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                (shape, fortran_order, dtype), header = read_header(member), member.tell()
    if not info:
        raise ValueError(f"{path} holds {', '.join(list(members)[:5]) or 'nothing'}; expected arr_0, uint8 [N, H, W, 3]; "
                         "write it with numpy.savez(path, images)")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or 0 in shape:
        raise ValueError(f"{path} holds arr_0 {dtype} {list(shape)}{' in Fortran order' * fortran_order}; "
                         "expected uint8 [N, H, W, 3] of 0..255, N >= 1; convert it and write it with numpy.savez(path, images)")
    frames = _mapped(path, info, header, shape) if info.compress_type == zipfile.ZIP_STORED else _Packed(path, shape, header)
    content = [(members[name].CRC, members[name].file_size) for name in ("arr_0.npy", "arr_1.npy") if name in members]
    return frames, _npz_labels(path, shape[0]), f"npz {content}", shape[1] if shape[1] == shape[2] else None


def _mapped(path, info, header, shape):
    # The stored member as it lies in the file, without reading it. Up to 1 GiB its checksum is compared: a fraction of a second.
    with edges.readable_npz(path):
        with open(path, "rb") as f:
            f.seek(info.header_offset)
            name, extra = struct.unpack("<26x2H", f.read(30))       # zip's local header: 30 bytes, name, extra field
        member = np.memmap(path, np.uint8, "r", info.header_offset + 30 + name + extra, (info.file_size,))
        if info.file_size <= 2 ** 30 and zlib.crc32(member) != info.CRC:
            raise zipfile.BadZipFile("its checksum is wrong")
        return member[header:].reshape(shape)


def _npz_labels(path, n):
    labels = edges.read_npz(path, ["arr_1"]).get("arr_1")
    if labels is not None and (labels.shape != (n,) or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path} holds arr_1 {labels.dtype} {list(labels.shape)}; expected one integer label an image, [{n}]; "
                         "repair it or leave arr_1 out")
    return None if labels is None else labels.astype(np.int64)


# ---- cache ----

def _prepared(frames, labels, size, fingerprint, source):
    # -> pixels [N, size, size, 3], memory-mapped; labels of the images kept
    path = cache_folder() / f"{fingerprint}.npy"
    found = _cached(path, size, labels is not None)
    if found is None:
        print(f"preparing {source} at {size} x {size}, once, in {path}", file=sys.stderr)
        _write(path, frames, labels, size)
        found = _cached(path, size, labels is not None)
    elif isinstance(frames, _Folder):
        frames.warn(len(frames) - len(found[0]))
    return found


def _write(path, frames, labels, size):
    # Ordinary writes, never through a memory map, where a full disk is a SIGBUS. The header comes last: only then is the count known.
    if isinstance(frames, _Folder):
        fitted = frames = _Folder(frames.root, frames.files, frames.skip_bad, size)
    else:
        fitted = (fit(Image.fromarray(frame), size) for frame in frames)
    with edges.atomic(path) as f:
        count = 0
        _write_header(f, count, size)
        for count, frame in enumerate(tqdm(fitted, total=len(frames), desc="preparing", unit=" images"), 1):
            f.write(frame)
        if count == 0:
            raise ValueError(f"none of the {len(frames)} image files can be read; expected at least one whole image; check the folder")
        f.seek(0)
        _write_header(f, count, size)
        if labels is not None:          # before the pixels take their place: where they are, the labels are
            with edges.atomic(path.with_suffix(".labels.npy")) as g:
                np.save(g, np.delete(labels, frames.bad) if isinstance(frames, _Folder) else labels)


def _write_header(f, count, size):
    # numpy leaves room in it for the count to grow, so its length is the same for every count
    np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)})


def _cached(path, size, labelled):
    # what `_write` wrote, or None where it is absent or not whole
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        labels = np.load(path.with_suffix(".labels.npy"), allow_pickle=False) if labelled else None
    except (OSError, ValueError, EOFError):
        return None
    whole = pixels.shape[1:] == (size, size, 3) and pixels.offset + pixels.nbytes == path.stat().st_size
    return (pixels, labels) if whole and (labels is None or len(labels) == len(pixels)) else None


def cache_folder():
    """Where prepared images and statistics are kept, made if need be: $XDG_CACHE_HOME/cas-dm or ~/.cache/cas-dm. OSError, one line, where it cannot be."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cas-dm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "it cannot be written")
    except OSError as e:
        raise OSError(f"{folder} cannot hold prepared images ({e.strerror}); expected a folder that can be written; "
                      "set XDG_CACHE_HOME to one") from None
    return folder
