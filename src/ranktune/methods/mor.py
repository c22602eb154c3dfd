"""MoR, Mixture of Ranks (Tang et al. 2024, arXiv 2410.13408 v2).

Several LoRAs mixed by a gate are one LoRA of larger rank. MoR keeps one shared pair A [r, in], B [out, r] and makes of
it N "rank experts" by scaling its two inner sides, which a router mixes for every token:

    y = W x + s sum_i G_i(x) diag(lambda^B_i) B diag(lambda^A_i) A d(x),    G = softmax(W_g x),    s = lora_alpha / r

with lambda^A_i [r] and lambda^B_i [out]. N experts cost N (r + out) + N in numbers more than one LoRA, where N LoRAs
cost N times as much. A right factor that all experts share bounds the rank of what any one token sees by r: the larger
rank exists across inputs only, as a family of updates whose columns span up to N r dimensions.

Where each part lives:
    the forward pass and its gradient        `ranktune.mixture`
    the tensors, and the fixed mixture        `ranktune.routed`
    a router that several modules share       `ranktune.block_gates`
    the load-balancing loss                   `ranktune.balance`
    a static approximation for merging        `ranktune.static_mixture`

The authors released no code, and the paper leaves much open. What it says nothing or too little about is a field below,
with our choice as its default; what is fixed here without its word: the router is a linear map, decides token by token
(a decision for a whole text would let a causal model see what is still to come) and does not see the dropout. The
paper adapts the feed-forward modules only (gate_proj, up_proj and down_proj of Llama); ``target_modules`` is PEFT's
field with PEFT's defaults, so name them for that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

from torch import nn

from ranktune.block_gates import BlockGates
from ranktune.config import RankConfig, register_method, require_count
from ranktune.errors import ConfigError
from ranktune.routed import RoutedUpdate
from ranktune.update import LowRankUpdate

# A transformer block: everything up to the first number in a module's name, such as "model.layers.3.".
_BLOCK = re.compile(r"(?:[^.\d]+[^.]*\.)*?\d+\.")
_VERA_SCALING = 0.1  # of the rank side, in VeRA (Kopiczko 2023)


@register_method
@dataclass
class MorConfig(RankConfig):
    """A mixture of N rank experts over one shared pair of factors of rank ``r``.

    Its update depends on the input, so merging and export are refused; `ranktune.mean_gate` approximates it by a plain
    LoRA, and ``router="uniform"`` merges exactly.
    """

    method_name: ClassVar[str] = "mor"

    r: int = field(default=8, metadata={"help": "Rank of the factors, which all experts share."})
    # Never None once built.
    lora_alpha: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={"help": "The update is scaled by lora_alpha / r. None is 2 r; the paper gives no value."},
    )
    lora_dropout: float = field(
        default=0.05,
        metadata={"help": "Dropout probability on the update's input, not on the router's. The paper gives no value."},
    )
    num_experts: int = field(default=8, metadata={"help": "N, the rank experts; 8 was best in the paper's ablation."})
    router: Literal["softmax", "uniform", "balanced"] = field(
        default="softmax",
        metadata={
            "help": "'softmax' is the paper's; 'uniform' mixes all experts equally, without a router, and merges "
            "exactly; 'balanced' is softmax with a load-balancing loss that takes effect by itself. The paper found "
            "both alternatives worse."
        },
    )
    balance_weight: float = field(
        default=0.01,
        metadata={
            "help": "Weight of the loss N sum_i f_i P_i with router 'balanced' (f_i: share of tokens that expert i "
            "leads, P_i: its mean gate). The paper does not give its form; this is Switch Transformer's."
        },
    )
    expert_init: Literal["ones", "vera"] = field(
        default="ones",
        metadata={
            "help": "'ones': B is zero and scalings are 1 plus noise. 'vera': B is random, rank scalings are 0.1 and "
            "output scalings zero, as in VeRA; slower. The paper does not say how they start."
        },
    )
    expert_noise: float = field(
        default=0.02,
        metadata={
            "help": "Standard deviation of the noise on scalings that start as ones; it lets the router learn from the "
            "second step. The paper does not say."
        },
    )
    shared_router: bool = field(
        default=False,
        metadata={
            "help": "One router for all adapted modules of a transformer block (those whose names agree up to the "
            "first number), which reads the input of the first one that runs: with gate, up and down projections that "
            "of the feed-forward part. The paper does not say whether each linear layer has its own, as here by "
            "default; its 0.34 % of parameters fit that. Modules outside blocks keep their own."
        },
    )
    router_bias: bool = field(
        default=False,
        metadata={"help": "Whether the router's linear map has a bias, zero at the start. The paper does not say."},
    )
    router_std: float = field(
        default=0.02,
        metadata={"help": "Standard deviation of the router's starting weights. The paper does not say."},
    )

    def _check(self) -> None:
        if self.lora_alpha is None:
            require_count(self, "r", at_least=1)
            self.lora_alpha = 2 * self.r  # pyright: ignore[reportIncompatibleVariableOverride]
        super()._check()
        require_count(self, "num_experts", at_least=1)
        for name, choices in (("router", ("softmax", "uniform", "balanced")), ("expert_init", ("ones", "vera"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, choices))}.")
        for name in ("balance_weight", "expert_noise", "router_std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < math.inf:
                raise ConfigError(f"{name}={value!r} must be a finite number, at least 0.")
        for name in ("shared_router", "router_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false.")
            if getattr(self, name) and self.router == "uniform":
                raise ConfigError(
                    f"{name}=True has no effect with router='uniform', which has no router: leave it out."
                )
        if self.router_bias and self.router == "balanced":
            raise ConfigError(
                "router_bias=True cannot be used with router='balanced': the load-balancing loss is a gradient for the "
                "router's matrix alone. Leave the bias out, or use router='softmax'."
            )
        if self.use_dora:
            raise ConfigError(
                "use_dora=True cannot be used with mor: weight decomposition divides by the row norms of W + dW, and "
                "the router makes another dW for every token. Use DoraConfig, or MorConfig without use_dora."
            )
        if self.num_experts > 1 and self._experts_start_equal() and not self._routes_start_different():
            raise ConfigError(
                f"router={self.router!r} with router_std={self.router_std}, expert_init={self.expert_init!r} and "
                f"expert_noise={self.expert_noise}: the {self.num_experts} experts would start equal, get equal "
                "gradients and stay equal forever. Set expert_noise (with expert_init='ones') above 0"
                + ("." if self.router == "uniform" else ", or router_std.")
            )

    def _experts_start_equal(self) -> bool:
        return self.expert_init == "vera" or self.expert_noise == 0

    def _routes_start_different(self) -> bool:
        return self.router != "uniform" and self.router_std > 0

    def comparable_parameters(self, in_features: int, out_features: int, rank: int) -> dict[str, int]:
        """One LoRA, and as many LoRAs as there are experts with a router (MoE-LoRA)."""
        lora = rank * (in_features + out_features)
        return {
            "LoRA": lora,
            f"MoE-LoRA with {self.num_experts} experts": self.num_experts * (lora + in_features),
        }

    def make_update(self, in_features: int, out_features: int, capacity: int) -> RoutedUpdate:
        """The tensors for one module, without values."""
        return RoutedUpdate(
            in_features,
            out_features,
            capacity,
            num_experts=self.num_experts,
            routed=self.router != "uniform",
            router_bias=self.router_bias,
            balance_weight=self.balance_weight if self.router == "balanced" else 0.0,
            dropout=self.lora_dropout,
        )

    def reset_parameters(self, update: LowRankUpdate) -> None:
        """A Kaiming-uniform, and either B or the output scalings zero, so that the model is unchanged at first."""
        mixture = cast(RoutedUpdate, update)
        vera = self.expert_init == "vera"
        mixture.reset_parameters(identity=self.init_weights and not vera)
        if vera:
            nn.init.constant_(mixture.expert_A, _VERA_SCALING)
            nn.init.normal_(mixture.expert_B, std=0.0 if self.init_weights else 1.0)
        else:
            nn.init.normal_(mixture.expert_A, 1.0, self.expert_noise)
            nn.init.normal_(mixture.expert_B, 1.0, self.expert_noise)
        if mixture.router is not None:
            nn.init.normal_(mixture.router, std=self.router_std)
        if mixture.router_bias is not None:
            nn.init.zeros_(mixture.router_bias)

    def connect(self, updates: Mapping[str, LowRankUpdate]) -> None:
        """With ``shared_router``, leave each block of several modules the router of its first one."""
        if not self.shared_router:
            return
        blocks: dict[str, list[str]] = {}
        for name in updates:
            if (block := _BLOCK.match(name)) is not None:
                blocks.setdefault(block[0], []).append(name)
        for names in blocks.values():
            if len(names) == 1:
                continue
            shared = BlockGates(names, cast(RoutedUpdate, updates[names[0]]))
            for name in names:
                cast(RoutedUpdate, updates[name]).share(shared)

    def as_saved(self, update: LowRankUpdate, tensors: Collection[str]) -> None:
        """See `RankConfig.as_saved`: of modules that share a router, one has it."""
        if self.shared_router and "router" not in tensors:
            cast(RoutedUpdate, update).drop_router()
