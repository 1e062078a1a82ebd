"""Before any test loads torch: one thread, here and in the scripts that tests start.

The networks are tiny, and two threads that wait by spinning made the suite ten times slower beside
any other busy process.
"""

import functools
import gc
import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """Imported modules stay for good, so the garbage collector need not scan them."""
    if not gc.get_freeze_count():
        gc.freeze()
        gc.set_threshold(10_000)


@pytest.fixture(autouse=True, scope="session")
def shapes_once():
    """The 4,096 shapes of a run are drawn once a size, and not for every run."""
    import data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "shapes", functools.cache(data.shapes))
        yield


@pytest.fixture
def images(tmp_path):
    """Ten 16 x 16 images of three classes; batches of 4 end an epoch inside the third step."""
    import numpy as np

    from made import random_pixels

    path = tmp_path / "images.npz"
    np.savez(path, arr_0=random_pixels(10, 16, 16), arr_1=np.arange(10) % 3)
    return path


@pytest.fixture(scope="session")
def one_step(tmp_path_factory):
    """The folder of a small run of one step on shapes; Dual Diffusion has all three losses."""
    from runs import SMALL, run

    folder = tmp_path_factory.mktemp("one_step") / "run"
    assert run(*SMALL, "--model", "dual", "--iterations", 1, "--out", folder) == 0
    return folder


@pytest.fixture
def begun_run(one_step, tmp_path):
    """A copy of that run, which the test may change."""
    return Path(shutil.copytree(one_step, tmp_path / "run"))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own: its folder, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cas-dm"


@pytest.fixture
def folder(tmp_path):
    """A folder of six 20 x 12 pictures of random pixels, 0.png to 5.png."""
    from PIL import Image

    from made import random_pixels

    path = tmp_path / "pictures"
    path.mkdir()
    for i, picture in enumerate(random_pixels(6, 12, 20)):
        Image.fromarray(picture).save(path / f"{i}.png")
    return path
