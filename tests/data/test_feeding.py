"""Batches from worker processes and from the cache: the same as from threads, bit for bit."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numbered import Numbers
from PIL import Image
from skimage import data as photographs
from test_data import image_data
from test_resume import fit_toy, toy_stage

from gae_jax.config import default_config
from gae_jax.config.validate import validate
from gae_jax.data import cache, cache_fill, workers
from gae_jax.data.batches import ReadAhead
from gae_jax.data.cached_images import DecodedRows
from gae_jax.data.pipeline import ImageData, more_cores
from gae_jax.data.rows import OrderedRows
from gae_jax.data.sources.folder import PackedNames
from gae_jax.data.workers import WorkerBatches
from gae_jax.runtime import distributed
from gae_jax.runtime.errors import ConfigError, DataError, UserError
from gae_jax.train import feed
from gae_jax.train.log import read_metrics

COUNT = 30
ROOT = Path(__file__).parents[2]


def jpeg(index: int, suffix: str = "jpeg") -> bytes:
    """A photograph's part, of a size of its own."""
    pixels = photographs.astronaut()[7 * index :, 5 * index :][: 40 + index, : 50 + index % 7]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix, quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Class folders of small photographs; not to be changed."""
    return write_tree(tmp_path_factory.mktemp("feeding") / "images")


def write_tree(root: Path) -> Path:
    for index in range(COUNT):
        path = root / f"class-{index % 3}" / f"{index:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(index))
    return root


def of(root, **changes) -> ImageData:
    fields = dict(name="folder", root=str(root), holdout=0.0, mirror=True, crop="random")
    fields["image_size"] = 32
    return image_data(**fields | changes)


def training(data, count, *, start=0, rows=None, size=8):
    batches = data.training_batches(data.source("train"), size, seed=5).read(rows, start)
    iterator = iter(batches)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def same(one, other) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def children() -> set[int]:
    """Processes that this one started and did not wait for, zombies among them."""
    found = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True
    )
    return {int(line.split()[0]) for line in found.stdout.splitlines() if "worker" in line}


# a random crop depends on all that a centre crop does, and on the numbers drawn for it
@pytest.mark.parametrize("crop", [pytest.param("center", marks=pytest.mark.slow), "random"])
def test_batches_are_the_same_from_threads_processes_and_caches(tree, tmp_path, crop):
    wanted = training(of(tree, crop=crop), 9)  # into the third epoch
    for count in (1, 2):
        same(training(of(tree, crop=crop, workers=count), 9), wanted)
    for where in cache.CACHES[1:]:
        kept = dict(crop=crop, cache=where, cache_dir=str(tmp_path))
        same(training(of(tree, workers=2, **kept), 9), wanted)
        same(training(of(tree, workers=0, **kept), 9), wanted)
    rows = [0, 3, 4]
    later = [{name: value[rows] for name, value in batch.items()} for batch in wanted[4:7]]
    same(training(of(tree, crop=crop, workers=2), 3, start=4, rows=rows), later)
    assert not children()


# what the crops do is in test_crops; here they go through workers and caches alike
@pytest.mark.parametrize("crop", [pytest.param("adm", marks=pytest.mark.slow), "lightningdit"])
def test_the_ordered_pass_is_the_same(tree, tmp_path, crop):
    def passed(data, **more):
        return list(data.ordered(data.source("train"), 7, crop, **more))

    wanted = passed(of(tree))
    same(passed(of(tree, workers=2)), wanted)
    for training_crop in ("center", "random"):
        kept = dict(crop=training_crop, cache="disk", cache_dir=str(tmp_path))
        same(passed(of(tree, workers=2, **kept)), wanted)
    chosen = dict(indices=[5, 2, 29], batches=2)
    same(passed(of(tree, workers=1), **chosen), passed(of(tree), **chosen))


def test_what_a_corrupt_image_says_reaches_its_batch(tree, tmp_path):
    root = write_tree(tmp_path / "images")
    (root / "class-1" / "13.jpg").write_bytes(b"no image")
    data = of(root, workers=2)
    source = data.source("train")
    at = [source._name(index).name for index in range(len(source))].index("13.jpg")
    batches = data.ordered(source, 4)
    for _ in range(at // 4):  # those before it are whole
        next(batches)
    with pytest.raises(DataError, match=r"class-1/13.jpg cannot be read .*on_corrupt=skip"):
        next(batches)
    assert not children()


@pytest.mark.parametrize("where", cache.CACHES)
def test_corrupt_images_are_skipped_named_and_counted(tmp_path, caplog, where):
    root = write_tree(tmp_path / "images")
    bad = [root / "class-1" / "13.jpg", root / "class-2" / "29.jpg"]
    for path in bad:
        path.write_bytes(b"no image")
    skipping = dict(on_corrupt="skip", crop="center")
    wanted = list((data := of(root, **skipping)).ordered(data.source("train"), 7))
    assert sum(batch["valid"].sum() for batch in wanted) == COUNT - 2
    data = of(root, **skipping, workers=2, cache=where, cache_dir=str(tmp_path / "cache"))
    for source in (data.source("train"), data.source("train")):  # the second from the cache
        caplog.clear()
        same(list(data.ordered(source, 7)), wanted)
        assert source.skipped == set(bad)
        for path in bad:
            assert caplog.text.count(f"skipped {path}") == 1
    if where == "disk":  # what is kept does not hide what is wrong
        data = of(root, crop="center", cache=where, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(DataError, match=r"13.jpg cannot be read"):
            list(data.ordered(data.source("train"), 7))


def test_orientations_that_workers_ignore_are_told_once(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    for index in range(12):
        image, exif = Image.open(io.BytesIO(jpeg(index))), Image.Exif()
        exif[0x112] = 6 if index < 3 else 1
        image.save(tmp_path / "a" / f"{index}.jpg", exif=exif)
    data = of(tmp_path, workers=2)
    list(data.ordered(data.source("train"), 4))
    assert caplog.text.count("3 of the first 12 images read") == 1


def test_orientations_count_once_though_workers_read_an_image_twice(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    for index in range(12):
        image, exif = Image.open(io.BytesIO(jpeg(index))), Image.Exif()
        exif[0x112] = 6 if index < 3 else 1
        image.save(tmp_path / "a" / f"{index}.jpg", exif=exif)
    source = of(tmp_path).source("train")
    rows = OrderedRows(source, image_size=16, crop="adm", indices=[0] * 8 + [*range(12)])
    batches = WorkerBatches(rows, size=2, rows=range(2), start=0, end=10, count=2)
    list(batches)
    assert caplog.text.count("3 of the first 12 images read") == 1


def test_a_killed_worker_is_replaced(tree, caplog):
    wanted = training(of(tree), 12)
    data = of(tree, workers=2)
    iterator = data.training_batches(data.source("train"), 8, seed=5).read()
    found = [next(iterator)]
    for at in range(11):
        if at in (2, 5):
            os.kill(iterator._workers[0].process.pid, signal.SIGKILL)
        found.append(next(iterator))
    iterator.close()
    same(found, wanted)
    assert "was ended by signal 9 (SIGKILL); another takes its place" in caplog.text
    assert not children()


def ordered(source, count=2, size=4):
    rows = OrderedRows(source, image_size=16, crop="adm", indices=range(len(source)))
    return WorkerBatches(rows, size=size, rows=range(size), start=0, end=3, count=count)


def test_an_image_that_kills_its_workers_is_named():
    batches = ordered(Numbers("die"))
    next(batches)
    with pytest.raises(DataError, match=r"number 5: 3 worker processes in turn .*SIGKILL"):
        next(batches)
    assert not children()


def test_an_error_of_a_worker_is_raised_as_it_is():
    batches = ordered(Numbers("raise"))
    next(batches)
    with pytest.raises(ConfigError, match="of a worker"):
        next(batches)


def test_workers_do_not_import_jax():
    batches = list(ordered(Numbers("")))
    assert [batch["label"].sum() for batch in batches] == [0, 0, 0]


def test_workers_that_cannot_start_are_told(monkeypatch, capfd):
    monkeypatch.setattr(workers, "START", "raise SystemExit('no such thing')")
    with pytest.raises(DataError, match=r"before they are ready .*data.workers=0 reads in threads"):
        next(ordered(Numbers("")))
    assert "no such thing" in capfd.readouterr().err


PROGRAM = """
import sys, time
sys.path[:0] = {tests!r}
from test_feeding import of
data = of({root!r}, workers=2)
batches = data.training_batches(data.source("train"), 8, seed=5).read()
next(batches)
print(*(one.process.pid for one in batches._workers), flush=True)
while True:
    next(batches)
