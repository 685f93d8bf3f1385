"""What a step does on the pretended card: the kernels that run, the bytes that they move, their
FLOPs, and the memory that is in use."""

import contextlib
import functools
import weakref
from typing import NamedTuple

import torch
from functorch.compile import make_boxed_func
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.memory import prepare_planning_info
from torch._inductor.scheduler import ExternKernelSchedulerNode, count_flops_fx
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._ordered_set import OrderedSet
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import pretended_card

# Matrix products, and those in int8; attention; all other kernels; and adding a micro-batch's
# gradients to those of the ones before.
KINDS = ("products", "int8 products", "attention", "kernels", "gradients")
SMALL = 1 << 16  # bytes; eager operators on less are not counted
# Parts of the names of operators that move nothing.
VIEWS = (
    "prim.",
    "view",
    "permute",
    "detach",
    "slice",
    "select",
    "expand",
    "transpose",
    "aten.t.",
    "squeeze",
    "alias",
    "split",
    "empty",
)
# Operators that refuse tensors of different number formats on a card, but not if they are fake.
aten = torch.ops.aten
SAME_FORMAT = (
    aten.mm.default,
    aten.addmm.default,
    aten.addmm.out,
    aten.bmm.default,
    aten.index_copy_.default,
    aten.scatter.src,
    aten.scatter_add_.default,
    aten.searchsorted.Tensor,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
)


class Work(NamedTuple):
    """What one kernel does."""

    phase: str  # "forward" or "backward", the compiled model; "head", the compiled loss; "eager"
    kind: str  # of KINDS
    bytes: int
    flops: int


class Graph(NamedTuple):
    """A compiled graph."""

    phase: str
    work: list[Work]
    peak: int  # bytes, by Inductor's plan: the saved tensors that it reads, and all that it makes
    read: int  # bytes of the saved tensors that it reads, which it may free


class Counter:
    """Counts what runs with fake tensors, compiled or not. There is one in a process: it replaces
    torch.compile.

    Attributes:
        kernels: the names of the Triton kernels that have been compiled.
        work: what has run since the last call of start().
        live: bytes on the card that have been allocated since then, and not freed.
        saved: those that the forward pass has left for the backward pass.
        peaks: the largest number of bytes in use in each phase, without those that were in use at
            the start. While a graph runs, these are Inductor's peak and what is live besides.
        graph_peaks: Inductor's peak alone, by phase.
    """

    def __init__(self):
        self.kernels = []
        self.inside = 0  # depth of the operators and graphs that run, whose parts do not count
        self.tables = set()  # the shapes of embeddings
        self.gradients = set()  # the storages of the weights' gradients
        self.lowered = []  # graphs that Inductor has made kernels of
        self.start()
        pretended_card.compile_only(on_kernel=self.kernels.append)
        self.note_lowered_graphs()
        self.replace_compile()
        FakeTensor.tolist = zeros_like_list  # generate() reads the ids that it has drawn

    def start(self, model: torch.nn.Module | None = None):
        """Begin to count anew what `model` does."""
        self.work = []
        self.live = 0
        self.saved = 0
        self.peaks = {}
        self.graph_peaks = {}
        self.known = weakref.WeakSet()
        if model is None:
            return
        embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        self.tables = {tuple(embedding.weight.shape) for embedding in embeddings}
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.gradients = {storage_key(gradient) for gradient in gradients}

    # ---- compiled graphs

    def replace_compile(self):
        """Make torch.compile use compile_graph()."""
        compile_any = torch.compile

        def compile_for_card(function, **_):
            passes = ("forward", "backward")
            if not isinstance(function, torch.nn.Module):
                passes = ("head", "head")
            backend = functools.partial(self.compile_graph, passes=passes)
            return compile_any(function, dynamic=False, backend=backend)

        torch.compile = compile_for_card

    def note_lowered_graphs(self):
        """Make Inductor append each graph that it has made kernels of to `lowered`."""
        compile_to_module = GraphLowering.compile_to_module
        lowered = self.lowered

        def compile_and_note(graph):
            module = compile_to_module(graph)
            lowered.append(graph)
            return module

        GraphLowering.compile_to_module = compile_and_note

    def compile_graph(self, graph, inputs, passes: tuple[str, str]):
        """Compile with Inductor; a backend of torch.compile. What it returns runs the graph with
        fake tensors and counts its kernels. `passes` names its forward and its backward pass."""
        compile_pass = functools.partial(self.compile_pass, passes=passes)
        return compile_fx(graph, inputs, inner_compile=compile_pass)

    def compile_pass(self, graph, inputs, passes: tuple[str, str], **options):
        phase = passes[1] if options.get("is_backward") else passes[0]
        self.lowered.clear()
        with self.uncounted():
            compile_fx_inner(graph, inputs, **options)
            compiled = [read_graph(phase, lowering, self.tables) for lowering in self.lowered]

        def run(*arguments):
            for part in compiled:
                self.enter_graph(part)
            with self.uncounted():
                outputs = graph.forward(*arguments)
            self.allocate(outputs)
            if phase == "forward":
                self.saved = self.live
            return outputs

        return make_boxed_func(run)

    def enter_graph(self, graph: Graph):
        self.work += graph.work
        in_use = self.live - graph.read + graph.peak
        self.peaks[graph.phase] = max(in_use, self.peaks.get(graph.phase, 0))
        self.graph_peaks[graph.phase] = max(graph.peak, self.graph_peaks.get(graph.phase, 0))

    # ---- what runs outside of them

    @contextlib.contextmanager
    def uncounted(self):
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def note_operator(self, operator, arguments, options, result):
        """Count an operator that runs by itself, as a kernel of its own."""
        self.allocate(result)
        self.peaks["eager"] = max(self.live, self.peaks.get("eager", 0))
        name = str(operator)
        size = bytes_on_card((arguments, options, result))
        if size <= SMALL or any(view in name for view in VIEWS):
            return
        flops = 0
        count_flops = flop_registry.get(getattr(operator, "_overloadpacket", None))
        if count_flops:
            flops = int(count_flops(*arguments, **options, out_val=result))
        kind = kind_of(name, flops)
        if name.startswith("aten.add_") and storage_key(arguments[0]) in self.gradients:
            kind = "gradients"
        self.work.append(Work("eager", kind, size, flops))

    def allocate(self, results):
        """Count the memory of new tensors until it is freed."""
        for tensor in tensors_on_card(results):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, self.known, storage.nbytes())

    def free(self, known: weakref.WeakSet, size: int):
        if known is self.known:  # not of an earlier start()
            self.live -= size


