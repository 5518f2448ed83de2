"""Several processes that train or predict together: who am I, what do the others know.

Lightning starts the processes itself (each runs the command line again), or torchrun or SLURM does.
Small messages (a path, a fault, a request to stop) go through a gloo group of their own, so that
they work beside NCCL too.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import Tensor, nn

from heed_core.exchange import same_for_all, sum_of_all
from heed_runtime.errors import UsageError

if TYPE_CHECKING:
    from heed_runtime.settings import TrainerSettings

ValueT = TypeVar("ValueT")
_FOLDER = "HEED_SHARED_FOLDER"
"""Set by the first process for those that Lightning starts from it."""
_messages: dist.ProcessGroup | None = None


def rank() -> int:
    """The number of this process among those that work together; 0 alone."""
    if dist.is_initialized():
        return dist.get_rank()
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ and (name != "SLURM_PROCID" or _slurm()):
            return int(os.environ[name])
    return 0


def world() -> int:
    """How many processes work together; 1 before they are connected."""
    return dist.get_world_size() if dist.is_initialized() else 1


def external() -> tuple[int, int] | None:
    """(processes per host, hosts) if torchrun or SLURM started this process, else None."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, total = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return local, total // local
    if _slurm():
        hosts = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // hosts, hosts
    return None


def shape(settings: TrainerSettings) -> tuple[int, int]:
    """(processes per host, hosts) of a training or a prediction with these settings.

    Raises:
        UsageError: torchrun or SLURM started another number of processes than the settings ask for.
    """
    wanted = (settings.devices or max(1, torch.cuda.device_count()), settings.nodes)
    started = external()
    if started is None:
        return wanted
    if wanted not in ((1, 1), started):
        raise UsageError(
            f"devices={wanted[0]} and nodes={wanted[1]} were asked for, but the launcher started "
            f"{started[0]} processes on each of {started[1]} hosts; let them agree"
        )
    return started


def join(*, cuda: bool) -> None:
    """Connect the processes that torchrun or SLURM started; nothing to do in any other case."""
    if external() is None or dist.is_initialized():
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo", init_method="env://")
    else:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        slurm = SLURMEnvironment()
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"tcp://{slurm.main_address}:{slurm.main_port}",
            rank=slurm.global_rank(),
            world_size=slurm.world_size(),
        )
    atexit.register(leave)


def leave() -> None:
    """Disconnect, if connected."""
    global _messages
    _messages = None
    if dist.is_initialized():
        dist.destroy_process_group()


def settle_folder(make: Callable[[], Path]) -> Path:
    """Let the first process choose and make a folder, and tell all the others which it is.

    Args:
        make: Called in the first process only.
    """
    if world() > 1:
        return share(make() if rank() == 0 else None)
    if rank() > 0 and _FOLDER in os.environ:
        return Path(os.environ[_FOLDER])
    folder = make()
    os.environ[_FOLDER] = str(folder.resolve())
    return folder


def share(value: ValueT | None) -> ValueT:
    """The first process's value, in every process."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, src=0, group=_group())
    assert box[0] is not None
    return box[0]


def gather(value: ValueT) -> list[ValueT]:
    """The values of all processes, in the order of their ranks, in every process."""
    if world() == 1:
        return [value]
    values: list[ValueT | None] = [None] * world()
    dist.all_gather_object(values, value, group=_group())
    return [item for item in values if item is not None]


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if world() == 1:
        return flag
    raised = torch.tensor([int(flag)])
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=_group())
    return bool(raised.item())


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Where all processes end with the same fault, let only the first tell it."""
    try:
        yield
    except Exception:
        if rank() > 0 and world() > 1:
            raise SystemExit(0) from None
        raise


def _slurm() -> bool:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return SLURMEnvironment.detect()


def _group() -> dist.ProcessGroup | None:
    global _messages
    if dist.get_backend() == "gloo":
        return None
    if _messages is None:
        _messages = dist.new_group(backend="gloo")
    return _messages


def _sum(x: Tensor) -> Tensor:
    """The sum over processes, whose gradient is the sum of the gradients of all processes."""
    return same_for_all(sum_of_all(x, None), None)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of the batches of all processes, on any device.

    torch's own `nn.SyncBatchNorm` refuses CPU tensors. Mean and variance are summed in two passes,
    so that the result differs from one process with the whole batch by rounding alone.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 axes (b, c, ...), got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel: (b, c, ...) -> (b, c, ...)."""
        local = not self.training and self.track_running_stats
        if local or world() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        axes = [0, *range(2, input.dim())]
        count = input.numel() / input.shape[1]
        total = _sum(torch.cat([input.sum(axes), input.new_tensor([count])]))
        mean = total[:-1] / total[-1].detach()
        centred = input - _channels(mean, input)
        squares = _sum(centred.square().sum(axes))
        variance = squares / total[-1].detach()
        if self.training and self.track_running_stats:
            self._track(mean.detach(), variance.detach(), float(total[-1].detach()))
        y = centred * _channels((variance + self.eps).rsqrt(), input)
        if self.weight is None:
            return y
        return y * _channels(self.weight, input) + _channels(self.bias, input)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: float) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        part = self.momentum
        if part is None:
            part = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), part)
        unbiased = variance * (count / max(count - 1.0, 1.0))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), part)


class CpuLayerSync(LayerSync):
    """Lightning's plug-in that synchronises batch normalisation between processes on the CPU."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Let every batch normalisation see all processes; its parameters stay the same."""
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.__dict__["_alone"] = type(layer)
                layer.__class__ = SyncBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo `apply`."""
        for layer in model.modules():
            if isinstance(layer, SyncBatchNorm) and "_alone" in layer.__dict__:
                layer.__class__ = layer.__dict__.pop("_alone")
        return model


def _channels(x: Tensor, like: Tensor) -> Tensor:
    return x.view(1, -1, *[1] * (like.dim() - 2))