"""


# like SIGINT it reaches the group, and like SIGKILL it ends the parent at once
SIGTERM = pytest.param(signal.SIGTERM, marks=pytest.mark.slow)


@pytest.mark.parametrize("number", [signal.SIGINT, SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_parent_that_ends(tree, number):
    """Signals reach the whole group, as Ctrl-C does; SIGKILL only the parent."""
    folders = [path for path in sys.path if path.startswith(str(ROOT / "tests"))]
    program = PROGRAM.format(tests=folders, root=str(tree))
    before = shared_memory()
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        **dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
        start_new_session=True,
    )
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    if number == signal.SIGKILL:
        parent.kill()
    else:
        os.killpg(parent.pid, number)
    _, said = parent.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))
    # the parent's own, which may be in a destructor besides
    assert ("Traceback" in said) == (number == signal.SIGINT)
    assert shared_memory() <= before


def shared_memory() -> set[str]:
    """Named blocks of Python's shared memory; other programs have other names."""
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        status = Path(f"/proc/{pid}/status").read_text()
        return "State:\tZ" not in status
    return False


def test_names_travel_as_one_array():
    names = ["a/0.jpg", "ä b/1.jpg", os.fsdecode(b"a/\xff.jpg")]
    assert list(pickle.loads(pickle.dumps(PackedNames(names)))) == names
    assert len(pickle.dumps(PackedNames([f"{n:09}" for n in range(1000)]))) < 20_000


