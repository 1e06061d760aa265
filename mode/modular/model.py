"""MoDE as a Hugging Face model: `MoDEConfig` and `MoDEForCausalLM`, registered with the Auto classes on import.

from mode.modular.model import MoDEForCausalLM
model = MoDEForCausalLM.from_pretrained("folder")     # AutoModelForCausalLM does the same
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from mode.backbone.load import REPORTING, WEIGHTS, check_loaded, fingerprint_weights, list_weight_files, load_model
from mode.backbone.shape import divide_layers
from mode.backbone.structure import resize_cache_slots
from mode.config.backbone import Backbone
from mode.config.base import STRICT, Name
from mode.config.check import validate
from mode.config.method import GateSettings
from mode.core.errors import ConfigError
from mode.modular.build import insert_blocks, plan_cache_slots
from mode.modular.head import insert_head


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Shape:
    """The settings of `MoDEConfig`, as types that are checked. A config.json may come from anywhere."""

    num_blocks: Annotated[int, Field(gt=0)]
    expert_layers: Annotated[int, Field(gt=0)]
    experts: tuple[Name, ...]
    gate: GateSettings
    head_rank: Annotated[int, Field(ge=0)]
    backbone: dict[str, Any]
    embedded: bool

    def __post_init__(self) -> None:
        if len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts={list(self.experts)}: an expert is named twice")


class MoDEConfig(PreTrainedConfig):  # type: ignore[misc]  # the library is untyped
    """Configuration of a modular model: its decoder, its blocks, its experts.

    Attributes:
        decoder: Configuration of the backbone, with its L layers.
        num_blocks: B.
        expert_layers: l.
        experts: Domain of every expert; their number is N.
        gate: Settings of the gates (`mode.config.method.GateSettings`).
        head_rank: r, rank of the experts' updates of the head; 0 for none.
        backbone: Source of the backbone: name, path, revision, fingerprint; empty if unknown.
        embedded: Whether a saved folder contains the backbone's weights; if not, they are loaded from `backbone`.
    """

    model_type = "mode"
    has_no_defaults_at_init = True

    def __init__(
        self,
        decoder: PreTrainedConfig | Mapping[str, Any] | None = None,
        num_blocks: int = 1,
        expert_layers: int = 1,
        experts: Sequence[str] = (),
        gate: Mapping[str, Any] | None = None,
        head_rank: int = 0,
        backbone: Mapping[str, Any] | None = None,
        embedded: bool = True,
        **options: Any,
    ) -> None:
        """Read a configuration; `decoder` may be a mapping, as it is in JSON.

        Raises:
            ConfigError: A setting is not allowed, or B does not divide L.
        """
        settings = {
            "num_blocks": num_blocks,
            "expert_layers": expert_layers,
            "experts": experts,
            "gate": gate or {},
            "head_rank": head_rank,
            "backbone": backbone or {},
            "embedded": embedded,
        }
        shape: Shape = validate(Shape, settings, "")
        self.decoder: Any = decoder if isinstance(decoder, PreTrainedConfig | None) else read_decoder(decoder)
        if self.decoder is not None:  # here, because the library wraps later errors of a configuration
            divide_layers(self.decoder.num_hidden_layers, shape.num_blocks)
        self.num_blocks = shape.num_blocks
        self.expert_layers = shape.expert_layers
        self.experts = list(shape.experts)
        self.gate = dict(gate or {})
        self.head_rank = shape.head_rank
        self.backbone = shape.backbone
        self.embedded = shape.embedded
        super().__init__(**options)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **options: Any) -> Any:
        """Read a configuration from JSON. The caller chooses the attention; the file does not."""
        return super().from_dict(drop_attention(config_dict), **options)

    @property
    def gates(self) -> GateSettings:
        """Settings of the gates, checked."""
        return GateSettings(**self.gate)

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        """Return the decoder's configuration with a key-value cache slot for every layer of the modular model."""
        if self.decoder is None:
            return self
        layers = self.decoder.num_hidden_layers
        templates = plan_cache_slots(layers, self.num_blocks, len(self.experts), self.expert_layers, self.gates)
        return resize_cache_slots(self.decoder, templates)


