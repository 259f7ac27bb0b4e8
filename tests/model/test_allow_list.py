"""What a ``model.pt`` may not do when it is read without trust. Each attack is shown to work where nothing stops it."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from amici_eval.common.errors import ModelFormatError, UnsafePickleError
from amici_eval.model.checkpoint import read_amici_directory
from amici_eval.model.unpickling import Inert, _AllowListUnpickler, load_allow_listed

pytestmark = pytest.mark.amici

SHARED_MODELS = {
    "osmfish_seed0": "osmfish_sscortex",
    "osmfish_seed1": "osmfish_sscortex",
    "xenium_roi_seed0": "xenium_breast_rep1_roi",
    "xenium_roi_seed1": "xenium_breast_rep1_roi",
}


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture
def canary(tmp_path) -> Path:
    """A file that exists once an attack has worked."""
    return tmp_path / "canary"


@pytest.fixture
def content(amici_dir):
    """What a genuine model.pt holds."""
    return torch.load(amici_dir / "model.pt", weights_only=False)


def read(folder, *, trust=False):
    return read_amici_directory(folder, adata=None, trust=trust)


def write_with_pickle(folder: Path, data_pkl: bytes, **records: bytes) -> Path:
    """Write an archive of torch.save with a pickle of one's own."""
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        for name, value in {"data.pkl": data_pkl, "version": b"3\n", "byteorder": b"little", **records}.items():
            archive.writestr(f"model/{name}", value)
    return folder


def short(text: str) -> bytes:
    """Opcode of a short text."""
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


def named(module: str, name: str) -> bytes:
    """Opcodes that fetch a global as protocol 4 does, where names may have dots."""
    return short(module) + short(name) + b"\x93"


# --- genuine models ---------------------------------------------------------------------------------------------------


def test_small_model_reads_without_trust(amici_dir):
    safe, trusted = read(amici_dir), read(amici_dir, trust=True)
    assert safe.card == trusted.card
    assert safe.history == trusted.history
    assert all(torch.equal(value, trusted.weights[name]) for name, value in safe.weights.items())


@pytest.mark.shared
@pytest.mark.parametrize("name", SHARED_MODELS)
def test_real_models_read_without_trust(shared, name):
    import anndata

    adata = anndata.read_h5ad(shared / "data" / f"{SHARED_MODELS[name]}.h5ad")
    safe = read_amici_directory(shared / "models" / name, adata=adata, trust=False)
    trusted = read_amici_directory(shared / "models" / name, adata=adata, trust=True)
    assert safe.card == trusted.card
    assert safe.registry == trusted.registry
    assert safe.history == trusted.history
    assert safe.cells == trusted.cells
    assert len(safe.card.training_cells) == len(safe.cells["train"]) > 0.8 * adata.n_obs
    assert all(torch.equal(value, trusted.weights[key]) for key, value in safe.weights.items())
    safe.build_module()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_reads(content, tmp_path, amici_dir, protocol):
    torch.save(content, tmp_path / "model.pt", pickle_protocol=protocol)
    model, genuine = read(tmp_path), read(amici_dir)
    assert model.card == genuine.card
    assert model.history == genuine.history


# --- smuggled calls ---------------------------------------------------------------------------------------------------