def test_closing_while_a_thread_waits_ends_both(tree):
    data = of(tree, workers=2)
    ahead = ReadAhead(data.training_batches(data.source("train"), 8, seed=5).read())
    ahead.get()
    start = time.monotonic()
    ahead.close()
    assert time.monotonic() - start < 9
    assert not ahead._thread.is_alive()
    assert not children()


def test_few_images_and_images_in_memory_are_read_in_threads(tree, monkeypatch):
    data = of(tree, workers="auto")
    assert data.processes(data.source("train"), COUNT) == 0
    monkeypatch.setattr("gae_jax.data.pipeline.cores", lambda: 6)
    assert data.processes(data.source("train"), 1_000) == 6
    digits = image_data(workers=4)
    assert digits.processes(digits.source("train"), 10**6) == 0
    assert [of(tree, workers=n).threads for n in ("auto", 0, 3)] == [6, 6, 3]


def kept(root, folder, **changes) -> ImageData:
    return of(root, **dict(crop="center", cache="disk", cache_dir=str(folder)) | changes)


def fill(data) -> list[int]:
    """The images that were decoded to fill the cache."""
    source, reads = data.source("train"), []
    own = source._encoded
    source._encoded = lambda index: reads.append(index) or own(index)
    data.cached(source)
    return sorted(set(reads))


