"""Shards: bytes, index and reading back."""

import hashlib
import io
import json
import tarfile
import zlib

import pytest
from webdataset.tariterators import tar_file_iterator

from vistallm.coinit.shards import read_index, read_raw, read_shard, write_shard
from vistallm.mini.build import MiniRecipe, make_sample
from vistallm.schema import ImageInfo, Sample, SampleReject


@pytest.fixture
def pair():
    return make_sample(MiniRecipe(), "val", "gres", 7)


def test_round_trip(tmp_path, pair):
    name, row = write_shard(tmp_path, "val", 3, [pair])
    ((sample, files),) = read_shard(tmp_path / "val-000003.tar")
    assert sample.to_json() == pair[0].to_json()
    assert files == [data for data, _ in pair[1]]
    with tarfile.open(tmp_path / "val-000003.tar") as tar:
        members = tar.getmembers()
    assert members[0].name == "val-000003-00000.json"
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert [p.name for p in tmp_path.iterdir()] == ["val-000003.tar"]
    data = (tmp_path / name).read_bytes()
    assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert row["tasks"] == {"gres": 1}


def test_bytes_are_those_of_tarfile(tmp_path):
    pairs = [make_sample(MiniRecipe(), "val", "nlvr2", serial) for serial in range(3)]
    write_shard(tmp_path, "val", 0, pairs)
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for place, (sample, images) in enumerate(pairs):
            sums = {f"{i}.{suffix}": zlib.crc32(data) for i, (data, suffix) in enumerate(images)}
            record = json.dumps(sample.to_json() | {"crc32": sums}, ensure_ascii=False, separators=(",", ":")).encode()
            record = record[:-2] + f',"json":{zlib.crc32(record[:-2])}}}}}'.encode()
            for name, data in [("json", record), *((f"{i}.{suffix}", data) for i, (data, suffix) in enumerate(images))]:
                member = tarfile.TarInfo(f"val-000000-{place:05d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert (tmp_path / "val-000000.tar").read_bytes() == expected.getvalue()


def test_every_image_needs_its_file(tmp_path, pair):
    pair[0].images.append(pair[0].images[0])
    with pytest.raises(ValueError, match="2 images are listed, 1 came"):
        write_shard(tmp_path, "val", 0, [pair])


# -- images that several samples share --------------------------------------------------------------------------------


def sharing(number):
    """Samples over three images of 2,000 bytes: one image, two of them, the second alone, another, the first again."""
    images = [(letter * 2000, "jpg") for letter in (b"a", b"b", b"c")]
    for place, used in enumerate([[0], [0, 1], [1], [2], [0], [1, 1]][:number]):
        infos = [ImageInfo(f"{i}.jpg", 8, 8) for i in range(len(used))]
        yield Sample(f"s{place}", "res" if place % 2 else "rec", "made", infos), [images[i] for i in used]


def test_an_image_is_stored_once_in_a_shard(tmp_path):
    name, row = write_shard(tmp_path, "train", 3, sharing(6))
    with tarfile.open(tmp_path / name) as tar:
        stored = [m.name for m in tar if m.name.endswith("jpg")]
        records = [json.load(tar.extractfile(m)) for m in tar.getmembers() if m.name.endswith("json")]
    first, second, third = "train-000003-00000.0.jpg", "train-000003-00001.1.jpg", "train-000003-00003.0.jpg"
    assert stored == [first, second, third]
    named = [[image["file"] for image in record["images"]] for record in records]
    assert named == [["0.jpg"], [first, "1.jpg"], [second], ["0.jpg"], [first], [second, second]]
    assert row["images"] == 3
    expected = list(sharing(6))
    for (sample, files), (wanted, images) in zip(read_shard(tmp_path / name), expected, strict=True):
        assert sample.id == wanted.id
        assert files == [data for data, _ in images]
    assert "images" not in write_shard(tmp_path, "train", 4, sharing(1))[1], "nothing is shared"


def test_neighbours_share_the_bytes_and_a_task_that_is_not_read_still_brings_its_image(tmp_path):
    name, _ = write_shard(tmp_path, "train", 0, sharing(6))
    one, two, three, *_ = read_raw(tmp_path / name)
    assert one.files["0.jpg"] is two.files["train-000000-00000.0.jpg"]
    assert two.files["1.jpg"] is three.files["train-000000-00001.1.jpg"]
    kept = list(read_raw(tmp_path / name, lambda task: task == "res"))
    assert [raw.sample().id for raw in kept] == ["s1", "s3", "s5"]
    assert kept[0].files["train-000000-00000.0.jpg"] == b"a" * 2000


@pytest.mark.parametrize("how", ["record", "image", "gone"])
def test_a_fault_of_the_first_sample_is_not_silent_in_the_others(tmp_path, how):
    path = tmp_path / write_shard(tmp_path, "train", 0, sharing(3))[0]
    data = bytearray(path.read_bytes())
    if how == "gone":  # the first image's member gets another name
        data[data.index(b"train-000000-00000.0.jpg\0")] = ord("T")
        header = data[(start := data.index(b"Train-")) : start + 512]
        data[start + 148 : start + 156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    else:
        data[data.index(b'"id":"s0"') + 6 if how == "record" else data.index(b"a" * 2000) + 5] ^= 1
    path.write_bytes(data)
    reasons = []
    for raw in read_raw(path):
        try:
            reasons.append(raw.sample().id)
        except SampleReject as reject:
            reasons.append(reject.reason)
    expected = {
        "record": ["checksum", "s1", "s2"],
        "image": ["checksum", "checksum", "s2"],
        "gone": ["missing-image", "bad-json", "missing-image", "s2"],
    }
    assert reasons == expected[how]


def test_webdataset_reads_the_members(tmp_path):
    """Beside our reader, with the library of the format."""
    name, _ = write_shard(tmp_path, "train", 0, sharing(3))
    with (tmp_path / name).open("rb") as file:
        members = {m["fname"]: m["data"] for m in tar_file_iterator(file)}
    for raw in read_raw(tmp_path / name):
        assert json.loads(members[f"{raw.key}.json"]) == raw.record
        for file, data in raw.files.items():
            assert members[file if file in members else f"{raw.key}.{file}"] == data


def test_read_index_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="build it with"):
        read_index(tmp_path)
    for text in ("{", '{"version": 1}', '{"version": 9, "shards": {}}', '{"version": 1, "shards": {}}', "[]"):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="again"):
            read_index(tmp_path)
