r"""Images of any kind as uint8 arrays: folders, .npz files, and the cache of what is prepared.

a folder    recursive; its top sub-folders are the labels where every image lies in one of at
            least two
an .npz     arr_0 uint8 [N, H, W, 3]; arr_1, if there, integer labels [N]
the cache   what is not one array of the right size yet is made one once, in a file named by a
            fingerprint of the data: $XDG_CACHE_HOME/cas-dm, or ~/.cache/cas-dm

IDDPM   arXiv:2102.09672v1, whose code (improved-diffusion) crops and resizes as `fit` does
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
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from support.cli import one_line, progress
from support.files import atomic, read_npz, readable_npz

FOLDER_SIZE = 64  # CHOICE: the paper's size beside CIFAR-10's 32
EXTENSIONS = {
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".dib",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".tga",
    ".avif",
    ".jp2",
    ".j2k",
}
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "DIB",
    "GIF",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "TGA",
)  # not EPS: Pillow hands it to ghostscript


class Frames(NamedTuple):
    """Images as they were found."""

    pixels: Collection  # len() and iteration over uint8 [H, W, 3], whose sizes may differ
    labels: np.ndarray | None  # [N] int64
    digest: str  # of the content
    size: int | None  # the side that they have or should get; None: they are not square


def open_path(path, skip_bad):
    """The images of a folder or an .npz -> Frames."""
    return _open_folder(path, skip_bad) if path.is_dir() else _open_npz(path)


# ---- one image ----


def fit(image, size):
    """A Pillow RGB image -> uint8 [size, size, 3], exactly as improved-diffusion does.

    Halved by box filter while its shorter side is at least 2 size, scaled by bicubic filter until
    that side is size, centre-cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} pixels are too thin to be cropped to a square"
        )
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(image.crop((left, top, left + size, top + size)))


def _rgb(image):
    # any Pillow image -> upright RGB
    # DEVIATION: improved-diffusion converts after resizing, drops alpha and clips 16 bits to white
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("float pixels have no agreed range")
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("its pixels need more than 16 bits")
        levels = (deep + 128) // 257  # 0..65535 -> 0..255, to the nearest
        image = Image.fromarray(levels.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")  # CHOICE: on white
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


# ---- folders ----


class _Folder:
    # The images of a folder as uint8 [H, W, 3], at their own size or fitted to `size`.
    # `bad` lists the indices that the last pass left out.

    def __init__(self, root, files, skip_bad, size=None):
        self.root, self.files, self.skip_bad, self.size, self.bad = root, files, skip_bad, size, []

    def __len__(self):
        return len(self.files)

    def __iter__(self):
        self.bad = []
        ahead = 2 * (os.cpu_count() or 1)
        # Pillow decodes outside the interpreter's lock, so threads are enough
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self.files), ahead):
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    decoded = list(pool.map(self._decode, self.files[start : start + ahead]))
                for i, pixels in enumerate(decoded, start):
                    if isinstance(pixels, np.ndarray):
                        yield pixels
                    else:
                        self._refuse(i, pixels)
        self.warn(len(self.bad))

    def _decode(self, file):
        try:
            formats = [f for f in FORMATS if f in Image.OPEN]
            with Image.open(self.root / file, formats=formats) as image:
                image = _rgb(image)
                return np.array(image) if self.size is None else fit(image, self.size)
        except Exception as e:  # a bad file can fail anywhere inside Pillow, and with any exception
            return e

    def _refuse(self, i, reason):
        if not self.skip_bad:
            reason = one_line(reason)[:200] or type(reason).__name__
            raise ValueError(
                f"{self.root / self.files[i]} cannot be read ({reason}); expected a whole image; "
                "use --skip-bad to leave such files out"
            )
        self.bad.append(i)

    def warn(self, count):
        """Says how many images were left out, where some were."""
        if count:
            warnings.warn(
                f"{count} of the {len(self)} image files in {self.root} cannot be read "
                "and are left out (--skip-bad)",
                stacklevel=2,
            )


def _open_folder(root, skip_bad):
    Image.init()  # registers every format, so that FORMATS can be looked up
    digest = hashlib.sha256(f"folder {bool(skip_bad)}".encode())
    files = []
    for file in _image_files(root):
        try:
            found = os.stat(root / file)
            regular, size, time = stat.S_ISREG(found.st_mode), found.st_size, found.st_mtime_ns
        except OSError:  # a link to nowhere: decoding names it
            regular, size, time = True, 0, 0
        if regular:  # a pipe with a picture's name would never end
            files.append(file)
            digest.update(os.fsencode(file) + f"\0{size} {time}\n".encode())
    if not files:
        raise ValueError(
            f"{root} holds no images; "
            f"expected files that end in {' '.join(sorted(EXTENSIONS))}; check the path"
        )
    labels = _folder_labels(files)
    return Frames(_Folder(root, files, skip_bad), labels, digest.hexdigest(), FOLDER_SIZE)