def test_a_large_image_that_vanishes_during_a_fill_is_named(tmp_path):
    source = of(write_tree(tmp_path / "images"), on_corrupt="skip").source("train")
    rows = DecodedRows(source, "decoded", 0, capacity=1)
    pixels, _ = rows.read(0)
    np.testing.assert_array_equal(rows.read_again(0, pixels.size), pixels)
    (tmp_path / "images/class-0/00.jpg").unlink()
    with pytest.raises(DataError, match=r"00\.jpg has changed while the cache was filled"):
        rows.read_again(0, pixels.size)


def test_a_fill_that_was_interrupted_goes_on(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_fill, "BATCH", 4)
    monkeypatch.setattr(cache_fill, "NOTE_SECONDS", 0.0)
    write_npz, written = cache_fill.write_npz, []

    def write(path, arrays, **options):
        write_npz(path, arrays, **options)
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cache_fill, "write_npz", write)
    with pytest.raises(KeyboardInterrupt):
        fill(kept(tree, tmp_path))
    monkeypatch.setattr(cache_fill, "write_npz", write_npz)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "manifest.json").exists()
    with (folder / "pixels.partial").open("ab") as file:  # beyond the last note
        file.write(b"rest of a killed process")
    assert fill(kept(tree, tmp_path)) == [*range(12, COUNT)]
    same(training(kept(tree, tmp_path), 8), training(of(tree, crop="center"), 8))
    assert fill(kept(tree, tmp_path)) == []
    assert sorted(path.name for path in folder.iterdir()) == [
        *("index.npz", "lock", "manifest.json", "pixels"),
    ]


def test_a_cache_is_of_these_files_crops_and_sizes(tmp_path):
    root, folder = write_tree(tmp_path / "images"), tmp_path / "cache"
    path = root / "class-0" / "00.jpg"
    for changes in ({}, dict(image_size=24), dict(crop="random")):
        assert fill(kept(root, folder, **changes)) == [*range(COUNT)]
    assert len(list(folder.iterdir())) == 3
    path.write_bytes(jpeg(29))
    os.utime(path, ns=(1, 1))
    same(training(kept(root, folder), 4), training(of(root, crop="center"), 4))
    assert len(list(folder.iterdir())) == 4


def test_a_cache_that_does_not_fit_is_refused(tree, tmp_path, monkeypatch):
    usage = cache_fill.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_fill.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DataError, match=r"needs 0.00 GiB for 30 images .*data.cache_dir"):
        fill(kept(tree, tmp_path))
    monkeypatch.setattr(cache_fill, "_free_memory", lambda: 100)
    with pytest.raises(DataError, match=r"cache=memory needs .*data.cache=disk"):
        fill(of(tree, crop="center", cache="memory", image_size=15))


def test_a_damaged_cache_is_refused(tree, tmp_path):
    fill(kept(tree, tmp_path))
    (folder,) = tmp_path.iterdir()
    with (folder / "pixels").open("ab") as file:
        file.truncate(5)
    cache._CACHED.clear()
    with pytest.raises(DataError, match=r"pixels has 5 bytes, its manifest says .* remove"):
        fill(kept(tree, tmp_path))
    for name in ("manifest.json", "index.npz"):
        (folder / name).write_bytes((folder / name).read_bytes()[:20])
        with pytest.raises(UserError, match=rf"{name} is .*; remove {folder} and start again"):
            fill(kept(tree, tmp_path))


def test_large_images_with_random_crops_are_not_kept(tree, tmp_path, caplog):
    cache._warn_too_large.cache_clear()
    for split in ("train", "train", "holdout"):  # a pipeline each; one line for all
        data = of(tree, image_size=8, cache="disk", cache_dir=str(tmp_path), holdout=0.2)
        source = data.source(split)
        assert data.cached(source) is source
    assert caplog.text.count("random crops need whole images") == 1