ATTACKS = {
    "os.system": (lambda canary: Calls(os.system, f"touch '{canary}'"), r"(posix|nt)\.system"),
    "pathlib": (lambda canary: Calls(Path.touch, canary), r"(pathlib\.Path\.touch|(__builtin__|builtins)\.getattr)"),
    "eval": (lambda canary: Calls(eval, f"open({str(canary)!r}, 'w').close()"), r"(__builtin__|builtins)\.eval"),
    "exec": (lambda canary: Calls(exec, f"open({str(canary)!r}, 'w').close()"), r"(__builtin__|builtins)\.exec"),
    "open": (lambda canary: Calls(open, str(canary), "w"), r"(_io|io)\.open"),
    "mkdir": (lambda canary: Calls(os.mkdir, str(canary)), r"(posix|nt)\.mkdir"),
    "numpy": (lambda canary: Calls(np.save, str(canary), [1]), r"numpy\.save"),
    "torch": (lambda canary: Calls(torch.save, 1, str(canary)), r"torch\.serialization\.save"),
}
PLACES = {
    "beside": lambda content, attack: content.update(extra=attack),
    "weights": lambda content, attack: content["model_state_dict"].update(extra=attack),
    "history": lambda content, attack: content["attr_dict"]["history_"].update(evil=attack),
    "deep in history": lambda content, attack: content["attr_dict"]["history_"].update(evil=[{"a": (attack,)}]),
    "registry": lambda content, attack: content["attr_dict"]["registry_"].update(evil={"b": attack}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", ATTACKS)
def test_smuggled_call_is_refused_by_name_and_does_not_run(content, tmp_path, canary, attack, protocol, place):
    make, name = ATTACKS[attack]
    PLACES[place](content, make(canary))
    torch.save(content, tmp_path / "model.pt", pickle_protocol=protocol)
    with pytest.raises(
        UnsafePickleError, match=rf"the pickle asks for {name}: .*; if you trust .* register.trust=true"
    ):
        read(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # one of the attacks opens the canary and leaves it
def test_with_trust_the_same_call_runs(content, tmp_path, canary, attack):
    make, _ = ATTACKS[attack]
    PLACES["beside"](content, make(canary))
    torch.save(content, tmp_path / "model.pt")
    read(tmp_path, trust=True)
    assert canary.exists() or canary.with_suffix(".npy").exists()


# --- ways round a list of names ---------------------------------------------------------------------------------------

DOTTED = [
    ("collections", "OrderedDict.__init__.__globals__"),
    ("collections", "OrderedDict.__reduce__"),
    ("collections", "abc.sys.modules"),
    ("builtins", "dict.__class__"),
    ("builtins", "bytes.fromhex"),
    ("numpy", "dtype.__class__"),
    ("numpy", "ndarray.tofile"),
    ("numpy", "core.os.system"),
    ("torch", "serialization.os.system"),
    ("torch", "UntypedStorage.from_file"),
    ("torch", "hub.load_Storage"),
    ("torch", "storage._StorageBase.from_file.Storage"),
    ("torch.storage", "io.open.Storage"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
]
OUTSIDE = [
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("builtins", "type"),
    ("builtins", "map"),
    ("functools", "partial"),
    ("operator", "attrgetter"),
    ("copyreg", "_reconstructor"),
    ("importlib", "import_module"),
    ("numpy", "load"),
    ("numpy", "fromfile"),
    ("numpy.testing._private.utils", "runstring"),
    ("torch", "load"),
    ("torch", "Storage"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.hub", "load"),
    ("torch.jit", "load"),
    ("torch._utils", "_rebuild_qtensor"),
    ("amici._model", "AMICI"),
    ("amici_eval.model.unpickling", "_AllowListUnpickler"),
]


@pytest.mark.parametrize(("module", "name"), DOTTED + OUTSIDE)
def test_only_whole_names_of_the_list_are_found(tmp_path, module, name):
    write_with_pickle(tmp_path, b"\x80\x04" + named(module, name) + b".")
    with pytest.raises(UnsafePickleError, match=re.escape(f"the pickle asks for {module}.{name}")):
        read(tmp_path)


@pytest.mark.parametrize(
    ("module", "name"), [("pandas", "read_pickle"), ("pandas.core.computation.eval", "eval"), ("pyarrow.lib", "Table")]
)
def test_parts_of_tables_are_stood_in_for(tmp_path, module, name):
    # the call of a function of pandas, with a name of what would be opened
    call = named(module, name) + short(str(tmp_path / "evil.pkl")) + b"\x85R"
    write_with_pickle(tmp_path, b"\x80\x04}" + short("attr_dict") + call + b"s.")
    content = load_allow_listed(tmp_path / "model.pt")
    assert type(content["attr_dict"]) is Inert
    with pytest.raises(ModelFormatError, match=r"model\.pt cannot be read"):
        read(tmp_path)


def test_dotted_names_would_be_found_by_pickle_itself():
    found = pickle.loads(b"\x80\x04" + named("collections", "OrderedDict.__class__") + b".")
    assert found is type


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\n(S'touch {canary}'\ntR.",  # GLOBAL and REDUCE
        b"(S'touch {canary}'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch {canary}'\no.",  # OBJ
        b"\x80\x02cos\nsystem\n(S'touch {canary}'\nt\x81.",  # NEWOBJ
        b"\x80\x04}(S'a'\ncos\nsystem\n(S'touch {canary}'\ntRu.",  # within a dictionary
    ],
    ids=["reduce", "inst", "obj", "newobj", "setitems"],
)
def test_every_opcode_that_calls_goes_through_the_list(tmp_path, canary, opcodes):
    program = opcodes.replace(b"{canary}", str(canary).encode())
    write_with_pickle(tmp_path, program)
    with pytest.raises(UnsafePickleError, match=r"the pickle asks for os\.system"):
        read(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "persistent",
    [
        b"\x80\x02X\x03\x00\x00\x00abcQ.",
        b"\x80\x02)Q.",
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x06\x00\x00\x00../../X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02(X\x06\x00\x00\x00modulectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        b"Pabc\n.",
    ],
)
def test_odd_references_to_storage_are_refused(tmp_path, persistent):
    write_with_pickle(tmp_path, persistent)
    with pytest.raises(ModelFormatError, match="cannot be read"):
        read(tmp_path)


def dtype_then_array(code: str, state: bytes, payload: bytes) -> bytes:
    """Opcodes of an array whose dtype brings a state of its own and whose buffer is raw bytes."""
    dtype = b"cnumpy\ndtype\n(" + short(code) + b"\x89\x88tR" + state + b"b"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    return b"\x80\x04" + empty + b"(K\x01K\x01\x85" + dtype + b"\x89C" + bytes([len(payload)]) + payload + b"tb."


NO_FLAGS = b"(K\x03" + short("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"


def test_array_of_objects_cannot_be_filled_with_addresses(tmp_path):
    # eight zero bytes are a null pointer, which NumPy reads as None: harmless, but it shows the way
    program = dtype_then_array("O8", NO_FLAGS, bytes(8))
    assert pickle.loads(program).dtype == object
    write_with_pickle(tmp_path, program)
    with pytest.raises(ModelFormatError, match=r"cannot be read \(TypeError: object pickle not returning list"):
        read(tmp_path)
    assert np.dtype("O").hasobject


@pytest.mark.parametrize("code", ["V8", "O8,i4", "U4", "M8[ns]", "builtins.object", "f8, (2,3)O"])
def test_dtypes_that_a_model_does_not_need_are_refused(tmp_path, code):
    write_with_pickle(tmp_path, b"\x80\x04cnumpy\ndtype\n(" + short(code) + b"\x89\x88tR.")
    with pytest.raises(UnsafePickleError, match=r"the pickle asks for numpy.dtype\("):
        read(tmp_path)


def test_codecs_other_than_latin1_are_refused(tmp_path):
    write_with_pickle(tmp_path, b"\x80\x04c_codecs\nencode\n(" + short("abc") + short("rot13") + b"tR.")
    with pytest.raises(UnsafePickleError, match=r"the pickle asks for _codecs.encode\(..., 'rot13'\)"):
        read(tmp_path)


# --- other formats that torch.load takes ------------------------------------------------------------------------------


class Writes(torch.nn.Module):
    """A TorchScript program that writes a file while it is loaded."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.values = torch.nn.Parameter(torch.zeros(1))

    @torch.jit.export
    def __getstate__(self):
        return (self.values, self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.values = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(state[0], state[1])

    def forward(self):
        return self.values


@pytest.fixture
def torchscript(tmp_path, canary):
    with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
        torch.jit.script(Writes(str(canary))).save(str(tmp_path / "model.pt"))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.torch.jit.*. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.load. received a zip file that looks like a TorchScript:UserWarning")
def test_torchscript_program_is_refused_and_does_not_run(torchscript, canary):
    with pytest.raises(UnsafePickleError, match=r"is a TorchScript archive: a model.pt of AMICI holds arrays"):
        read(torchscript)
    assert not canary.exists()
    torch.load(torchscript / "model.pt", weights_only=False)
    assert canary.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit.*. is deprecated:DeprecationWarning")
def test_torchscript_program_hidden_in_a_model_does_not_run(torchscript, amici_dir, canary):
    with zipfile.ZipFile(torchscript / "model.pt") as program:
        root = program.namelist()[0].split("/")[0]
        records = {name.removeprefix(f"{root}/"): program.read(name) for name in program.namelist()}
    with zipfile.ZipFile(amici_dir / "model.pt") as genuine, zipfile.ZipFile(torchscript / "both.zip", "w") as both:
        for name in genuine.namelist():
            both.writestr(name, genuine.read(name))
        for name, value in records.items():
            if not name.startswith(("data", "version", "byteorder")):
                both.writestr(f"other/{name}", value)
    (torchscript / "both.zip").replace(torchscript / "model.pt")
    assert read(torchscript).card == read(amici_dir).card
    assert not canary.exists()


def test_older_format_of_torch_is_no_archive(content, tmp_path, canary):
    PLACES["beside"](content, ATTACKS["os.system"][0](canary))
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelFormatError, match=r"is no torch archive: it must be written by AMICI.save\(...\)"):
        read(tmp_path)
    assert not canary.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert canary.exists()


def test_older_format_before_an_archive_is_not_read(content, tmp_path, amici_dir, canary):
    PLACES["beside"](content, ATTACKS["os.system"][0](canary))
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    with (tmp_path / "model.pt").open("ab") as file:
        file.write((amici_dir / "model.pt").read_bytes())
    assert zipfile.is_zipfile(tmp_path / "model.pt")
    assert read(tmp_path).card == read(amici_dir).card
    assert not canary.exists()


def test_archive_with_two_pickles_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for root in ("one", "two"):
            archive.writestr(f"{root}/data.pkl", pickle.dumps({}, protocol=2))
            archive.writestr(f"{root}/version", b"3\n")
    with pytest.raises(ModelFormatError, match=r"cannot be read .KeyError: .2 records are named data.pkl"):
        read(tmp_path)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [False, True])
def test_file_that_is_no_archive_is_refused(tmp_path, trust):
    for junk in (b"", b"hello", np.random.default_rng(0).bytes(5000)):
        (tmp_path / "model.pt").write_bytes(junk)
        with pytest.raises(ModelFormatError, match=r"model.pt is no torch archive: .*; copy or save it again"):
            read(tmp_path, trust=trust)


@pytest.mark.parametrize("trust", [False, True])
def test_archive_of_something_else_is_refused(tmp_path, trust):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ModelFormatError, match=r"model.pt cannot be read \(.*\): it must be what AMICI.save"):
        read(tmp_path, trust=trust)
    torch.save({"something": "else"}, tmp_path / "model.pt")
    with pytest.raises(ModelFormatError, match=r"model.pt cannot be read \(KeyError: 'attr_dict'\)"):
        read(tmp_path, trust=trust)
    torch.save(torch.ones(3), tmp_path / "model.pt")
    with pytest.raises(ModelFormatError, match=r"model.pt cannot be read"):
        read(tmp_path, trust=trust)


@pytest.mark.parametrize("trust", [False, True])
def test_damaged_archive_is_refused(amici_dir, tmp_path, trust):
    content = bytearray((amici_dir / "model.pt").read_bytes())
    start = content.index(b"data.pkl") + 200
    content[start : start + 50] = bytes(50)
    (tmp_path / "model.pt").write_bytes(bytes(content))
    with pytest.raises(ModelFormatError, match=r"model.pt cannot be read \("):
        read(tmp_path, trust=trust)


def test_truncated_archive_is_refused(amici_dir, tmp_path):
    content = (amici_dir / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelFormatError, match=r"model.pt is no torch archive"):
        read(tmp_path)


# --- changes of what is allowed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pandas.core.indexes.base", "Index"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.storage", "UntypedStorage"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
    ],
)
@pytest.mark.parametrize("slots", [False, True])
def test_classes_and_functions_keep_their_attributes(module, name, slots):
    """BUILD on a class or function would change it for the whole process."""
    state = b"}" + short("smuggled") + b"K\x01s"
    pickled = b"\x80\x04" + named(module, name) + (b"N" + state + b"\x86" if slots else state) + b"b."
    with pytest.raises(UnsafePickleError, match="the pickle asks for a change of"):
        _AllowListUnpickler(io.BytesIO(pickled)).load()
