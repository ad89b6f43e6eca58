"""Data modules and batches."""

import gzip
import hashlib
import io
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pl_sparse.tasks import data
from pl_sparse.tasks.data import MNIST, MNIST1D, Batches, Digits, FashionMNIST, ImageFolder


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return head + array.astype(np.uint8).tobytes()


def tiny_mnist() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": idx(random.integers(0, 256, (60, 28, 28))),
        "train-labels-idx1-ubyte": idx(random.integers(0, 10, 60)),
        "t10k-images-idx3-ubyte": idx(random.integers(0, 256, (20, 28, 28))),
        "t10k-labels-idx1-ubyte": idx(random.integers(0, 10, 20)),
    }


def test_batches_cover_everything_once_in_an_order_of_the_epoch() -> None:
    x = torch.arange(25).float()
    batches = Batches(x, x.long(), 4, shuffle=True, seed=7)
    epochs = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        seen = torch.cat([b for b, _ in batches])
        assert len(batches) == 7 and torch.equal(seen.sort().values, x)
        epochs.append(seen)
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    assert len(Batches(x, x, 4, drop_last=True)) == 6 == len(list(Batches(x, x, 4, drop_last=True)))


def test_batches_resume_in_the_middle() -> None:
    x = torch.arange(20)
    whole = Batches(x, x, 3, shuffle=True)
    iterator = iter(whole)
    for _ in range(3):
        next(iterator)
    again = Batches(x, x, 3, shuffle=True)
    again.load_state_dict(whole.state_dict())
    assert [b.tolist() for b, _ in again] == [b.tolist() for b, _ in iterator]
    assert whole.state_dict() == {"batch": 0} and len(list(again)) == 7


def test_processes_share_the_samples() -> None:
    x = torch.arange(21)
    parts = [Batches(x, x, 4, shuffle=True, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    seen = [torch.cat([b for b, _ in part]) for part in parts]
    assert len(seen[0]) == len(seen[1]) == 11
    assert set(torch.cat(seen).tolist()) == set(range(21))


def test_digits() -> None:
    digits = Digits(batch_size=50)
    digits.setup()
    sizes = [
        len(batches.x) for batches in (digits.train_dataloader(), digits.val_dataloader(), digits.test_dataloader())
    ]
    assert sizes == [1257, 180, 360]
    x, y = next(iter(digits.train_dataloader()))
    assert x.shape == (50, *digits.shape) and int(y.max()) < digits.classes
    assert abs(float(digits.train_dataloader().x.mean())) < 0.01
    assert len(Digits(limit=100).train_dataloader().x) == 100


def test_mnist1d_leaves_the_random_state_alone() -> None:
    pytest.importorskip("mnist1d")
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    module = MNIST1D()
    module.setup()
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr]
    assert module.train_dataloader().x.shape == (3600, 40) and module.test_dataloader().x.shape == (1000, 40)


def test_a_missing_generator_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mnist1d.data", None)
    with pytest.raises(ImportError, match=r"pip install 'pl_sparse\[mnist1d\]'"):
        MNIST1D().setup()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("raw", [True, False])
def test_mnist_from_a_folder(tmp_path: Path, packed: bool, raw: bool) -> None:
    folder = tmp_path / "raw" if raw else tmp_path
    folder.mkdir(exist_ok=True)
    for name, content in tiny_mnist().items():
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    module = MNIST(root=tmp_path, validation=10)
    module.setup()
    assert [len(b.x) for b in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())] == [
        50,
        10,
        20,
    ]
    pixel = torch.tensor(np.frombuffer(tiny_mnist()["t10k-images-idx3-ubyte"], np.uint8)[16]).float() / 255
    assert float(module.test_dataloader().x[0, 0, 0, 0]) == pytest.approx(float((pixel - 0.1307) / 0.3081))


def test_a_download_is_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_SPARSE_DATA", str(tmp_path))
    files = tiny_mnist()
    asked = []

    def urlopen(address: str, timeout: float) -> Any:
        asked.append(address)
        return io.BytesIO(gzip.compress(files[address.rpartition("/")[2].removesuffix(".gz")]))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(FashionMNIST, "name", "tiny")
    monkeypatch.setattr(FashionMNIST, "md5", ("0" * 32,) * 4)
    with pytest.raises(FileNotFoundError, match=r"checksum .* not 000.* was not kept"):
        FashionMNIST(validation=5).setup()
    assert not list(tmp_path.rglob("*.gz"))
    sums = tuple(hashlib.md5(content).hexdigest() for content in files.values())
    monkeypatch.setattr(FashionMNIST, "md5", sums)
    for _ in range(2):
        FashionMNIST(validation=5).setup()
    assert len(asked) == 5 and len(list(tmp_path.rglob("*.gz"))) == 4


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.root=.* has no train-images"):
        MNIST(root=tmp_path).setup()

    def urlopen(address: str, timeout: float) -> Any:
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(MNIST, "name", "nowhere")
    monkeypatch.setenv("PL_SPARSE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cannot be reached \(no route\).*data.root="):
        MNIST().setup()
    for name, content in tiny_mnist().items():
        (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte cannot be read: an idx file of shape"):
        MNIST(root=tmp_path).setup()
    with pytest.raises(ValueError, match="not an idx file"):
        data.read_idx(b"hello")


def test_image_folder(tmp_path: Path) -> None:
    for part, count in (("train", 10), ("test", 4)):
        for label, colour in (("cat", (200, 10, 10)), ("dog", (10, 10, 200))):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 12), colour).save(folder / f"{i}.png")
    module = ImageFolder(root=tmp_path, size=8, validation=0.2)
    module.setup()
    assert (module.shape, module.classes, module.labels) == ((3, 8, 8), 2, ["cat", "dog"])
    assert [len(b.x) for b in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader())] == [
        16,
        4,
        8,
    ]
    x, y = next(iter(module.test_dataloader()))
    assert x.shape == (8, 3, 8, 8) and y.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(FileNotFoundError, match="has no folder `train`"):
        ImageFolder(root=tmp_path / "nothing")
    (tmp_path / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match="classes that train lacks: bird"):
        ImageFolder(root=tmp_path, size=8).setup()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        Digits(batch_size=0)
    with pytest.raises(ValueError, match="channels=2"):
        ImageFolder(root=".", channels=2)
