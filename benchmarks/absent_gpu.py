"""torch.compile for a GPU that is not there: the kernels that it would run, without running them.

In: a function or module, compiled with `backend(report)` and called with tensors on a CPU. Out: calls of `report` with
each graph as inductor has lowered and scheduled it for an H200, forward and backward; the compiled function itself
returns zeros. The decision worth knowing: the graphs are traced for a CPU, where autograd can run, and moved to the GPU
before they are lowered. So operators that torch picks by device (attention) must be opaque ones, and what is measured
on a device to choose between kernels is not known: inductor is left at its defaults, which measure only launch sizes.

This reaches into torch's compiler and is written for torch 2.11 to 2.13.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.scheduler
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import detect_fake_mode
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

GPU = torch.device("cuda:0")
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 2**30,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)

Report = Callable[[GraphLowering], None]


def backend(report: Report) -> Callable[..., Any]:
    """For torch.compile(backend=...)."""

    def compile_graph(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        def of_pass(is_backward: bool) -> Callable[..., Any]:
            return lambda part, given: make_boxed_func(_zeros(part, _lower(part, given, is_backward, report)))

        return aot_module_simplified(
            graph,
            inputs,
            fw_compiler=of_pass(False),
            bw_compiler=of_pass(True),
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )

    return compile_graph


def _lower(graph: GraphModule, inputs: Sequence[Any], is_backward: bool, report: Report) -> None:
    graph, mode = copy.deepcopy(graph), detect_fake_mode(inputs) or FakeTensorMode()
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": GPU}
    graph.recompile()
    with _pretended(), mode, V.set_fake_mode(mode):
        inputs = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=GPU)
            if isinstance(each, Tensor)
            else each
            for each in inputs
        ]
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        view_to_reshape(graph)
        post_grad_passes(graph, is_inference=False)
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        lowered = GraphLowering(graph, example_inputs=inputs, is_backward=is_backward)
        with V.set_debug_handler(DebugContext()), V.set_graph_handler(lowered):
            lowered.run(*inputs)
            lowered.codegen()
            report(lowered)


def _zeros(graph: GraphModule, _: None) -> Callable[..., list[Any]]:
    """A function that returns zeros of the shapes that the graph returns."""
    returned = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    shapes = [node if node is None else node.meta["val"] for node in returned]

    def run(*_: Any) -> list[Any]:
        return [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype).zero_()
            if isinstance(each, Tensor)
            else each
            for each in shapes
        ]

    return run


@contextmanager
def _pretended() -> Iterator[None]:
    """torch.cuda, and what inductor asks about it and about Triton, answers as on a machine with one H200."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_device_capability": (9, 0),
        "_lazy_init": None,
    }
    of_interface = {"get_device_properties": H200, "get_compute_capability": 90, "is_available": True}
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, _always(answer)))
        for name, answer in of_interface.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(_always(answer))))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", _always(None)))
        stack.enter_context(mock.patch.object(Tensor, "copy_", _always(None)))  # it would ask the device; all is fake
        stack.enter_context(mock.patch.object(torch._inductor.scheduler, "has_triton", _always(True)))
        stack.enter_context(_target())
        yield


@contextmanager
def _target() -> Iterator[None]:
    """Triton's driver, which a kernel's signature is made for."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_target=_always(GPUTarget("cuda", 90, 32)),
        get_current_device=_always(0),
        get_active_torch_device=_always(GPU),
    )
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        yield


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer
