import collections
import os
import pickle
import zipfile

import numpy as np
import pytest

from mixgrpo_jax.models.io import torch_io, weights

torch = pytest.importorskip("torch")


def views():
    """Tensors of every kind: contiguous, strided, broadcast, sharing a storage, empty, without axes, a parameter."""
    base = torch.randn(5, 6, 7)
    return collections.OrderedDict(
        whole=base,
        transposed=base.permute(2, 0, 1),
        part=base[1:4:2, 2:],
        broadcast=torch.randn(3, 1).expand(3, 4),
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(2.6592),
        parameter=torch.nn.Parameter(torch.randn(4)),
    )


def same_bytes(ours, theirs):
    theirs = theirs.detach().contiguous()
    assert ours.shape == tuple(theirs.shape)
    raw = theirs.reshape(-1).view(torch.uint8).numpy() if theirs.numel() else np.zeros(0, np.uint8)
    return np.array_equal(np.ascontiguousarray(ours).reshape(-1).view(np.uint8), raw)


def save(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("wrap", [lambda tensors: tensors, lambda tensors: {"epoch": 3, "state_dict": tensors}])
def test_every_kind_of_tensor_reads_back_bit_equal(tmp_path, wrap):
    tensors = views()
    read = torch_io.read(save(tmp_path / "model.pt", wrap(tensors)))
    assert list(read) == list(tensors) and len(read) == len(tensors)
    assert all(same_bytes(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", torch_io.DTYPES)
def test_every_dtype_reads_back_bit_equal(tmp_path, dtype):
    tensor = torch.arange(24).reshape(4, 6).to(getattr(torch, dtype))
    (read,) = torch_io.read(save(tmp_path / "model.pt", {"t": tensor})).values()
    assert read.dtype == torch_io.DTYPES[dtype] and same_bytes(read, tensor)


def test_a_modules_state_dict_loads_by_a_table(tmp_path):
    layer = torch.nn.Linear(3, 5)
    tensors = torch_io.read(save(tmp_path / "model.pth", layer.state_dict()))
    skeleton = {"layer": {"kernel": np.zeros((3, 5)), "bias": np.zeros(5)}}
    table = [weights.Rule("weight", "layer/kernel", (1, 0)), weights.Rule("bias", "layer/bias")]
    params = weights.load(table, skeleton, tensors)
    np.testing.assert_array_equal(params["layer"]["kernel"], layer.weight.detach().numpy().T)


def test_tensors_cannot_be_written_to(tmp_path):
    read = torch_io.read(save(tmp_path / "model.pt", views()))
    with pytest.raises(ValueError, match="read-only"):
        read["broadcast"][0] = 1


class Attack:
    def __init__(self, target, *call):
        self.target, self.call = target, call or (os.system, (f"touch {target}",))

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", ["system", "eval", "load_from_bytes"])
def test_a_pickle_that_calls_a_function_is_refused_and_not_run(tmp_path, function):
    target = tmp_path / "ran"
    calls = {
        "system": (os.system, (f"touch {target}",)),
        "eval": (eval, (f"open({str(target)!r}, 'w')",)),
        "load_from_bytes": (torch.storage._load_from_bytes, (b"",)),
    }
    path = save(tmp_path / "model.pt", {"weight": torch.ones(3), "run": Attack(target, *calls[function])})
    with pytest.raises(ValueError, match=rf"model.pt names \w+(\.\w+)*\.\w*{function}, which is no part of a tensor"):
        torch_io.read(path)
    assert not target.exists()


def archive(path, pickled, storages=()):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for key, data in enumerate(storages):
            file.writestr(f"archive/data/{key}", data)
    return path


class Persistent(pickle.Pickler):
    """Writes tensors of given (offset, shape, strides) in storage 0, as torch would."""

    def persistent_id(self, obj):
        return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(obj, Exception) else None


class Part:
    def __init__(self, *place):
        self.place = place

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Exception(), *self.place, False, collections.OrderedDict())


def tensor_file(path, *place, size=16):
    with open(path.with_suffix(".pkl"), "wb") as file:
        Persistent(file, protocol=2).dump({"t": Part(*place)})
    return archive(path, path.with_suffix(".pkl").read_bytes(), [bytes(size)])


def test_a_tensor_outside_its_storage_is_refused(tmp_path):
    assert torch_io.read(tensor_file(tmp_path / "good.pt", 1, (3,), (1,)))["t"].tolist() == [0, 0, 0]
    for place in [(2, (3,), (1,)), (0, (2, 3), (3, 1)), (-1, (2,), (1,)), (3, (2,), (-1,))]:
        with pytest.raises(ValueError, match="leaves its storage"):
            torch_io.read(tensor_file(tmp_path / "bad.pt", *place))
    with pytest.raises(ValueError, match="storage 0 has 8 bytes for 4 numbers of float32"):
        torch_io.read(tensor_file(tmp_path / "short.pt", 0, (1,), (1,), size=8))


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*absent\.pt"):
        torch_io.read(tmp_path / "absent.pt")
    torch.save(views(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old.pt is no zip archive.*torch\.save"):
        torch_io.read(tmp_path / "old.pt")
    whole = save(tmp_path / "whole.pt", views()).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"cut.pt is no zip archive: it is cut short"):
        torch_io.read(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"list.pt holds a list"):
        torch_io.read(save(tmp_path / "list.pt", [torch.ones(2)]))
    with pytest.raises(ValueError, match=r"none.pt holds no tensors by name, but \['epoch'\]"):
        torch_io.read(save(tmp_path / "none.pt", {"epoch": 3}))
    with pytest.raises(ValueError, match=r"damaged.pt is damaged"):
        torch_io.read(archive(tmp_path / "damaged.pt", b"\x80\x02}q\x00X"))
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("readme", "text")
    with pytest.raises(ValueError, match=r"other.pt is a zip archive without a data.pkl"):
        torch_io.read(tmp_path / "other.pt")


def test_compressed_archives_are_refused(tmp_path):
    source = zipfile.ZipFile(save(tmp_path / "model.pt", views()))
    with zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match=r"deflated.pt is compressed"):
        torch_io.read(tmp_path / "deflated.pt")


def test_weights_are_read_from_either_kind_of_file_or_a_folder_of_one(tmp_path):
    tensors = {"a": np.arange(6.0).reshape(2, 3)}
    theirs = {name: torch.tensor(array) for name, array in tensors.items()}
    pickled, safe = tmp_path / "pickled", tmp_path / "safe"
    pickled.mkdir(), safe.mkdir()
    save(pickled / "pytorch_model.bin", theirs)
    save(safe / "pytorch_model.bin", {"other": torch.ones(1)})
    weights.write_safetensors(safe / "model.safetensors", tensors)
    for path in (pickled, safe, pickled / "pytorch_model.bin", safe / "model.safetensors"):
        read = torch_io.read_weights(path)
        assert list(read) == ["a"]
        np.testing.assert_array_equal(read["a"], tensors["a"])
    save(pickled / "second.pt", theirs)
    with pytest.raises(ValueError, match=r"holds pytorch_model.bin, second.pt: give the path of one"):
        torch_io.read_weights(pickled)
