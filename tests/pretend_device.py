"""A device that pretends, so that device mistakes of our code show on a machine without a GPU.

Its tensors say that they are on `pretend:0`; their values lie in ordinary CPU tensors. As CUDA
does, it refuses operations between tensors of two devices, and it knows when the host has to wait:

    with plugged_in() as device:
        x = torch.randn(3, 4).to(device)
        with count_waits() as waits:
            x.sum().item()  # the host waits for this number: counted, with the function it is in
        x + torch.ones(4)  # RuntimeError: Expected all tensors to be on the same device

To torch a device is three things, and this file has them in this order: tensors that carry its
name, kernels that compute each operation on such tensors, and the registration of the name. Two
more parts serve to observe: what makes the host wait, and what torch settles in C++ before any
operation reaches the device.

Code that runs here and gives the CPU's results has no device mistake that CUDA would refuse. That
says nothing of CUDA's own kernels, of their speed and rounding, nor of mixed precision: autocast
changes nothing here.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_iter, tree_map

NAME = "pretend"
TESTS = Path(__file__).resolve().parent
OUR_FOLDERS = (TESTS, TESTS.parent)  # not what lies deeper: a virtual environment may, with torch

# Writing a device in Python is younger than torch 2.6, still private, and may change.
REGISTRATION = "_setup_privateuseone_for_python_backend"
MISSING = "" if hasattr(backend_registration, REGISTRATION) else f"this torch has no {REGISTRATION}"

aten = torch.ops.aten


# --- 1. Tensors that carry the device's name ---


class PretendTensor(Tensor):
    """A tensor that says it is on the device. `values`: the CPU tensor that holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "PretendTensor":
        with torch.inference_mode(False):  # which forbids views of such tensors
            return Tensor._make_wrapper_subclass(
                cls,
                values.size(),
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                device=f"{NAME}:0",
            )

    def __init__(self, values: Tensor):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        """torch calls this for every operation in which a tensor of this class takes part."""
        return compute(operation, *args, **(kwargs or {}))


def is_ours(x) -> bool:
    return isinstance(x, PretendTensor)


def names_our_device(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def on_cpu(x):
    """What the CPU gets in place of x, an argument of an operation."""
    if is_ours(x):
        return x.values
    if isinstance(x, torch.device) and names_our_device(x):
        return torch.device("cpu")
    return x


# --- 2. Kernels: one function for all operations ---


def compute(operation, *args, **kwargs):
    """Do one operation below autograd, such as torch.ops.aten.add.Tensor, as a device would."""
    inputs = list(tree_iter((args, kwargs)))
    refuse_two_devices(operation, inputs, args, kwargs)
    reason = reason_to_wait(operation, args, kwargs)
    if reason:
        note_wait(reason)

    kwargs.pop("pin_memory", None)  # a build of torch without CUDA has no pinned memory
    results = operation(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))

    device = kwargs.get("device")
    goes_to_us = any(map(is_ours, inputs)) if device is None else names_our_device(device)
    if operation is aten._to_copy.default and kwargs.get("non_blocking") and not goes_to_us:
        return arriving_later(results)

    # An operation in place returns one of its inputs: the same object, not another tensor.
    inputs_by_values = {id(on_cpu(x)): x for x in inputs if isinstance(x, Tensor)}

    def on_its_device(result):
        if not isinstance(result, Tensor):
            return result
        if id(result) in inputs_by_values:
            return inputs_by_values[id(result)]
        return PretendTensor(result) if goes_to_us else result

    return tree_map(on_its_device, results)


COPIES = ("aten::copy_", "aten::_to_copy")
JOININGS = ("aten::cat", "aten::stack")
INDEXINGS = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


def refuse_two_devices(operation, inputs: list, args: tuple, kwargs: dict) -> None:
    """Raise RuntimeError where CUDA would: for a tensor, or a generator, of another device.

    From the CPU it takes what CUDA takes: copies, indices into a tensor of its own, and single
    numbers (tensors without dimensions) but in cat and stack.
    """
    if not (any(map(is_ours, inputs)) or names_our_device(kwargs.get("device"))):
        return

    name = operation._schema.name
    refuse_cpu_generator(name, inputs)
    allowed = []
    if name in COPIES:
        allowed = inputs
    elif name in INDEXINGS and is_ours(args[0]):
        allowed = args[1]
    allowed_ids = {id(x) for x in allowed}
    for x in inputs:
        if not isinstance(x, Tensor) or is_ours(x) or id(x) in allowed_ids:
            continue
        if x.ndim > 0 or name in JOININGS:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu: "
                f"{name} in {current_place()}"
            )


def refuse_cpu_generator(name: str, inputs: list) -> None:
    """Random numbers of a device take a generator of that device, and ours has none of its own."""
    if any(isinstance(x, torch.Generator) for x in inputs):
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu': {name}")


