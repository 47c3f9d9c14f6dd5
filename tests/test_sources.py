"""Sources: idx files, folders of images, precomputed latents, samples of the model itself."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import l2c
from tests.conftest import tiny_dit
from train.data import Images, collate
from train.seeding import generator
from train.sources import FashionMNIST, ImageFolder, Latents, choose, read_idx, read_shards
from train.teacher_samples import TeacherSamples

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))


# --- idx files and Fashion-MNIST ---


def idx_bytes(values: np.ndarray) -> bytes:
    header = b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, ">u4").tobytes()
    return header + values.tobytes()


def write_idx(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(idx_bytes(values)))
    return path


def bytes_like(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_fashion_mnist(folder: Path) -> Path:
    for prefix, count in (("train", 12), ("t10k", 5)):
        images = bytes_like(count, 28, 28, seed=count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 5, 6)])
def test_idx_files_are_read_as_written(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = bytes_like(*shape)
    assert np.array_equal(read_idx(write_idx(tmp_path / "file.gz", values)), values)


def test_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.gz, which does not exist"):
        read_idx(tmp_path / "nothing.gz")


def test_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "short.gz", bytes_like(10, 28, 28))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"short\.gz is not a whole gzip file"):
        read_idx(path)


def test_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    path = write_idx(tmp_path / "damaged.gz", np.zeros((10, 28, 28), np.uint8))
    raw = bytearray(path.read_bytes())
    raw[12:20] = b"\xff" * 8
    path.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match=r"damaged\.gz is not a whole gzip file"):
        read_idx(path)


def test_file_that_is_not_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plain.gz"
    path.write_bytes(idx_bytes(bytes_like(4)))
    with pytest.raises(ValueError, match=r"plain\.gz is not a whole gzip file"):
        read_idx(path)


def test_gzip_file_that_is_no_idx_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match=r"text\.gz is not an idx file of unsigned bytes"):
        read_idx(path)


def test_idx_file_cut_in_its_header_is_named(tmp_path: Path) -> None:
    path = tmp_path / "header.gz"
    path.write_bytes(gzip.compress(idx_bytes(bytes_like(2, 3, 4))[:9]))
    with pytest.raises(ValueError, match=r"header\.gz"):
        read_idx(path)


@pytest.mark.parametrize("change", [slice(None, -1), slice(None, -30)])
def test_idx_file_with_a_wrong_count_names_both_numbers(change: slice, tmp_path: Path) -> None:
    path = tmp_path / "count.gz"
    raw = idx_bytes(bytes_like(10, 5))[change]
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(ValueError, match=rf"promises 50 values and holds {len(raw) - 12}"):
        read_idx(path)


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("validation", 5)])
def test_fashion_mnist_is_read_from_a_folder(split: str, count: int, tmp_path: Path) -> None:
    dataset = FashionMNIST(str(write_fashion_mnist(tmp_path / "idx"))).load(split)
    images = [dataset.with_format("numpy")[i]["image"] for i in range(count)]
    assert np.array_equal(np.stack(images), bytes_like(count, 28, 28, seed=count)[:, None])
    assert list(dataset["label"]) == [i % 10 for i in range(count)]
    assert dataset.features["label"].int2str(9) == "Ankle boot"


def test_fashion_mnist_names_the_file_that_its_folder_lacks(tmp_path: Path) -> None:
    folder = write_fashion_mnist(tmp_path / "idx")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    assert len(FashionMNIST(str(folder)).load("train")) == 12
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte"):
        FashionMNIST(str(folder)).load("validation")


def test_fashion_mnist_with_more_images_than_labels_raises(tmp_path: Path) -> None:
    folder = write_fashion_mnist(tmp_path / "idx")
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(11, np.uint8))
    with pytest.raises(ValueError, match=r"12.*11|11.*12"):
        FashionMNIST(str(folder)).load("train")


@pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(),
    reason=f"needs Debian's dataset-fashion-mnist in {DEBIAN_FASHION_MNIST}",
)
def test_debians_fashion_mnist_is_read() -> None:
    dataset = FashionMNIST(str(DEBIAN_FASHION_MNIST)).load("validation")
    assert len(dataset) == 10_000
    assert np.bincount(dataset.with_format("numpy")["label"]).tolist() == [1000] * 10
    assert np.asarray(dataset.with_format("numpy")[0]["image"]).shape == (1, 28, 28)


# --- folders of images ---


def write_images(folder: Path, classes: dict[str, int], size: int = 8, mode: str = "RGB") -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            shape = (size, size) if mode == "L" else (size, size, 3)
            image = bytes_like(*shape, seed=1000 * number + i)
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


def pixels(dataset: Dataset) -> list[np.ndarray]:
    return [np.asarray(image) for image in dataset["image"]]


def test_image_folder_with_validation_uses_it_as_it_is(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", {"cat": 3, "dog": 2})
    write_images(tmp_path / "images" / "validation", {"cat": 1, "dog": 3})
    source = ImageFolder(str(tmp_path / "images"), size=8)
    train, validation = source.load("train"), source.load("validation")
    assert sorted(train["label"]) == [0, 0, 0, 1, 1]
    assert sorted(validation["label"]) == [0, 1, 1, 1]
    for path, dataset in (("train", train), ("validation", validation)):
        cat = np.asarray(Image.open(tmp_path / "images" / path / "cat" / "0.png"))
        assert any(np.array_equal(cat, image) for image in pixels(dataset))


def test_image_folder_without_validation_holds_a_share_out(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"cat": 10, "dog": 10})
    source = ImageFolder(str(tmp_path / "images"), size=8, validation_share=0.2)
    train, validation = source.load("train"), source.load("validation")
    assert (len(train), len(validation)) == (16, 4)
    seen = {image.tobytes() for image in pixels(train)}
    held_out = {image.tobytes() for image in pixels(validation)}
    assert len(seen | held_out) == 20


@pytest.mark.parametrize("stored", ["L", "RGB"])
@pytest.mark.parametrize(("channels", "shape"), [(1, (8, 8)), (3, (8, 8, 3))])
def test_images_are_converted_to_grey_or_colour(
    stored: str, channels: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    write_images(tmp_path / "images", {"cat": 3, "dog": 3}, mode=stored)
    dataset = ImageFolder(str(tmp_path / "images"), size=8, channels=channels).load("train")
    assert {image.shape for image in pixels(dataset)} == {shape}


def test_image_of_another_size_names_both_sizes(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"cat": 3, "dog": 3}, size=8)
    with pytest.raises(ValueError, match="expected images of 16 x 16 pixels.*found 8 x 8"):
        ImageFolder(str(tmp_path / "images"), size=16).load("train")


def test_image_folder_without_a_size_takes_any(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train" / "small", {"cat": 1, "dog": 2}, size=8)
    write_images(tmp_path / "images" / "train" / "large", {"cat": 2, "dog": 1}, size=12)
    source = ImageFolder(str(tmp_path / "images"), validation_share=0.5)
    shapes = [
        image.shape for split in ("train", "validation") for image in pixels(source.load(split))
    ]
    assert sorted(shapes) == [(8, 8, 3)] * 3 + [(12, 12, 3)] * 3


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, {"images": 4})
    with pytest.raises(ValueError, match="no class folders"):
        ImageFolder(str(tmp_path / "images"), size=8).load("train")


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="no images found in .*images"):
        ImageFolder(str(tmp_path / "images"), size=8).load("train")


def test_missing_image_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a folder of images, found nothing at .*images"):
        ImageFolder(str(tmp_path / "images"), size=8).load("train")


def test_image_folder_with_validation_alone_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "validation", {"cat": 3, "dog": 3})
    with pytest.raises(ValueError, match="images"):
        ImageFolder(str(tmp_path / "images"), size=8).load("train")


# --- latents ---


def latents_and_labels(count: int = 20) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 2, 2, generator=g), torch.arange(count) % 7


def write_safetensors(folder: Path, shards: int = 2) -> Path:
    folder.mkdir(parents=True)
    latents, labels = latents_and_labels()
    for i, (part, named) in enumerate(
        zip(latents.chunk(shards), labels.chunk(shards), strict=True)
    ):
        tensors = {"latents": part.contiguous(), "labels": named.contiguous()}
        save_file(tensors, folder / f"{i}.safetensors")
    return folder


def write_parquet(folder: Path, shards: int = 2) -> Path:
    folder.mkdir(parents=True)
    latents, labels = latents_and_labels()
    kind = pa.list_(pa.list_(pa.list_(pa.float32())))
    for i, (part, named) in enumerate(
        zip(latents.chunk(shards), labels.chunk(shards), strict=True)
    ):
        columns = {"latent": pa.array(part.tolist(), kind), "label": pa.array(named.tolist())}
        pq.write_table(pa.table(columns), folder / f"{i}.parquet")
    return folder


def values(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    rows = [dataset.with_format("numpy")[i] for i in range(len(dataset))]
    latents = np.stack([np.asarray(row["latent"], np.float32) for row in rows])
    return latents, np.array([row["label"] for row in rows])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_parquet_and_safetensors_shards_give_the_same_latents(split: str, tmp_path: Path) -> None:
    parquet = Latents(str(write_parquet(tmp_path / "parquet")), validation_share=0.3).load(split)
    shards = Latents(str(write_safetensors(tmp_path / "shards")), validation_share=0.3).load(split)
    for one, other in zip(values(parquet), values(shards), strict=True):
        assert np.array_equal(one, other)
    assert len(parquet) == (14 if split == "train" else 6)


@pytest.mark.parametrize("write", [write_parquet, write_safetensors])
def test_latents_keep_their_labels(write: object, tmp_path: Path) -> None:
    source = Latents(str(write(tmp_path / "latents")))
    expected, labels = latents_and_labels()
    by_latent = {v.numpy().tobytes(): int(n) for v, n in zip(expected, labels, strict=True)}
    for split in ("train", "validation"):
        for latent, label in zip(*values(source.load(split)), strict=True):
            assert by_latent.pop(latent.tobytes()) == label
    assert not by_latent


def test_half_precision_shards_are_read_in_float32(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "latents", shards=1)
    exact, labels = latents_and_labels()
    tensors = {"latents": exact.half(), "labels": labels.int()}
    save_file(tensors, folder / "0.safetensors")
    batches = Images(Latents(str(folder)), batch_size=20)
    batches.setup("validate")
    known = {latent.numpy().tobytes() for latent in exact.half().float()}
    for batch in (collate(list(batches.train.with_format("numpy"))), *batches.val_dataloader()):
        assert batch["latents"].dtype == torch.float32
        assert all(latent.numpy().tobytes() in known for latent in batch["latents"])


def test_shards_of_two_types_keep_the_finer_one(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "latents")
    exact, _ = latents_and_labels()
    coarse = load_file(folder / "0.safetensors")
    save_file({**coarse, "latents": coarse["latents"].bfloat16()}, folder / "0.safetensors")
    known = {v.numpy().tobytes() for v in [*exact[10:], *exact[:10].bfloat16().float()]}
    seen, _ = values(Latents(str(folder)).load("train"))
    assert len(seen) == 19
    assert {latent.tobytes() for latent in seen} < known


def test_large_shards_are_read_whole(tmp_path: Path) -> None:
    latents = torch.arange(10_000 * 4).view(10_000, 1, 2, 2).float()
    save_file({"latents": latents, "labels": torch.arange(10_000)}, tmp_path / "0.safetensors")
    seen = read_shards([tmp_path / "0.safetensors"]).with_format("numpy")[:]
    assert np.array_equal(np.stack(list(seen["latent"])), latents)
    assert np.array_equal(seen["label"], np.arange(10_000))


def test_shards_are_not_copied_into_memory(tmp_path: Path) -> None:
    latents = torch.zeros(2_000, 4, 32, 32)  # 33 MB
    save_file({"latents": latents, "labels": torch.arange(2_000)}, tmp_path / "0.safetensors")
    before = pa.total_allocated_bytes()
    dataset = read_shards([tmp_path / "0.safetensors"])
    assert len(dataset) == 2_000
    assert pa.total_allocated_bytes() - before < 1e6


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 2, 2, 2)])
def test_latents_of_another_rank_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_file(
        {"latents": torch.zeros(shape), "labels": torch.arange(5)}, tmp_path / "0.safetensors"
    )
    with pytest.raises(ValueError, match=r"expected latents \[N, C, H, W\].*0\.safetensors"):
        Latents(str(tmp_path)).load("train")


def test_files_that_are_being_written_are_no_shards(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "latents")
    (folder / ".2-abc.safetensors").write_bytes(b"half of it")
    (folder / ".0-abc.parquet").write_bytes(b"half of it")
    assert len(Latents(str(folder)).load("train")) == 19


def test_held_out_latents_are_disjoint_and_the_same_every_time(tmp_path: Path) -> None:
    folder = str(write_safetensors(tmp_path / "latents"))
    first = [values(Latents(folder).load(split))[0] for split in ("train", "validation")]
    again = [values(Latents(folder).load(split))[0] for split in ("train", "validation")]
    assert [len(part) for part in first] == [19, 1]
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    assert len({latent.tobytes() for part in first for latent in part}) == 20


def test_mixed_kinds_of_shards_are_refused(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "latents")
    shutil.copy(write_parquet(tmp_path / "parquet") / "0.parquet", folder)
    with pytest.raises(ValueError, match="shards of one kind.*found 1 and 2"):
        Latents(str(folder)).load("train")


def test_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 0 and 0"):
        Latents(str(tmp_path)).load("train")


def test_cut_safetensors_shard_is_named(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "latents") / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"1\.safetensors is not a whole safetensors file"):
        Latents(str(tmp_path / "latents")).load("train")


def test_cut_parquet_shard_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "latents") / "1.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="parquet"):
        Latents(str(tmp_path / "latents")).load("train")


@pytest.mark.parametrize("lacking", ["latents", "labels"])
def test_shard_without_its_tensors_is_named(lacking: str, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "latents") / "1.safetensors"
    tensors = load_file(path)
    del tensors[lacking]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"expected tensors latents and labels in .*1\.safe"):
        Latents(str(tmp_path / "latents")).load("train")


@pytest.mark.parametrize("lacking", ["latent", "label"])
def test_parquet_without_its_columns_is_refused(lacking: str, tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "latents", shards=1)
    table = pq.read_table(folder / "0.parquet")
    pq.write_table(table.drop_columns([lacking]), folder / "0.parquet")
    with pytest.raises(ValueError, match=lacking):
        Latents(str(folder)).load("train")


def test_shard_with_fewer_labels_than_latents_is_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "latents") / "1.safetensors"
    tensors = load_file(path)
    save_file({"latents": tensors["latents"], "labels": tensors["labels"][:-1].clone()}, path)
    with pytest.raises(ValueError, match=r"10|19|20"):
        Latents(str(tmp_path / "latents")).load("train")


def test_shards_of_different_shapes_are_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "latents") / "1.safetensors"
    save_file({"latents": torch.zeros(5, 4, 3, 3), "labels": torch.zeros(5).long()}, path)
    with pytest.raises(ValueError, match="dimension|shape"):
        Latents(str(tmp_path / "latents")).load("train")


def test_at_least_one_image_stays_on_each_side(tmp_path: Path) -> None:
    data = {"train": Dataset.from_dict({"label": [0, 1]})}
    for share in (0.0, 1.0):
        assert len(choose(data, "train", share, "here")) == 1
        assert len(choose(data, "validation", share, "here")) == 1
    with pytest.raises(ValueError, match="at least 2 images in here"):
        choose({"train": Dataset.from_dict({"label": [0]})}, "train", 0.5, "here")
    with pytest.raises(ValueError, match="no images found in here"):
        choose({"train": Dataset.from_dict({"label": []})}, "train", 0.5, "here")


# --- samples of the model ---


def teacher_samples(backbone: Path, folder: Path, **changes: object) -> TeacherSamples:
    settings = {"count": 10, "evaluations": 2, "shard": 4, "seed": 3, **changes}
    return TeacherSamples(str(backbone), folder=str(folder), **settings)


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_teacher_samples_are_samples_of_the_model(
    dit: l2c.DiT, dit_folder: Path, tmp_path: Path
) -> None:
    source = teacher_samples(dit_folder, tmp_path / "samples", validation_share=0.3)
    assert (len(source.load("train")), len(source.load("validation"))) == (7, 3)
    shards = [load_file(path) for path in shards_in(tmp_path / "samples")]
    assert torch.cat([s["labels"] for s in shards]).tolist() == list(range(10))
    for start, shard in zip((0, 4, 8), shards, strict=True):
        expected = l2c.sample(
            dit,
            l2c.Schedule.ddim(2),
            shard["labels"],
            1.5,
            generator=generator("teacher", 3, start),
        )
        assert torch.equal(shard["latents"], expected)


def test_labels_of_teacher_samples_start_again_after_the_last_class(tmp_path: Path) -> None:
    tiny_dit(num_classes=3).save_pretrained(tmp_path / "dit")
    teacher_samples(tmp_path / "dit", tmp_path / "samples").load("train")
    labels = [load_file(path)["labels"] for path in shards_in(tmp_path / "samples")]
    assert torch.cat(labels).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_teacher_samples_are_drawn_once(dit_folder: Path, tmp_path: Path) -> None:
    first = values(teacher_samples(dit_folder, tmp_path / "samples").load("train"))
    written = {path: path.stat().st_mtime_ns for path in shards_in(tmp_path / "samples")}
    assert len(written) == 3
    source = teacher_samples(dit_folder, tmp_path / "samples")
    second = values(source.load("train"))
    source.load("validation")
    assert {p: p.stat().st_mtime_ns for p in shards_in(tmp_path / "samples")} == written
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one, other)


def test_only_missing_teacher_samples_are_drawn_again(dit_folder: Path, tmp_path: Path) -> None:
    teacher_samples(dit_folder, tmp_path / "samples").load("train")
    kept, deleted, last = shards_in(tmp_path / "samples")
    before = load_file(deleted)
    written = [path.stat().st_mtime_ns for path in (kept, last)]
    deleted.unlink()
    teacher_samples(dit_folder, tmp_path / "samples").load("train")
    assert [path.stat().st_mtime_ns for path in (kept, last)] == written
    after = load_file(deleted)
    assert torch.equal(after["latents"], before["latents"])
    assert torch.equal(after["labels"], before["labels"])


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"evaluations": 3}, {"guidance_scale": 1.0}, {"count": 9}]
)
def test_another_setting_draws_into_another_folder(
    change: dict[str, float], dit_folder: Path, tmp_path: Path
) -> None:
    teacher_samples(dit_folder, tmp_path / "samples").load("train")
    before = {path: path.stat().st_mtime_ns for path in shards_in(tmp_path / "samples")}
    teacher_samples(dit_folder, tmp_path / "samples", **change).load("train")
    after = shards_in(tmp_path / "samples")
    assert len(after) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_model_draws_into_another_folder(dit_folder: Path, tmp_path: Path) -> None:
    tiny_dit(seed=1).save_pretrained(tmp_path / "other")
    teacher_samples(dit_folder, tmp_path / "samples").load("train")
    teacher_samples(tmp_path / "other", tmp_path / "samples").load("train")
    assert len(shards_in(tmp_path / "samples")) == 6


@pytest.mark.parametrize("change", [{"count": 0}, {"evaluations": 0}, {"shard": 0}])
def test_teacher_samples_of_nothing_are_refused(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count, evaluations and shard of at least 1"):
        teacher_samples(tmp_path, tmp_path / "samples", **change)
