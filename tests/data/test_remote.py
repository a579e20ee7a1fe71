"""Remote shards over a loopback server that stalls, cuts off and answers 500."""

from __future__ import annotations

import http.server
import threading
from itertools import islice

import pytest
import torch

from vistallm.coinit import shards
from vistallm.coinit.shards import join, read_raw
from vistallm.config import DataConfig
from vistallm.data.datamodule import CoinItDataModule
from vistallm.data.mixture import find_folders
from vistallm.data.stream import RejectLog


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(shards, "WAIT", 0.01)
    monkeypatch.setattr(shards, "STALL", 1)


@pytest.fixture
def server(mini_root):
    """Address of a server of the mini shards; `server.faults` holds what it does to its next requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if (fault := web.faults.pop(0) if web.faults else "") in ("500", "503", "403"):
                return self.send_error(int(fault))
            path = mini_root / self.path.lstrip("/")
            if not path.is_file():
                return self.send_error(404)
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            web.requests.append(self.path)
            self.wfile.write(data[:20_000] if fault else data)
            if fault == "stall":
                web.free.wait(10)

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.faults, web.requests, web.free = [], [], threading.Event()
    web.root = f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    yield web
    web.free.set()
    web.shutdown()
    web.server_close()


def keys(place, **settings):
    return [(raw.key, raw.task, {n: len(d) for n, d in raw.files.items()}) for raw in read_raw(place, **settings)]


@pytest.mark.parametrize(
    "faults", [[], ["500", "503"], ["cut", "cut", "500"], pytest.param(["stall"], marks=pytest.mark.slow)]
)
def test_a_shard_is_read_whole_whatever_the_network_does(server, mini_root, faults, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server.faults = list(faults)
    assert keys(join(server.root, "train-000001.tar")) == keys(mini_root / "train-000001.tar")
    assert list(tmp_path.iterdir()) == [], "no copy stays without a cache"


def test_it_gives_up_clearly(server, monkeypatch):
    monkeypatch.setattr(shards, "TRIES", 3)
    server.faults = ["500"] * 9
    with pytest.raises(ValueError, match=r"train-000001\.tar: gave up after 3 tries.*exit 22.*start again"):
        keys(join(server.root, "train-000001.tar"))
    assert len(server.faults) == 6
    server.faults = []
    with pytest.raises(ValueError, match="nothing.tar: gave up after 3 tries"):
        keys(join(server.root, "nothing.tar"))


def test_the_cache_reads_once_and_refuses_another_size(server, mini_root, tmp_path):
    place, size = join(server.root, "train-000001.tar"), (mini_root / "train-000001.tar").stat().st_size
    cache = tmp_path / "cache"
    assert keys(place, cache=cache, size=size) == keys(place, cache=cache, size=size)
    assert len(server.requests) == 1
    with pytest.raises(ValueError, match=f"the index says {size + 1} bytes, got {size}"):
        keys(place, cache=cache, size=size + 1)
    assert len(list(cache.iterdir())) == 1, "no rest of the failed copy"


def test_pipes(mini_root, tmp_path, monkeypatch):
    expected = keys(mini_root / "train-000001.tar")
    assert keys(join(f"pipe:cat {mini_root}/{{}}", "train-000001.tar")) == expected
    flag = tmp_path / "flag"  # fails in the middle at the first try
    once = f"pipe:test -e {flag} && cat {mini_root}/{{}} || (touch {flag}; head -c 20000 {mini_root}/{{}}; exit 3)"
    assert keys(join(once, "train-000001.tar")) == expected
    monkeypatch.setattr(shards, "TRIES", 2)
    with pytest.raises(ValueError, match="exit 7"):
        keys("pipe:exit 7")


def test_batches_from_a_server_are_those_of_the_local_shards(server, tiny_config, vocabulary, mini_root):
    (folder,), missing = find_folders(DataConfig(), server.root)
    assert missing == []
    assert folder.index["tasks"]["train"]
    streams = [
        CoinItDataModule(tiny_config(f"data.root={root}"), vocabulary, root).stream(0, 1, 0, RejectLog(None, 0.0))
        for root in (server.root, str(mini_root))
    ]
    for one, two in islice(zip(*streams, strict=True), 5):
        assert one.ids == two.ids
        assert torch.equal(one.images, two.images)