class FakeCard(FakeTensorMode):
    """Makes all tensors fake, and tells a Counter what runs outside of the compiled graphs."""

    avoid_device_init = True  # torch.tensor(..., device="cuda") would otherwise copy to the card

    def __init__(self, counter: Counter):
        super().__init__(allow_non_fake_inputs=True)
        self.counter = counter

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator is aten._local_scalar_dense.default:
            return zero_of(arguments[0])
        if operator in SAME_FORMAT:
            check_formats(operator, (arguments, options))
        with self.counter.uncounted():  # an operator may be made of others
            result = super().__torch_dispatch__(operator, types, arguments, options)
        if not self.counter.inside and TracingContext.try_get() is None:
            self.counter.note_operator(operator, arguments, options or {}, result)
        return result


def check_formats(operator, arguments):
    """Raise TypeError unless all floating-point tensors have the same number format."""
    tensors = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    formats = {str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()}
    if len(formats) > 1:
        raise TypeError(f"{operator} of {' and '.join(sorted(formats))}")


def zero_of(tensor):
    """Return the number that a fake tensor is read as."""
    if tensor.dtype == torch.bool:
        return False
    return 0.0 if tensor.dtype.is_floating_point else 0


def zeros_like_list(tensor) -> list:
    """Return what Tensor.tolist() gives for a fake vector."""
    return [zero_of(tensor)] * len(tensor)


def tensors_on_card(tree) -> list[torch.Tensor]:
    leaves = tree_leaves(tree)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.device.type == "cuda"]


def bytes_on_card(tree) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_on_card(tree))


def storage_key(tensor) -> int:
    """Return what tensors have in common that share their memory."""
    return tensor.untyped_storage()._cdata


def kind_of(name: str, flops: int) -> str:
    if "attention" in name:
        return "attention"
    if "mm" in name and flops:
        return "products"
    return "kernels"


# ---- what Inductor knows about a graph


def read_graph(phase: str, lowering: GraphLowering, tables: set[tuple]) -> Graph:
    """Return the work and the memory of a graph that Inductor has lowered to kernels."""
    with V.set_graph_handler(lowering):
        scheduler = lowering.scheduler
        peak, inputs = prepare_planning_info(
            scheduler.nodes,
            scheduler.name_to_buf,
            scheduler.name_to_fused_node,
            OrderedSet(lowering.graph_inputs),
            OrderedSet(lowering.get_output_names()),
        )
        read = sum(buffer.mpi_buffer.size_free for buffer in inputs.values())
        embeddings = [
            name
            for name, value in lowering.graph_inputs.items()
            if hasattr(value, "get_size") and tuple(value.get_size()) in tables
        ]
        work = [work_of(phase, node, embeddings) for node in scheduler.nodes]
    return Graph(phase, [item for item in work if item], int(peak), int(read))


def work_of(phase: str, node, embeddings: list[str]) -> Work | None:
    """Return what one node of Inductor's schedule does; None for a part of another node's output.

    The bytes are those of every buffer that it reads or writes, once. A table of embeddings that
    is only looked up is left out: the rows of a micro-batch are small beside the rest.
    """
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    if isinstance(node, ExternKernelSchedulerNode):
        return work_of_extern(phase, node.node, sum(accesses.values()))
    reads = [read for read in node.read_writes.reads if isinstance(read, MemoryDep)]
    looked_up = {read.name for read in reads if read.is_indirect()}
    for name in looked_up.intersection(embeddings):
        accesses.pop(name, None)
    return Work(phase, "kernels", int(sum(accesses.values())), 0)


def work_of_extern(phase: str, kernel, size: int) -> Work | None:
    """Return what a kernel of PyTorch's own does, which moves `size` bytes."""
    origin = kernel.get_origin_node()
    if origin is None:  # it has several outputs
        operator = getattr(kernel, "op_overload", None)
        found = [node for node in kernel.origins if node.target is operator]
        origin = found[0] if found else None
    if origin is None or "getitem" in str(origin.target):
        return None
    name = str(origin.target)
    if "int8_mm" in name:  # torchao's, which torch cannot count
        rows, inner = origin.args[0].meta["val"].shape
        columns = origin.args[1].meta["val"].shape[1]
        return Work(phase, "int8 products", int(size), 2 * rows * inner * columns)
    flops = int(count_flops_fx(origin) or 0)
    return Work(phase, kind_of(name, flops), int(size), flops)