def test_what_a_waiting_device_is_told_can_be_done(tree, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name in ("cores", "cores_of_machine"):
        monkeypatch.setattr(f"gae_jax.data.pipeline.{name}", lambda: 6)
    few = of(tree, workers=2, crop="center")
    remedy = few.remedy(few.source("train"), 2)
    assert "set data.workers=6 (now 2); or set data.cache=disk" in remedy
    taken = dataclasses.replace(few, workers=6, cache="disk")
    remedy = taken.remedy(taken.source("train"), 6)
    assert remedy.startswith("take a machine of more than 6 cores")
    assert "python -m gae_jax doctor" in remedy
    digits = image_data(workers=4)
    assert "set data.workers=6 (now 4 threads)" in digits.remedy(digits.source("train"), 0)
    monkeypatch.setattr("gae_jax.data.pipeline.cores_of_machine", lambda: 8)
    assert "more than 6 of the machine's 8 cores (taskset" in more_cores()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "--cpus-per-task" in more_cores()
    assert "--cpus-per-task" in (ROOT / "launch" / "slurm.sh").read_text()


def test_processes_of_one_machine_divide_its_cores(monkeypatch):
    def cores(*processes):
        monkeypatch.setattr(distributed, "_cores", list(processes))
        found = []
        for index in range(len(processes)):
            monkeypatch.setitem(distributed._process, "index", index)
            found.append(distributed.cores())
        return found

    eight = [*range(8)]
    assert cores(("a", eight), ("a", eight), ("b", eight)) == [4, 4, 8]
    assert cores(("a", [0, 1, 2]), ("a", [3, 4])) == [3, 2]  # each has its own already
    assert cores(*[("a", eight)] * 3) == [2, 2, 2]
    assert cores(*[("a", [0])] * 4) == [1, 1, 1, 1]
    monkeypatch.undo()
    assert distributed.cores() == len(os.sched_getaffinity(0))


def test_a_few_images_do_not_fill_a_cache(tree, tmp_path):
    data = kept(tree, tmp_path)
    source = data.source("train")
    assert len(list(data.ordered(source, 2, indices=range(4)))) == 2
    assert not list(tmp_path.iterdir())
    list(data.ordered(source, 8))
    (path,) = tmp_path.glob("*/manifest.json")
    assert json.loads(path.read_text())["images"] == COUNT


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(workers="many"), "data.workers is 'many'; give a number of processes"),
        (dict(workers=-1), "data.workers is -1"),
        (dict(cache="ram"), "data.cache is 'ram'; use one of none, memory, disk"),
    ],
)
def test_other_values_are_refused(changes, says):
    config = default_config()
    for number in (3, "3", "auto"):
        config.data.workers = number
        validate(config)
    config.data.update(changes)
    with pytest.raises(ConfigError, match=says):
        validate(config)


@pytest.mark.parametrize("pause", [0.0, 0.03])
def test_waiting_for_data_is_measured_and_told_once(tmp_path, caplog, monkeypatch, pause):
    monkeypatch.setattr(feed, "MEASURED", 0.0)
    stage = toy_stage(lambda matrix, step: (matrix**2).mean())
    quick = stage.batches(8)

    def slow(item):
        time.sleep(pause / 8)
        return item

    batches = dataclasses.replace(quick, examples=quick.examples.map(slow), remedy="do this")
    stage = dataclasses.replace(stage, batches=lambda size: batches)
    fit_toy(stage, tmp_path, steps=40, log_every=10, save_every=40)
    waits = [row["data_wait"] for row in read_metrics(tmp_path)]
    assert len(waits) == 4
    assert all(0 <= wait <= 1 for wait in waits)
    if pause:
        assert min(waits[1:]) > 0.3
        assert caplog.text.count("% of the time; do this") == 1


def test_time_in_which_the_device_works_is_not_waiting():
    """The batch comes after 0.2 s, the device has something to do for half of that."""
    waiting = object.__new__(feed.Feed)
    waiting.waited, start = 0.0, time.perf_counter()

    def items():
        time.sleep(0.2)
        yield "batch"

    waiting._ahead = ReadAhead(items())
    assert waiting._get(lambda: time.perf_counter() - start > 0.1) == "batch"
    waiting.close()
    assert 0.02 < waiting.waited < 0.19
