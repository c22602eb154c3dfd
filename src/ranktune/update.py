"""`LowRankUpdate`: the tensors of one adapter on one layer, and the update they make.

All tensors sit directly on this module (PEFT's checkpoint keys end in ``container.adapter.tensor``), magnitudes stay at
least float32 whatever the base's dtype, and row norms are reused while nothing they depend on has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranktune.errors import ConfigError
from ranktune.frozen_weight import Weight, dense, product
from ranktune.lowrank import Components, low_rank_linear
from ranktune.magnitude import gain_offset, has_small_gain, norm_dtype, row_norms
from ranktune.norm_cache import NormCache
from ranktune.sensitivity import SensitivityTap


@dataclass(frozen=True)
class Base:
    """The frozen layer under an adapter, as the update needs it.

    Attributes:
        weight: [out, in], any strides, or in blocks of rows where the layer keeps it in fewer bits.
        bias: [out] or None.
    """

    weight: Weight
    bias: Tensor | None


class LowRankUpdate(nn.Module):
    """``s B diag(gate) A``, with a magnitude per output row where the adapter is weight-decomposed.

    Args:
        in_features, out_features: the base layer's shape.
        capacity: R, the number of rank-1 components there is room for.
        gated: whether each component has a trained gate, and with it a rank state that a policy moves.
        averages: how many running averages the policy keeps of the module; None is one for each component.
        dropout: probability on the update's input, in training.
        detach_norm: whether the norm is a constant in backward (DoRA section 4.3).
        dora_dropout: see `ranktune.config.RankConfig`.

    Attributes:
        lora_A: [R, in]. lora_B: [out, R].
        gate: [R], at least float32, or None.
        lora_magnitude_vector: m [out], at least float32, or None.
        rank_active: [R] bool, the components that count as the rank; rank_average: [R] or [averages], the policy's
            running averages; rank_step: [1] int64, optimizer steps done. None without gates. They are saved with the
            weights.
        score: [1], a leaf that receives the update's sensitivity as its gradient, while a controller wants it.
    """

    gate: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    rank_active: Tensor | None
    rank_average: Tensor | None
    rank_step: Tensor | None

    # The dimension along which a tensor lists the components.
    _COMPONENT_DIM: ClassVar[dict[str, int]] = {
        "lora_A": 0,
        "lora_B": 1,
        "gate": 0,
        "rank_active": 0,
        "rank_average": 0,
    }
    # Kept at float32 or wider when the module is cast: in bfloat16 a decomposed layer is no identity at the start, and
    # a running average or a gate would stop moving.
    _WIDE: ClassVar[tuple[str, ...]] = ("gate", "lora_magnitude_vector", "rank_average")
    # Parameters that weight decay would pull towards a zero that means nothing to them.
    UNDECAYED: ClassVar[tuple[str, ...]] = ("gate", "lora_magnitude_vector")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        capacity: int,
        *,
        gated: bool = False,
        averages: int | None = None,
        dropout: float = 0.0,
        detach_norm: bool = True,
        dora_dropout: Literal["both_paths", "low_rank_path"] = "both_paths",
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.detach_norm = detach_norm
        self.drop_base_path = dora_dropout == "both_paths"
        self.lora_A = nn.Parameter(torch.empty(capacity, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, capacity))
        self.register_parameter("gate", nn.Parameter(torch.ones(capacity)) if gated else None)
        self.register_parameter("lora_magnitude_vector", None)
        self.register_buffer("rank_active", torch.ones(capacity, dtype=torch.bool) if gated else None)
        self.register_buffer("rank_average", torch.zeros(capacity if averages is None else averages) if gated else None)
        self.register_buffer("rank_step", torch.zeros(1, dtype=torch.int64) if gated else None)
        # Set by a controller: whether nobody moves the ranks that should be moved, and whether they still will be.
        self.needs_controller = gated
        self.ranks_will_move = False
        # The registry of warnings about this adapter; its modules share one (`RankTuner`).
        self.warned: dict[Any, Any] = {}
        self.score: Tensor | None = None
        self._averages = averages
        self._cache = NormCache()

    @property
    def capacity(self) -> int:
        """R, the number of components there is room for."""
        return self.lora_A.shape[0]

    @property
    def rank(self) -> int:
        """The number of components in use."""
        if self.rank_active is None or self.rank_active.is_meta:
            return self.capacity
        return int(self.rank_active.sum())

    @property
    def mergeable(self) -> bool:
        """Whether the update is the same for every input, so that a weight can hold it."""
        return True

    def require_mergeable(self) -> None:
        """Refuse where the update depends on its input.

        Raises:
            ConfigError: it does; the message says what to do instead.
        """

    @property
    def window(self) -> int:
        """How many leading components take part in forward."""
        return self.capacity

    @property
    def trained(self) -> int:
        """How many leading components have vectors that are trained."""
        return self.capacity

    @property
    def parameters_in_use(self) -> int:
        """How many numbers the update has, without those of a nested one that are beyond the rank that was set."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameters_at(self, rank: int) -> int:
        """How many numbers the update would have at another rank, with no components beyond it."""
        whole = sum(parameter.numel() for parameter in self.parameters())
        return whole - (self.capacity - rank) * self._parameters_of_a_component()

    def _parameters_of_a_component(self) -> int:
        listed = {id(tensor): tensor.numel() // self.capacity for tensor, _ in self.components() if self.capacity}
        return sum(listed[id(parameter)] for parameter in self.parameters() if id(parameter) in listed)

    def required_gate(self) -> nn.Parameter:
        """The gate of an update that has one."""
        if self.gate is None:
            raise AttributeError("this update has no gate: its method does not move ranks")
        return self.gate

    def components(self) -> Iterator[tuple[Tensor, int]]:
        """The tensors that list the components, and the dimension along which each does."""
        for name, dim in self._COMPONENT_DIM.items():
            tensor = getattr(self, name)
            if tensor is not None and (name != "rank_average" or self._averages is None):
                yield tensor, dim

    def keep_components(self, kept: Tensor) -> None:
        """Drop all components but those at the indices ``kept`` [k], for good.

        Every Parameter stays the object it is, so an optimizer's references hold; gradients are dropped.
        """
        for tensor, dim in self.components():
            _replace_data(tensor, tensor.data.index_select(dim, kept.to(tensor.device)).contiguous())

    @property
    def decomposed(self) -> bool:
        """Whether the update has a magnitude (DoRA)."""
        return self.lora_magnitude_vector is not None

    def reset_parameters(self, identity: bool = True) -> None:
        """A Kaiming-uniform with a = sqrt(5); B zero, or random like A where the identity is not wanted."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if identity:
            nn.init.zeros_(self.lora_B)
        else:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def init_magnitude(self, weight: Weight, scale: float) -> int:
        """Add the magnitude, equal to the row norms of ``W + s B A``, so that W' = W + s B A at the start.

        On the meta device, where the values will come from a file, only the shape is made.

        Returns:
            The number of zero rows in ``weight``, whose norm is floored.
        """
        if self.lora_A.is_meta or weight.is_meta:
            norms = torch.empty(weight.shape[0], dtype=norm_dtype(weight.dtype), device="meta")
            self.lora_magnitude_vector = nn.Parameter(norms)
            return 0
        constants = self._cache.constants(weight)
        with torch.no_grad():
            norms = row_norms(weight, constants, *self.factors(scale))
        self.lora_magnitude_vector = nn.Parameter(norms)
        return int((constants.squared == 0).sum())

    def forward(self, x: Tensor, base: Base, scale: float) -> Tensor:
        """The adapted layer's output [..., out] for x [..., in], through the fused op."""
        added = self.components_now(scale)
        offset = self._gain_offset(base.weight, added) if self.decomposed else None
        return low_rank_linear(
            x,
            base.weight,
            base.bias,
            added.A,
            added.B,
            added.scale,
            offset=offset,
            dropout=self.dropout if self.training else 0.0,
            drop_base_path=self.drop_base_path,
            small_gain=offset is not None and offset.requires_grad and has_small_gain(offset),
            score=self.score if self.training else None,
            span=added.span,
            gate=added.gate,
            gates_trained=added.gates_trained,
        )

    def plain_delta(self, x: Tensor, base_output: Tensor, base: Callable[[], Base], scale: float) -> Tensor:
        """What the update adds to ``base_output`` [..., out], from stock operators.

        It reads the base layer's output rather than its weight where it can, so that quantised, hooked and compiled
        layers work; ``base`` is called only where the weight itself is needed.
        """
        dtype = base_output.dtype
        dropout = self.dropout if self.training else 0.0
        dropped = F.dropout(x.to(dtype), dropout)
        added = self.components_now(scale)
        A, B = added.plain()
        low_rank = F.linear(F.linear(dropped, A.to(dtype)), B.to(dtype)) * added.scale
        if self.score is not None and self.training:
            low_rank = SensitivityTap.apply(low_rank, dropped, A.to(dtype), B.to(dtype), added.scale, self.score)
        if not self.decomposed:
            return low_rank
        layer = base()
        if dropout > 0.0 and self.drop_base_path:
            unscaled = product(dropped, layer.weight, layer.bias)
        else:
            unscaled = base_output if layer.bias is None else base_output - layer.bias
        return (low_rank + self._gain_offset(layer.weight, added) * (unscaled + low_rank)).to(dtype)

    def delta_weight(self, weight: Weight, scale: float) -> Tensor:
        """``W' - W`` [out, in], at least float32: what forward adds in evaluation."""
        wide = norm_dtype(weight.dtype)
        A, B, scale = self.factors(scale)
        delta = scale * (B.to(wide) @ A.to(wide))
        if self.decomposed:
            offset = self._gain_offset(weight, Components(A, B, scale))
            delta = delta + offset.unsqueeze(1) * (dense(weight).to(wide) + delta)
        return delta

    def factors(self, scale: float) -> tuple[Tensor, Tensor, float]:
        """A [k, in], ``B diag(gate)`` [out, k] and the scale, of the components that forward adds in evaluation.

        Args:
            scale: the layer's ``scaling``.
        """
        return self.lora_A, self.lora_B if self.gate is None else self.lora_B * self.gate, scale

    def components_now(self, scale: float) -> Components:
        """What the next forward pass adds, in training too."""
        if self.gate is None:
            return Components(*self.factors(scale))
        return Components(self.lora_A, self.lora_B, scale, self.gate)

    def plain_factors(self, scale: float, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
        """`factors` as a plain LoRA keeps them: without components that add nothing, or that only wait.

        Args:
            scale: the layer's ``scaling``.
            rank: of a nested update, the rank to cut it at.

        Raises:
            ConfigError: the update is not nested and cannot be cut, or (in subclasses) is no plain LoRA at all.
        """
        if rank is not None:
            raise ConfigError(f"rank={rank} cuts a nested update, and the components of this one are in no order.")
        A, B, scale = self.factors(scale)
        if self.gate is None:
            return A, B, scale
        kept = self._components_that_count().to(A.device)
        return A.index_select(0, kept), B.index_select(1, kept), scale

    def _components_that_count(self) -> Tensor:
        """Indices into `factors`. A component pruned for now may have been moved since: forward then adds it."""
        return (cast(Tensor, self.rank_active) | (self.required_gate() != 0)).nonzero().squeeze(1)

    def _gain_offset(self, weight: Weight, added: Components) -> Tensor:
        """``m / ||W + s B diag(gate) A|| - 1`` [out]."""
        if self.detach_norm or not torch.is_grad_enabled():
            sources = [self.lora_A, self.lora_B] if self.gate is None else [self.lora_A, self.lora_B, self.gate]
            norms = self._cache.norms(weight, added, sources)
        else:
            guard = not torch.compiler.is_compiling()
            constants = self._cache.constants(weight)
            norms = row_norms(weight, constants, *added.plain(), added.scale, guard=guard)
        return gain_offset(cast(Tensor, self.lora_magnitude_vector), norms)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankUpdate:
        """Move or cast the tensors, keeping the wide ones at least float32."""
        before = {name: tensor.detach() for name in self._WIDE if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = getattr(self, name)
            if now.is_floating_point() and now.dtype.itemsize < 4:
                values = now if old.is_meta or now.is_meta else old.to(now.device)
                now.data = values.to(norm_dtype(now.dtype))
        return self

    def misfit(self, tensors: Mapping[str, tuple[int, ...]]) -> str | None:
        """What keeps saved tensors (name to shape) from being loaded here, in words, or None.

        The number of components may be another than here, if it is the same in all of them.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if set(tensors) != set(own):
            missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
            return f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which do not belong to it"
        listing = {id(tensor): dim for tensor, dim in self.components()}
        count = tensors["lora_A"][0] if tensors["lora_A"] else 0
        for name, shape in own.items():
            if (dim := listing.get(id(getattr(self, name)))) is not None:
                shape = (*shape[:dim], count, *shape[dim + 1 :])
            if tensors[name] != shape:
                return f"has {name} of shape {list(tensors[name])} where {list(shape)} belongs"
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load, taking the number of components from the file: a compacted adapter has fewer than it started with."""
        saved = state_dict.get(f"{prefix}lora_A")
        if saved is not None and saved.ndim == 2 and saved.shape[0] != self.capacity:
            self._resize(saved.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _resize(self, capacity: int) -> None:
        """Make room for another number of components, without values."""
        for tensor, dim in self.components():
            shape = list(tensor.shape)
            shape[dim] = capacity
            _replace_data(tensor, torch.empty(shape, dtype=tensor.dtype, device=tensor.device))


def _replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor data of another shape, without its gradient.

    While any graph of an earlier step is alive, its gradient accumulator still expects the old shape; torch makes a new
    one only where the data's type changes, so it changes once in between.
    """
    tensor.grad = None
    if tensor.is_floating_point():
        tensor.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    tensor.data = data