def _image_files(root):
    # paths relative to root, "/" between, sorted; hidden and foreign files are left out;
    # links are followed, each real folder once
    files, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_unlistable):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        prefix = Path(folder).relative_to(root).as_posix() + "/"
        files += [
            (prefix + name).removeprefix("./")
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    return sorted(files)


def _unlistable(e):
    raise OSError(
        f"{e.filename} cannot be listed ({e.strerror}); expected a folder that can be read; "
        "change its permissions or move it away"
    )


def _folder_labels(files):
    # CHOICE: top sub-folders are classes where every image lies in one and there are at least two
    tops, labels = np.unique(
        [file.split("/")[0] if "/" in file else "" for file in files], return_inverse=True
    )
    return labels.astype(np.int64) if len(tops) > 1 and tops[0] else None


# ---- npz ----


class _Packed:
    # The images of a compressed .npz as uint8 [H, W, 3], unpacked one by one.

    def __init__(self, path, shape, header):
        self.path, self.shape, self.header = path, shape, header

    def __len__(self):
        return self.shape[0]

    def __iter__(self):
        with (
            readable_npz(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open("arr_0.npy") as member,
        ):
            member.read(self.header)
            for _ in range(len(self)):
                yield np.frombuffer(
                    bytearray(member.read(math.prod(self.shape[1:]))), np.uint8
                ).reshape(self.shape[1:])


def _open_npz(path):
    with readable_npz(path), zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        info = members.get("arr_0.npy")
        if info:
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read_header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                (shape, fortran_order, dtype), header = read_header(member), member.tell()
    if not info:
        raise ValueError(
            f"{path} holds {', '.join(list(members)[:5]) or 'nothing'}; "
            "expected arr_0, uint8 [N, H, W, 3]; write it with numpy.savez(path, images)"
        )
    order = " in Fortran order" if fortran_order else ""
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or 0 in shape:
        raise ValueError(
            f"{path} holds arr_0 {dtype} {list(shape)}{order}; "
            "expected uint8 [N, H, W, 3] of 0..255, N >= 1; "
            "convert it and write it with numpy.savez(path, images)"
        )
    if info.compress_type == zipfile.ZIP_STORED:
        frames = _mapped(path, info, header, shape)
    else:
        frames = _Packed(path, shape, header)
    content = [
        (members[name].CRC, members[name].file_size)
        for name in ("arr_0.npy", "arr_1.npy")
        if name in members
    ]
    size = shape[1] if shape[1] == shape[2] else None
    return Frames(frames, _npz_labels(path, shape[0]), f"npz {content}", size)


def _mapped(path, info, header, shape):
    # The stored member as it lies in the file, without reading it.
    # Up to 1 GiB its checksum is compared, which takes a fraction of a second.
    with readable_npz(path):
        with open(path, "rb") as f:
            f.seek(info.header_offset)
            # zip's local header: 30 bytes, name, extra field
            name, extra = struct.unpack("<26x2H", f.read(30))
        begin = info.header_offset + 30 + name + extra
        member = np.memmap(path, np.uint8, "r", begin, (info.file_size,))
        if info.file_size <= 2**30 and zlib.crc32(member) != info.CRC:
            raise zipfile.BadZipFile("its checksum is wrong")
        return member[header:].reshape(shape)


def _npz_labels(path, n):
    labels = read_npz(path, ["arr_1"]).get("arr_1")
    if labels is not None and (labels.shape != (n,) or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"{path} holds arr_1 {labels.dtype} {list(labels.shape)}; "
            f"expected one integer label an image, [{n}]; repair it or leave arr_1 out"
        )
    return None if labels is None else labels.astype(np.int64)


# ---- cache ----


def prepared(frames, labels, size, fingerprint, source):
    """pixels [N, size, size, 3], memory-mapped, and the labels of the images kept."""
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
    # Ordinary writes, never through a memory map, where a full disk is a SIGBUS.
    # The header comes last: only then is the count known.
    if isinstance(frames, _Folder):
        fitted = frames = _Folder(frames.root, frames.files, frames.skip_bad, size)
    else:
        fitted = (fit(Image.fromarray(frame), size) for frame in frames)
    with atomic(path) as f:
        count = 0
        _write_header(f, count, size)
        with progress(len(frames), "preparing", "image") as bar:
            for frame in fitted:
                f.write(frame)
                count += 1
                bar.update()
        if count == 0:
            raise ValueError(
                f"none of the {len(frames)} image files can be read; "
                "expected at least one whole image; check the folder"
            )
        f.seek(0)
        _write_header(f, count, size)
        if labels is not None:  # before the pixels take their place: where they are, the labels are
            with atomic(path.with_suffix(".labels.npy")) as g:
                if isinstance(frames, _Folder):
                    labels = np.delete(labels, frames.bad)
                np.save(g, labels)


def _write_header(f, count, size):
    # numpy leaves room in it for the count to grow, so its length is the same for every count
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    np.lib.format.write_array_header_1_0(f, header)


def _cached(path, size, labelled):
    # what `_write` wrote, or None where it is absent or not whole
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        labels = np.load(path.with_suffix(".labels.npy"), allow_pickle=False) if labelled else None
    except (OSError, ValueError, EOFError):
        return None
    whole = (
        pixels.shape[1:] == (size, size, 3) and pixels.offset + pixels.nbytes == path.stat().st_size
    )
    return (pixels, labels) if whole and (labels is None or len(labels) == len(pixels)) else None


def cache_folder():
    """Where prepared images and statistics are kept, made if need be.

    $XDG_CACHE_HOME/cas-dm or ~/.cache/cas-dm.  OSError, one line, where it cannot be.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cas-dm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "it cannot be written")
    except OSError as e:
        raise OSError(
            f"{folder} cannot hold prepared images ({e.strerror}); "
            "expected a folder that can be written; set XDG_CACHE_HOME to one"
        ) from None
    return folder