def drop_attention(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a `config.json` without its choice of attention, which may name code on the hub."""
    return {name: value for name, value in settings.items() if name.lstrip("_") != "attn_implementation"}


def read_decoder(settings: object) -> PreTrainedConfig:
    """Return the configuration of a decoder from JSON.

    Raises:
        ConfigError: transformers does not know the decoder, or refuses a setting.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("model_type"), str):
        raise ConfigError("decoder.model_type: this setting is missing; it names the architecture, such as llama")
    try:
        decoder = AutoConfig.for_model(**drop_attention(settings))
    except Exception as error:  # the checks of a configuration raise errors of many types
        reason = (str(error).split(" Should contain")[0].splitlines() or [""])[-1].strip()
        raise ConfigError(f"decoder: {reason or type(error).__name__}") from error
    layers = getattr(decoder, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 1:
        raise ConfigError(f"decoder.num_hidden_layers={layers}: Input should be greater than 0")
    return decoder


class MoDEForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # the library is untyped
    """A frozen backbone with experts in its blocks; a causal LM like any other in calls, generation and saving.

    Attributes:
        backbone: The backbone's own class; its layers are in `blocks`.
        blocks: The B blocks.
        head: The block of the head, if experts update the head too.
    """

    config_class = MoDEConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ("Block",)

    def __init__(
        self,
        config: MoDEConfig,
        backbone: PreTrainedModel | None = None,
        init: str = "copy",
        backbone_bias: float = 0.0,
    ) -> None:
        """Add experts to a backbone's blocks, in place.

        Args:
            config: Configuration of the model.
            backbone: A causal LM to build on; without one, a fresh one of `config.decoder`.
            init: Initialisation of the experts, `random` or `copy` of the block's first layers.
            backbone_bias: The gates' initial logit of the backbone; the experts' is 0.

        Raises:
            ConfigError: B does not divide L, or `copy` asks for more layers than a block has.
        """
        attention = config._attn_implementation  # what the caller asks for, if anything, until the next line
        super().__init__(config)
        if backbone is None:
            backbone = AutoModelForCausalLM.from_config(
                config.decoder, dtype=torch.get_default_dtype(), attn_implementation=attention
            )
            init = "random"  # a block may have fewer layers than an expert, and saved weights replace these
        self.backbone = backbone
        self.generation_config = backbone.generation_config
        self.blocks = insert_blocks(
            backbone,
            num_experts=len(config.experts),
            num_blocks=config.num_blocks,
            expert_layers=config.expert_layers,
            init=init,
            backbone_bias=backbone_bias,
            gate=config.gates,
        )
        if config.head_rank:
            self.head = insert_head(
                backbone,
                num_experts=len(config.experts),
                rank=config.head_rank,
                backbone_bias=backbone_bias,
                gate=config.gates,
            )
        with no_init_weights():  # all weights are initialised already
            self.post_init()

    @property
    def base_model(self) -> Any:
        """The decoder without its head."""
        return self.backbone.base_model

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights that a file lacks, as the backbone's family does."""
        self.backbone._init_weights(module)

    def get_input_embeddings(self) -> Any:
        """Return the backbone's token embeddings."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's token embeddings."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """Return the backbone's head."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's head."""
        self.backbone.set_output_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """Run the backbone's forward pass, with blocks as layers; same arguments, same output."""
        blocks: Any = self.blocks
        for block in blocks:
            block.gate.padding = attention_mask
        return self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **options,
        )

    def save_pretrained(self, save_directory: Any, *args: Any, embed: bool | None = None, **options: Any) -> None:
        """Write the model as safetensors with its configuration.

        Args:
            save_directory: Folder to write to.
            args: As the library's.
            embed: Whether the folder contains the backbone's weights too; `config.embedded` by default. If not, it
                contains experts and gates alone, and loading needs the backbone that they were trained on.
            options: As the library's.

        Raises:
            ConfigError: `embed=False`, and the source of the backbone is unknown.
        """
        embed = self.config.embedded if embed is None else embed
        if not embed and not self.config.backbone:
            raise ConfigError("embed=False: the configuration does not say where the backbone comes from")
        self.config.embedded = embed
        self.config.decoder.dtype = self.dtype
        if not embed:
            options["state_dict"] = self.own_state()
        super().save_pretrained(save_directory, *args, **options)

    def own_state(self) -> dict[str, Tensor]:
        """Return the tensors of experts and gates, by name."""
        return {
            name: value
            for name, value in self.state_dict().items()
            if name.startswith("head.") or (name.startswith("blocks.") and name.split(".")[2] != "backbone")
        }

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **options: Any) -> Any:
        """Load a saved model; its backbone comes from the same folder or from the source in the configuration.

        Raises:
            ConfigError: The backbone cannot be loaded, is another one, or the weights are not exactly those of the
                model that the configuration describes.
        """
        config = options.pop("config", None) or MoDEConfig.from_pretrained(path)
        if Path(path).is_dir():
            list_weight_files(Path(path))
        if config.embedded:
            asks = options.pop("output_loading_info", False)
            model, report = super().from_pretrained(path, *args, config=config, **{**options, **REPORTING})
            check_loaded(model, report, path)
            return (model, report) if asks else model
        about = dict(config.backbone)
        if lacking := [name for name in ("name", "path", "fingerprint") if about.get(name) is None]:
            raise ConfigError(f"{path}: config.json has no backbone.{lacking[0]}, and the folder has no backbone")
        expected = about.pop("fingerprint")
        backbone = Backbone(**about)
        found = fingerprint_weights(backbone)
        if found != expected:
            raise ConfigError(
                f"{path}: made for backbone {backbone.name} with weights {expected}; {backbone.path} has {found}"
            )
        model = cls(config, load_model(backbone))
        tensors = load_file(str(cached_file(path, WEIGHTS)))
        own = {name: value.shape for name, value in model.own_state().items()}
        if own != {name: value.shape for name, value in tensors.items()}:
            raise ConfigError(f"{path}: its weights are not those of the experts and gates that config.json describes")
        model.load_state_dict(tensors, strict=False)
        dtype = options.get("dtype")
        return model.to(config.dtype or torch.float32 if dtype in (None, "auto") else dtype).eval()


