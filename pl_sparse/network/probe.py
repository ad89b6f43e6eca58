"""What a scorer may ask of the whole model before it prunes: gradients of the loss on calibration batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pl_sparse.core.dtensor import reshard
from pl_sparse.core.parameter import MaskedParameter
from pl_sparse.core.registry import suggestion
from pl_sparse.core.targets import find
from pl_sparse.core.upstream import padding_of
from pl_sparse.network.attention import keeps_inputs_first
from pl_sparse.network.dropout import without_dropout
from pl_sparse.network.hooks import evaluated, hooked, trained, undisturbed

__all__ = ["NORMS", "Probe", "columns_of"]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Gradients(nn.Module):
    """The gradients of the sum of a model's outputs, while parameters that stand in are there: under gradient
    checkpointing the backward pass computes activations again."""

    def __init__(self, model: nn.Module, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.model = model
        self._weights = weights

    def forward(self, x: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(self.model(x).sum(), self._weights, allow_unused=True)


class Probe:
    """A model, some batches, and how their loss is computed. It leaves the model as it found it.

    Args:
        model: what is called with inputs alone, as `model(x)`.
        batches: calibration batches, or a function that fetches them when they are first needed.
        loss: from a batch to the scalar loss, through the model's parameters.
        reduce: the mean of a tensor over processes, where each has its own batches.
        fresh: fetches the batches that follow, for scorers that look at others in each round; None: there are none.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> probe = Probe(net, [torch.ones(1, 2)], lambda batch: net(batch).sum())
    >>> probe.gradients([net.weight])[0].tolist()
    [[1.0, 1.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any] | Callable[[], Sequence[Any]],
        loss: Callable[[Any], Tensor],
        reduce: Callable[[Tensor], Tensor] | None = None,
        fresh: Callable[[], Sequence[Any]] | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.reduce = reduce
        self._batches = batches
        self._fresh = fresh
        self._renewed = False
        self._fetched: Sequence[Any] | None = None

    @property
    def batches(self) -> Sequence[Any]:
        """The calibration batches.

        Raises:
            ValueError: there are none.
        """
        if self._fetched is None:
            with torch.random.fork_rng(devices=[]):  # a shuffling loader draws its seed
                source = self._fresh if self._renewed and self._fresh is not None else self._batches
                self._fetched = source() if callable(source) else source
            if not self._fetched:
                raise ValueError("there is no batch to calibrate scores on: the training data is empty")
        return self._fetched

    def renew(self) -> None:
        """Look at other batches from here on, until `release`."""
        if self._fresh is not None:
            self._fetched, self._renewed = None, True

    def release(self) -> None:
        """Let go of batches that were fetched."""
        if callable(self._batches):
            self._fetched, self._renewed = None, False

    def gradients(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """dL/dw of the sum of the batches' losses; `.grad` is not touched.

        Args:
            weights: parameters of the model.

        Returns:
            A tensor of the weight's shape per weight, zero where the loss does not depend on it.
        """
        with self._calibrating(), trained(weights):
            return self.reduced(self._sum(weights, lambda batch: self.loss(batch)))

    def single_gradients(self, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """dL/dw of each batch's loss, one after the other, as `gradients` has their sum."""
        with self._calibrating(), trained(weights):
            for batch in self.batches:
                gradients = torch.autograd.grad(self.loss(batch), weights, allow_unused=True)
                yield self.reduced(
                    [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
                )

    def hessian_gradients(
        self, weights: Sequence[Tensor], temperature: float = 1.0, logits: str | None = None
    ) -> list[Tensor]:
        """H g with g = dL/dw and H = d2L/dw2, by double backpropagation, L computed with logits / temperature.

        Args:
            weights: parameters of the model.
            temperature: what logits are divided by.
            logits: the name, or a pattern of names, of the modules whose outputs they are; None: the last layer.

        Returns:
            A tensor of the weight's shape per weight.

        Raises:
            ValueError: there is no such module, or the loss does not depend on its output.
        """
        with (
            sdpa_kernel(SDPBackend.MATH),  # fused attention has no second derivative
            self._calibrating(),
            self._cooled(temperature, logits),
            trained(weights),
        ):
            fixed = self.reduced(self._sum(weights, lambda batch: self.loss(batch)))

            def product(batch: Any) -> Tensor:
                first = torch.autograd.grad(self.loss(batch), weights, create_graph=True, allow_unused=True)
                terms = [(g * f).sum() for g, f in zip(first, fixed, strict=True) if g is not None]
                return torch.stack(terms).sum()

            return self.reduced(self._sum(weights, product))

    def synaptic_flow(self, names: Sequence[str]) -> list[Tensor]:
        """dR/d|w| for R = sum of model(1) with |w| for all parameters w and without biases, in float64.

        Norms use their running statistics, of which each process has its own: the mean over processes is taken.

        Args:
            names: of the weights w that the derivative is taken by.

        Returns:
            A tensor of the weight's shape per name, in float64.

        Raises:
            ValueError: the model's input is not a tensor of floats, which alone can be all ones.
        """
        x = _inputs(self.batches[0])
        if not x.is_floating_point():
            raise ValueError(
                f"synflow feeds the model ones of the input's shape, but the batch's first tensor is of {x.dtype}: "
                "use scorer=snip, grasp or magnitude for models of tokens"
            )
        parameters = {name: p.detach().abs().double() for name, p in self.model.named_parameters()}
        for name, value in parameters.items():
            if name.rpartition(".")[2] == "bias" or name.endswith("_bias"):
                value.zero_()
        buffers = {
            name: b.detach().abs().double() if b.is_floating_point() else b.detach().clone()
            for name, b in self.model.named_buffers()
        }
        weights = [parameters[name].requires_grad_() for name in names]
        ones = torch.ones_like(x[:1], dtype=torch.float64)
        with evaluated(self.model), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            replaced = {f"model.{name}": value for name, value in {**parameters, **buffers}.items()}
            flow = functional_call(_Gradients(self.model, weights), replaced, (ones,))
        return self.reduced([torch.zeros_like(w) if g is None else g for w, g in zip(weights, flow, strict=True)])

    @torch.no_grad()
    def activations(self, params: Sequence[MaskedParameter], see: Callable[[MaskedParameter, Tensor], None]) -> None:
        """Run the batches' losses in evaluation mode; what each weight is multiplied with goes to `see` on the way.

        It comes in the order in which the layers are called, a batch at a time, as (groups, positions, in / groups,
        *kernel): a convolution's inputs are unfolded. Nothing comes from layers that are not called, and from those
        whose weight does not multiply their input: transposed convolutions, recurrent layers, the output projection
        of `nn.MultiheadAttention`.

        Args:
            params: the weights.
            see: gets a weight and, in float32 or more, what it is multiplied with.
        """
        by_module: dict[nn.Module, list[MaskedParameter]] = defaultdict(list)
        for param in params:
            by_module[param.module].append(param)

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for param in by_module[module]:
                columns = _columns(param, args[0] if args else next(iter(kwargs.values())))
                if columns is not None:
                    with torch.autocast(columns.device.type, enabled=False):  # it is on where losses are in bfloat16
                        see(param, columns.detach().to(torch.promote_types(columns.dtype, torch.float32)))

        with hooked(by_module, pre=watch), evaluated(self.model):
            for batch in self.batches:
                self.loss(batch)
        reshard(self.model)  # the next pass is to see weights that are written until then

    @torch.no_grad()
    def sums(
        self, params: Sequence[MaskedParameter], of: Callable[[Tensor], Tensor], shape: Callable[[torch.Size], Any]
    ) -> list[Tensor | None]:
        """The sum over batches, and the mean over processes, of something of what each weight is multiplied with.

        All processes take part for all weights, in their order, also where one of them does not call a layer.

        Args:
            params: the weights.
            of: from (groups, positions, in / groups, *kernel) to what is summed.
            shape: from (groups, in / groups, *kernel) to the shape of that.

        Returns:
            One for each weight; None where no process has seen it.
        """
        total: dict[MaskedParameter, Tensor] = {}

        def see(param: MaskedParameter, x: Tensor) -> None:
            total[param] = total[param] + of(x) if param in total else of(x)

        self.activations(params, see)
        found: list[Tensor | None] = []
        for param in params:
            size = columns_of(param)
            mine = total.get(param)
            if size is None or self.reduce is None:
                found.append(mine)
                continue
            dtype = torch.promote_types(param.weight.dtype, torch.float32)
            none = torch.zeros(*shape(size), dtype=dtype, device=param.weight.device)
            seen = none.new_tensor(float(mine is not None))
            value, seen = self.reduced([none if mine is None else mine.to(dtype), seen])
            found.append(value if seen > 0 else None)
        return found

    @torch.no_grad()
    def following_norms(self, modules: Sequence[nn.Module]) -> dict[nn.Module, nn.Module]:
        """The batch norm with scales that takes the output of each of the modules, where one does."""
        outputs: list[tuple[Tensor, nn.Module]] = []  # the tensors are held, so that none takes another's place
        following: dict[nn.Module, nn.Module] = {}

        def made(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                outputs.append((out, module))

        def taken(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            following.update({source: module for out, source in outputs if out is x})

        norms = [m for m in self.model.modules() if isinstance(m, NORMS) and isinstance(m.weight, Tensor)]
        with hooked(modules, post=made), hooked(norms, pre=taken), evaluated(self.model):
            self.loss(self.batches[0])
        return following

    def _sum(self, weights: Sequence[Tensor], scalar: Callable[[Any], Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(weight) for weight in weights]
        for batch in self.batches:
            for so_far, new in zip(total, torch.autograd.grad(scalar(batch), weights, allow_unused=True), strict=True):
                if new is not None:
                    so_far += new
        return total

    def reduced(self, values: list[Tensor]) -> list[Tensor]:
        """Their means over processes."""
        return values if self.reduce is None else [self.reduce(value) for value in values]

    @contextmanager
    def _calibrating(self) -> Iterator[None]:
        """Training mode without dropout."""
        with undisturbed(self.model), torch.enable_grad(), without_dropout(self.model):
            yield

    @contextmanager
    def _cooled(self, temperature: float, logits: str | None) -> Iterator[None]:
        """The outputs of the modules that `logits` names, or of the last layer, divided by `temperature`."""
        if temperature == 1:
            yield
            return
        names = {name.replace("_orig_mod.", ""): module for name, module in self.model.named_modules()}
        if logits is None:
            last = find(self.model, frozen="prune")[-1].module
            chosen = {name: module for name, module in names.items() if module is last}
        else:
            chosen = {name: module for name, module in names.items() if fnmatchcase(name, logits)}
            if not chosen:
                raise ValueError(f"logits={logits!r} matches no module of the model. {suggestion(logits, names)}")
        waiting = dict.fromkeys(chosen)

        def divide(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            def reached(gradient: Tensor) -> None:
                for name in [name for name in waiting if names[name] is module]:
                    del waiting[name]

            if not isinstance(out, Tensor) or not out.requires_grad:
                return None
            out = out / temperature
            out.register_hook(reached)
            return out

        with hooked(chosen.values(), post=divide):
            yield
        if waiting:
            raise ValueError(
                f"temperature={temperature:g} divides the logits, but the loss does not depend on the output of "
                f"{', '.join(waiting)}: name the module that gives them, GraSP(logits='head'), or scorer.logits=head"
            )


def _inputs(batch: Any) -> Tensor:
    """The first tensor of a batch."""
    if isinstance(batch, Tensor):
        return batch
    parts = list(batch.values()) if isinstance(batch, dict) else list(batch)
    if not parts:
        raise ValueError("a calibration batch holds no tensor")
    return _inputs(parts[0])


def columns_of(param: MaskedParameter) -> torch.Size | None:
    """The size of what a weight is multiplied with at a position, (groups, in / groups, *kernel); None if unseen."""
    module, shape = param.module, param.weight.shape
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return torch.Size((module.groups, *shape[1:]))
    if keeps_inputs_first(module):
        return torch.Size((1, shape[0]))
    projects = isinstance(module, nn.MultiheadAttention) and param.name.endswith("in_proj_weight")
    return torch.Size((1, shape[1])) if projects or isinstance(module, nn.Linear) else None


def _columns(param: MaskedParameter, x: Tensor) -> Tensor | None:
    """What a weight is multiplied with, as (groups, positions, in / groups, *kernel), for an input of its layer."""
    module = param.module
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        dims = len(module.kernel_size)
        x = x if x.dim() == dims + 2 else x.unsqueeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, padding_of(module), mode)  # (batch, in, *size)
        for i, (size, step, gap) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
            x = x.unfold(2 + i, gap * (size - 1) + 1, step)[..., ::gap]  # (batch, in, *out, *kernel), dim by dim
        x = x.unflatten(1, (module.groups, -1)).movedim(1, 0)  # (groups, batch, in / groups, *out, *kernel)
        return x.movedim(2, 2 + dims).flatten(1, 1 + dims)  # (groups, batch * positions, in / groups, *kernel)
    projects = isinstance(module, nn.MultiheadAttention) and param.name.endswith("in_proj_weight")
    if projects or isinstance(module, nn.Linear) or keeps_inputs_first(module):
        return x.reshape(1, -1, x.shape[-1])  # (1, positions, in)
    return None
