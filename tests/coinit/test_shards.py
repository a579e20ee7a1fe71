"""Shards: bytes, index and reading back."""

import hashlib
import io
import json
import tarfile
import zlib

import pytest

from vistallm.coinit.shards import read_index, read_shard, write_shard
from vistallm.mini.build import MiniRecipe, make_sample


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


def test_names_of_images_must_agree(tmp_path, pair):
    pair[0].images[0].file = "1.jpg"
    with pytest.raises(ValueError, match="images are listed as"):
        write_shard(tmp_path, "val", 0, [pair])


def test_read_index_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="build it with"):
        read_index(tmp_path)
    for text in ("{", '{"version": 1}', '{"version": 9, "shards": {}}', '{"version": 1, "shards": {}}', "[]"):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="again"):
            read_index(tmp_path)