# --- 3. What makes the host wait ---


class Wait(NamedTuple):
    """One kind of wait at one place."""

    place: str  # file and function of ours, such as "train_msn.train_step"
    reason: str


def reason_to_wait(operation, args: tuple, kwargs: dict) -> str:
    """Why the host would have to wait for a GPU that does this operation; "" if it goes on."""
    inputs = list(tree_iter((args, kwargs)))
    if not any(map(is_ours, inputs)):
        return ""

    name = operation._schema.name
    if name == "aten::copy_":
        target, source, *rest = args
        non_blocking = rest[0] if rest else kwargs.get("non_blocking", False)
        if not is_ours(target):
            return "copy to the host"
        if not is_ours(source) and not (non_blocking and is_pinned(source)):
            return "copy from the host"
        return ""
    if name == "aten::_to_copy":
        device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
        to_host = device is not None and not names_our_device(device)
        return "copy to the host" if to_host and not non_blocking else ""

    if name in INDEXINGS:  # of a mask, the host must know how many are True
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "boolean mask as an index"
        return "" if all(map(is_ours, indices)) else "copy from the host"

    # torch itself marks what gives the host a value, or a tensor whose shape depends on values.
    unknown_before = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    if unknown_before & set(operation.tags) or name == "aten::_linalg_check_errors":
        return "item" if name == "aten::_local_scalar_dense" else name.removeprefix("aten::")
    return ""


_waits: Counter[Wait] | None = None  # while count_waits counts
_arrivals: list[tuple[Tensor, Tensor]] = []  # of copies on their way: where they go, what arrives


@contextmanager
def count_waits() -> Iterator[Counter[Wait]]:
    """How often the host waits, and where, while this context lasts."""
    global _waits
    outer = _waits
    _waits = Counter()
    try:
        yield _waits
    finally:
        _waits = outer


def note_wait(reason: str) -> None:
    """The host waits: all that was queued before is done, so copies on their way arrive."""
    if _waits is not None:
        _waits[Wait(current_place(), reason)] += 1
    for target, values in _arrivals:
        target.copy_(values)
    _arrivals.clear()


def arriving_later(values: Tensor) -> Tensor:
    """A copy for which the host does not wait. Until it waits for something, garbage lies there."""
    garbage = float("nan") if values.is_floating_point() else 77
    target = torch.full_like(values, garbage)
    _arrivals.append((target, values.clone()))
    return target


def current_place() -> str:
    """The innermost function of the project that is running, tests included."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        function = frame.f_code.co_name  # such as train_step, or <listcomp>, <genexpr>, <lambda>
        ours = path.parent in OUR_FOLDERS and path.name != Path(__file__).name
        if ours and not function.startswith("<"):
            return f"{path.stem}.{function}"
        frame = frame.f_back
    return "no function of ours"  # the backward pass has a thread of its own


# --- 4. What torch settles in C++, before any operation reaches the device ---

_pinned: list[Tensor] = []  # kept as long as the device is plugged in: tests are small


def pin_memory(x: Tensor, device=None) -> Tensor:
    """Memory that a device reads by itself, without the host: here an ordinary copy, remembered."""
    if is_ours(x):
        raise RuntimeError(f"cannot pin a tensor on {NAME}: only dense CPU tensors can be pinned")
    copy = x.clone()
    _pinned.append(copy)
    return copy


def is_pinned(x: Tensor, device=None) -> bool:
    memory = x.untyped_storage().data_ptr()
    return any(memory == pinned.untyped_storage().data_ptr() for pinned in _pinned)


def made_from_python(make: Callable) -> Callable:
    """torch.tensor and torch.as_tensor: values from Python are copied, and the host waits."""

    def make_on_its_device(data, *args, device=None, **kwargs):
        if is_ours(data) or not names_our_device(device):
            return make(data, *args, device=device, **kwargs)
        note_wait("values from Python")
        return PretendTensor(make(data, *args, device="cpu", **kwargs))

    return make_on_its_device


def new_tensor(x: Tensor, data, *, dtype=None, device=None, **options) -> Tensor:
    """x.new_tensor(data): torch.tensor(data), of x's type and on its device."""
    tensor = HOST_SIDE[torch.tensor]
    return tensor(data, dtype=dtype or x.dtype, device=device or x.device, **options)


def made_by_growing(make: Callable) -> Callable:
    """torch.arange and its like, which in C++ grow an empty tensor: ours can't change its shape."""

    def make_on_its_device(*args, device=None, **kwargs):
        if not names_our_device(device):
            return make(*args, device=device, **kwargs)
        refuse_cpu_generator(make.__name__, list(kwargs.values()))
        return PretendTensor(make(*args, device="cpu", **kwargs))

    return make_on_its_device