def make_modular(
    backbone: PreTrainedModel,
    *,
    experts: Sequence[str],
    num_blocks: int,
    expert_layers: int,
    init: str = "copy",
    backbone_bias: float = 0.0,
    gate: GateSettings | None = None,
    head_rank: int = 0,
    source: Mapping[str, Any] | None = None,
) -> MoDEForCausalLM:
    """Freeze a backbone and add experts to its blocks, in place.

    Args:
        backbone: A causal LM with L layers.
        experts: Domain of every expert, N of them.
        num_blocks: B, which must divide L.
        expert_layers: l, layers per expert and block.
        init: `random`: as the backbone's family initialises its layers; `copy`: the first l layers of the block.
        backbone_bias: The gates' initial logit of the backbone; the experts' is 0.
        gate: How gates choose; as in the paper by default.
        head_rank: r, rank of the experts' updates of the head; 0 for none.
        source: Source of the backbone: name, path, revision, fingerprint.

    Raises:
        ConfigError: B does not divide L, or `copy` asks for more layers than a block has.
    """
    config = MoDEConfig(
        decoder=backbone.config,
        num_blocks=num_blocks,
        expert_layers=expert_layers,
        experts=experts,
        gate=asdict(gate or GateSettings()),
        head_rank=head_rank,
        backbone=source,
    )
    return MoDEForCausalLM(config, backbone, init, backbone_bias)


AutoConfig.register("mode", MoDEConfig)


AutoModelForCausalLM.register(MoDEConfig, MoDEForCausalLM)
