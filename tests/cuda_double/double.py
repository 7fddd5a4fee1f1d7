"""The double of `torch.cuda`: what it offers, and what becomes of an operator that is called under it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from tests.cuda_double import operators as ops
from tests.cuda_double.graphs import Graphs, Work
from tests.cuda_double.memory import Memories, Memory
from tests.cuda_double.pools import Pools, Workspaces
from tests.cuda_double.queue import Queue, as_on_a_device
from tests.cuda_double.streams import Accesses, DoubleStream, Seen, Streams

REAL = (torch.Tensor, torch.nn.Parameter)  # no fake ones, as there are while a model is traced


class CudaDouble(TorchDispatchMode):
    """All of `torch.cuda` that is used; active in the thread that enters it.

    Args:
        seed: of the order in which launches run that need not come one after the other.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.faults: list[str] = []
        self.graphs = Graphs()
        self.host: Seen = Counter()  # what the host waited for
        self.queue = Queue(seed, self.faults)
        self.memories = Memories()
        self.all_streams = Streams(lambda: DoubleStream(self.queue, self.calls, self.host))
        self.pools = Pools()
        self._workspaces = Workspaces(self.faults)
        self._accesses = Accesses(self.faults)

    @property
    def default(self) -> DoubleStream:
        """The stream that threads begin with."""
        return self.all_streams.default

    @property
    def streams(self) -> list[DoubleStream]:
        """All others."""
        return self.all_streams.made

    def current_stream(self, device: Any = None) -> DoubleStream:
        return self.all_streams.current

    @property
    def is_alone(self) -> bool:
        """Whether the current thread's operators go through it, and through no trace."""
        return _get_current_dispatch_mode_stack() == [self]

    @contextmanager
    def stream(self, stream: DoubleStream) -> Iterator[None]:
        before, self.all_streams.current = self.current_stream(), stream
        try:
            yield
        finally:
            self.all_streams.current = before

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def synchronize(self, device: Any = None) -> None:
        if self.current_stream().recording is not None:
            self.current_stream().refuse()
        self.calls.append("synchronize")
        with self.queue.lock:
            self.queue.run_all()
            for stream in (self.default, *self.streams):
                self.host |= stream.seen

    def memory_reserved(self, device: Any = None) -> int:
        return self.pools.reserved()

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self.pools.give_back()

    def current_blas_handle(self) -> int:
        self.calls.append("handle")
        self._workspaces.use(self.current_stream())
        return 1

    def clear_workspaces(self) -> None:
        self.calls.append("clear")
        self._workspaces.clear()

    def record_stream(self, tensor: torch.Tensor, stream: DoubleStream) -> None:
        """`tensor.record_stream(stream)`."""
        with as_on_a_device():
            self.memories.of(tensor).users.add(stream)

    def on_the_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor, made on the current stream and waited for."""
        with self.queue.lock, as_on_a_device():
            self.wait(tensor)
            return self.memories.view(tensor).clone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if ops.is_view(func):
            return func(*args, **kwargs)
        tensors = ops.tensors_in((args, kwargs))
        if not all(type(tensor) in REAL for tensor in tensors):
            return func(*args, **kwargs)
        if torch._C._len_torch_dispatch_stack():  # a trace is under way
            self.current_stream().synchronize()
            return func(*args, **kwargs)
        if ops.is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        with self.queue.lock:
            if tensors and all(map(self.memories.is_host_number, tensors)):
                return func(*args, **kwargs)
            if func.overloadpacket in ops.PRODUCTS:
                self._workspaces.use(self.current_stream())
            self._look_for_freed()
            if ops.waits(func, args):
                return self._run_now(func, args, kwargs, tensors)
            return self._run_later(func, args, kwargs)

    def launch(self, work: Work) -> None:
        """Put work on the current stream, and look whether all that it touches is ordered before it."""
        stream = self.current_stream()
        number = stream.launch()
        for memory, writes in work.uses:
            self._accesses.add(memory, stream, number, writes=writes, by=work.by)
        for memory in work.made:
            memory.written[stream] = number
        stream.tail = (self.queue.add(work.run, stream.tail),)

    def _run_now(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """An operator that the host waits for."""
        stream = self.current_stream()
        if stream.recording is not None:
            stream.refuse()
        self.wait(*tensors)
        seen = ops.with_tensors(self.memories.view, (args, kwargs))
        result = func(*seen[0], **seen[1])
        if func._schema.is_mutable:
            return _written(func, args, kwargs)
        return ops.with_tensors(self._copied, result)

    def _copied(self, result: torch.Tensor) -> torch.Tensor:
        tensor = self._allocate(result)
        self.memories.view(tensor).copy_(result)
        return tensor

    def _run_later(self, func: Any, args: Any, kwargs: Any) -> Any:
        stream, written = self.current_stream(), _written(func, args, kwargs)
        seen = ops.with_tensors(self._seen_by_launches, (args, kwargs))
        used = [
            (self.memories.of(tensor), writes)
            for tensors, writes in ops.arguments(func, args, kwargs)
            for tensor in tensors
        ]
        outputs: list[torch.Tensor] = []
        run = ops.runner(func, *seen, outputs)
        if func._schema.is_mutable:
            result = written
            if ops.draws(func):
                ops.outputs_like(func, args, kwargs)
        else:
            result = ops.with_tensors(self._allocate, ops.outputs_like(func, args, kwargs))
        made = [] if func._schema.is_mutable else ops.tensors_in(result)
        outputs += map(self.memories.view, made)
        if func.overloadpacket not in ops.EMPTY:
            work = Work(run, func, used, [self.memories.of(tensor) for tensor in made])
            if stream.recording is not None:
                stream.recording.tape.append(work)
            else:
                self.launch(work)
        return result

    def _seen_by_launches(self, tensor: torch.Tensor) -> torch.Tensor:
        seen = self.memories.view(tensor)
        return seen.clone() if self.memories.is_host_number(tensor) else seen

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        """Memory on the current stream, or in the pool of what is recorded there. Free memory may be taken for it."""
        stream = self.current_stream()
        if stream.recording is not None:
            return stream.recording.allocate(like)
        for memory, until in stream.freed:
            self._accesses.reuse(memory, stream)
            poisoning = self.queue.add(memory.poison, (*stream.tail, *until))
            if all(launch.done for launch in until):  # else the allocation that gets it is still to come
                stream.tail = (poisoning,)
        stream.freed.clear()
        return self.memories.allocate(like, stream)

    def _look_for_freed(self) -> None:
        while self.memories.freed:
            memory: Memory = self.memories.freed.popleft()
            memory.freed = True
            if memory.graph is not None:
                if (graph := memory.graph()) is not None:
                    graph.free(memory)
            elif memory.stream is not None:
                memory.stream.freed.append((memory, tuple(last for user in memory.users for last in user.tail)))

    def wait(self, *read: torch.Tensor) -> None:
        """The host waits for the current stream, then reads."""
        stream = self.current_stream()
        for tensor in read:
            self._accesses.add(self.memories.of(tensor), stream, stream.launch(), writes=False, by="the host")
        stream.synchronize()


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """What a mutable operator returns: the arguments that it writes."""
    if not func._schema.is_mutable or not func._schema.returns:
        return None
    written = [t for tensors, writes in ops.arguments(func, args, kwargs) if writes for t in tensors]
    if len(written) != len(func._schema.returns):
        raise NotImplementedError(f"{func} returns more than what it writes")
    return written[0] if len(written) == 1 else tuple(written)