def with_lists_counted(access: Callable) -> Callable:
    """x[index] and x[index] = value: of a list, torch makes a CPU tensor and copies that over."""

    def as_tensor(part):
        if not isinstance(part, list):
            return part
        note_wait("list as an index")
        return PretendTensor(torch.tensor(part))

    def access_counted(x, index, *value):
        if is_ours(x):
            index = tuple(map(as_tensor, index)) if isinstance(index, tuple) else as_tensor(index)
        return access(x, index, *value)

    return access_counted


def via_the_host(method: Callable) -> Callable:
    """Methods that need the values: printing, tolist, pickling (the copy is saved)."""

    def method_of_a_copy(x, *args, **kwargs):
        if is_ours(x):
            note_wait(method.__name__)
        return method(on_cpu(x), *args, **kwargs)

    return method_of_a_copy


def record_stream(x: Tensor, stream) -> None:
    """Memory that one stream made is in use by another one, too; here it is never given back."""
    if not is_ours(x):
        raise RuntimeError("record_stream is for tensors on a device")


def untyped_storage(x: Tensor):
    """Where the values lie: safetensors asks, to find tensors that share memory."""
    return Tensor.untyped_storage(on_cpu(x))


HOST_SIDE = {
    torch.tensor: made_from_python(torch.tensor),
    torch.as_tensor: made_from_python(torch.as_tensor),
    torch.arange: made_by_growing(torch.arange),
    torch.linspace: made_by_growing(torch.linspace),
    torch.eye: made_by_growing(torch.eye),
    torch.full: made_by_growing(torch.full),
    torch.randperm: made_by_growing(torch.randperm),
    Tensor.new_tensor: new_tensor,
    Tensor.__getitem__: with_lists_counted(Tensor.__getitem__),
    Tensor.__setitem__: with_lists_counted(Tensor.__setitem__),
    Tensor.tolist: via_the_host(Tensor.tolist),
    Tensor.__format__: via_the_host(Tensor.__format__),
    Tensor.__repr__: via_the_host(Tensor.__repr__),
    Tensor.__reduce_ex__: via_the_host(Tensor.__reduce_ex__),
    Tensor.pin_memory: pin_memory,
    Tensor.is_pinned: is_pinned,
    Tensor.untyped_storage: untyped_storage,
}


class HostSide(TorchFunctionMode):
    """torch calls this for each of its functions, before C++ has looked at the arguments."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return HOST_SIDE.get(function, function)(*args, **(kwargs or {}))


# --- 5. The registration of the name ---


class DeviceModule:
    """What torch.cuda is to CUDA: torch.get_device_module(device) gives this object."""

    def __init__(self):
        self.plugged_in = False

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.plugged_in

    def device_count(self) -> int:
        return int(self.plugged_in)

    def current_device(self) -> int:
        return 0

    def set_device(self, device) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers of this device come from the CPU's generator."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=None) -> None:
        note_wait("synchronize")

    class Event:
        """A mark in the queue of work, up to which the host can wait."""

        def __init__(self, enable_timing: bool = False):
            pass

        def record(self, stream=None) -> None:
            pass

        def synchronize(self) -> None:
            note_wait("event")

    class Stream:
        """A queue of work. Here all work is done at once, whatever the queue."""

        def __init__(self, device=None):
            pass

        def record_event(self) -> "DeviceModule.Event":
            return DeviceModule.Event()

        def wait_event(self, event: "DeviceModule.Event") -> None:
            pass

    def current_stream(self, device=None) -> "DeviceModule.Stream":
        return self.Stream()

    def stream(self, stream):
        """To be used in a thread beside the main one, which has no mode of its own yet."""
        return HostSide()


_module: DeviceModule | None = None
_libraries: list[torch.library.Library] = []


def register() -> DeviceModule:
    """Tell torch of the device, once a process: a name can't be taken back."""
    global _module
    if _module is not None:
        return _module
    _module = module = DeviceModule()

    class Hook(backend_registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:  # so that other tests of this process see no accelerator
            return module.plugged_in

    getattr(backend_registration, REGISTRATION)(NAME, module, Hook())

    # What reaches the device without one of its tensors among the arguments, such as torch.empty.
    every_operation = torch.library.Library("_", "IMPL")
    every_operation.fallback(compute, "PrivateUse1")
    autocast = torch.library.Library("_", "IMPL")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _libraries.extend((every_operation, autocast))
    return module


@contextmanager
def plugged_in() -> Iterator[torch.device]:
    """The device, for as long as this context lasts."""
    module = register()
    module.plugged_in = True
    Tensor.record_stream = record_stream  # C++ takes streams of its own only
    try:
        with HostSide():
            yield torch.device(NAME, 0)
    finally:
        module.plugged_in = False
        del Tensor.record_stream  # what torch's base class has shows again
        _arrivals.clear()
        _pinned.clear()
