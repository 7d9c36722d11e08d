"""THE core model: an image encoder, text layers, fusion layers with cross-attention, and four heads.

Shape suffixes: B images or captions, N texts given to the fusion layers, M images they look at, L tokens of a
text, P image tokens ([CLS] and patches), D width of the text side, H width of the image side, E width of the shared
space, V vocabulary, h heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from agatool.config import ModelConfig

TEXT_NORM_EPS = 1e-12  # BERT's
IMAGE_NORM_EPS = 1e-6  # the original ViT's


class Encoded(NamedTuple):
    """What an encoder gives: `tokens` after the last layer and a unit-length `feature` of the [CLS] token."""

    tokens: Tensor  # [B, P, H] of an image, [B, L, D] of a text
    feature: Tensor  # [B, E]


@dataclass
class AttentionMaps:
    """Pass one to `encode_text` or `fuse` to get attention weights back, one tensor a layer.

    With `class_only`, text self-attention gives the [CLS] row alone, [B, h, 1, L], at the cost of that row, and the
    fused attention kernel still does the rest.
    """

    class_only: bool = False
    text_self: list[Tensor] = field(default_factory=list)  # [B, h, L, L]
    fusion_self: list[Tensor] = field(default_factory=list)  # [N, h, L, L]
    cross: list[Tensor] = field(default_factory=list)  # [N, h, L, P]


# For each fusion layer the keys and values of the image tokens, each [M, h, P, d].
ImageKeysValues = list[tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Multi-head attention with its output projection; `memory_width` is the width of what is looked at."""

    def __init__(self, width: int, heads: int, memory_width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width, width)
        self.value = nn.Linear(memory_width, width)
        self.output = nn.Linear(width, width)

    def _split(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `memory` [M, S, memory_width], each [M, h, S, d]."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def value_norms(self, value: Tensor) -> Tensor:
        """Length of what each projected item of `value` [M, h, S, d] adds to the output at full weight: [M, h, S].

        Kobayashi et al. 2020, "Attention is not only a weight".
        """
        weight_hdD = self.output.weight.unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        gram_hdd = weight_hdD @ weight_hdD.mT  # lengths without an output-wide vector for every item
        return ((value @ gram_hdd) * value).sum(-1).clamp(min=0).sqrt()

    def forward(
        self,
        x_NLD: Tensor,
        memory: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        maps: list[Tensor] | None = None,
        class_only: bool = False,
    ) -> Tensor:
        """Attend from `x_NLD` to projected `memory`; `mask` [N, 1, 1, S] is True where looking is allowed.

        Memory of one item (M = 1) is shared by all N without a copy: their queries are laid end to end.
        """
        query, (key, value) = self._split(self.query(x_NLD)), memory
        texts = query.shape[0]
        if shared := (key.shape[0] == 1 and texts > 1):
            query = query.transpose(0, 1).flatten(1, 2).unsqueeze(0)
        dropout = self.dropout if self.training else 0.0
        if maps is not None and class_only:
            maps.append(_weights(query[:, :, :1], key, mask))
        if maps is None or class_only:
            context = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        else:
            weights = _weights(query, key, mask)
            maps.append(_unshare(weights, texts) if shared else weights)
            context = F.dropout(weights, dropout) @ value
        if shared:
            context = _unshare(context, texts)
        return self.output(context.transpose(1, 2).flatten(2))


def _weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


def _unshare(x: Tensor, texts: int) -> Tensor:
    """[1, h, N*L, s] -> [N, h, L, s]."""
    return x.squeeze(0).unflatten(1, (texts, -1)).transpose(0, 1)


class Layer(nn.Module):
    """A BERT layer (post-norm; Devlin et al. 2019); with `image_width` it also looks at an image (a fusion layer)."""

    def __init__(self, config: ModelConfig, image_width: int | None = None) -> None:
        super().__init__()
        width = config.text_width
        norm = partial(nn.LayerNorm, width, eps=TEXT_NORM_EPS)
        self.attention = Attention(width, config.text_heads, width, config.dropout)
        self.attention_norm = norm()
        if image_width is not None:
            self.cross_attention = Attention(width, config.text_heads, image_width, config.dropout)
            self.cross_attention_norm = norm()
        self.expand = nn.Linear(width, config.text_mlp)
        self.contract = nn.Linear(config.text_mlp, width)
        self.mlp_norm = norm()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_NLD: Tensor,
        mask: Tensor,
        image: tuple[Tensor, Tensor] | None = None,
        self_maps: list[Tensor] | None = None,
        cross_maps: list[Tensor] | None = None,
        class_only_maps: bool = False,
        cls_only: bool = False,
    ) -> Tensor:
        """[N, L, D] -> [N, L, D], or [N, 1, D] where only the [CLS] output is wanted (`cls_only`)."""
        memory = self.attention.project(x_NLD)
        x = x_NLD[:, :1] if cls_only else x_NLD
        attended = self.attention(x, memory, mask, self_maps, class_only_maps)
        x = self.attention_norm(x + self.dropout(attended))
        if image is not None:
            seen = self.cross_attention(x, image, None, cross_maps)
            x = self.cross_attention_norm(x + self.dropout(seen))
        return self.mlp_norm(x + self.dropout(self.contract(F.gelu(self.expand(x)))))


class ConvStem(nn.Module):
    """Stride-2 3x3 convolutions down to one token per `patch` pixels, and one more at that size.

    From scratch on little data this learns where one big linear patch projection does not (Xiao et al. 2021, "Early
    convolutions help transformers see better"). `summarise` starts [CLS] from a view of the whole grid at half its
    size, each place with its own weights: people stand upright in their crops, so the place says which part is seen
    (the idea of part-based re-identification, Sun et al. 2018).
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int = 3, embed_dim: int = 96, **_: object
    ) -> None:
        super().__init__()
        stages = patch_size.bit_length() - 1
        if 2**stages != patch_size:
            raise ValueError(f"model.patch must be a power of two with a conv stem, not {patch_size}")
        self.grid = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch_size = (patch_size, patch_size)
        layers: list[nn.Module] = []
        for stage in range(1, stages + 1):
            channels = max(24, embed_dim >> (stages - stage))
            layers.append(_convolution(in_chans, channels, 2))
            in_chans = channels
        self.stages = nn.Sequential(*layers, _convolution(in_chans, embed_dim, 1))
        self.proj = nn.Conv2d(embed_dim, embed_dim, 1)
        self.coarse = _convolution(embed_dim, embed_dim, 2)
        self.coarse_grid = ((self.grid[0] + 1) // 2, (self.grid[1] + 1) // 2)
        self.summary = nn.Linear(self.coarse_grid[0] * self.coarse_grid[1] * embed_dim, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, rows, columns, H]."""
        # Channels last: convolutions, their backward most of all, take a third less time on a CPU.
        images = images.contiguous(memory_format=torch.channels_last)
        return self.proj(self.stages(images)).permute(0, 2, 3, 1)

    def summarise(self, patches: Tensor) -> Tensor:
        """[B, rows, columns, H] -> [B, 1, H]; another grid is averaged to the one that the weights know."""
        coarse = self.coarse(patches.permute(0, 3, 1, 2))
        if coarse.shape[2:] != self.coarse_grid:
            coarse = F.adaptive_avg_pool2d(coarse, self.coarse_grid)
        return self.summary(coarse.permute(0, 2, 3, 1).flatten(1))[:, None]


def _convolution(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.GELU()
    )


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings [1, 1 + rows * columns, H] for another grid: bicubic, align_corners=False, [CLS] kept."""
    if old == new:
        return positions
    cls, grid = positions[:, :1], positions[:, 1:]
    square = grid.unflatten(1, old).permute(0, 3, 1, 2).float()
    resized = F.interpolate(square, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls, resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], dim=1)


class ImageEncoder(nn.Module):
    """A timm ViT with a [CLS] token, giving all its tokens after the final norm, at any image size."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.image_model is None:
            self.vit = VisionTransformer(
                img_size=config.image_size,
                patch_size=config.patch,
                embed_dim=config.image_width,
                depth=config.image_depth,
                num_heads=config.image_heads,
                mlp_ratio=config.image_mlp_ratio,
                num_classes=0,
                global_pool="",
                norm_layer=partial(nn.LayerNorm, eps=IMAGE_NORM_EPS),
                dynamic_img_size=True,
                **({"embed_layer": ConvStem} if config.stem == "conv" else {}),
            )
        else:
            self.vit = timm.create_model(
                config.image_model, num_classes=0, img_size=config.image_size, dynamic_img_size=True
            )
        vit = self.vit
        if not isinstance(vit, VisionTransformer) or vit.num_prefix_tokens != 1 or vit.no_embed_class:
            raise ValueError(f"model.image_model {config.image_model!r} is not a plain ViT with a [CLS] token")
        if vit.embed_dim != config.image_width:
            raise ValueError(f"model.image_width is {config.image_width}, but {config.image_model} has {vit.embed_dim}")
        self.patch = vit.patch_embed.patch_size[0]
        self.grid = (config.image_size[0] // self.patch, config.image_size[1] // self.patch)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, 1 + rows * columns, H]."""
        vit = self.vit
        patches = vit.patch_embed(images)
        rows, columns = patches.shape[1:3]
        cls = vit.cls_token.expand(len(images), -1, -1)
        if isinstance(vit.patch_embed, ConvStem):
            cls = cls + vit.patch_embed.summarise(patches)
        x = torch.cat([cls, patches.flatten(1, 2)], dim=1)
        x = vit.pos_drop(x + resample_positions(vit.pos_embed, self.grid, (rows, columns)))
        return vit.norm(vit.blocks(vit.norm_pre(x)))


class PersonSearchModel(nn.Module):
    """Image encoder, text encoder and cross-modal encoder with ITC, ITM and MLM heads (ALBEF, Li et al. 2021)."""

    tokenizer: Any = None  # the agatool.tokenization.Tokenizer its weights were trained with; `agatool.load` sets it

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.text_width
        self.image_encoder = ImageEncoder(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_positions, width)
        self.type_embeddings = nn.Embedding(2, width)  # BERT's; a caption is always segment 0
        self.embedding_norm = nn.LayerNorm(width, eps=TEXT_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.text_layers = nn.ModuleList(Layer(config) for _ in range(config.text_layers))
        self.fusion_layers = nn.ModuleList(Layer(config, config.image_width) for _ in range(config.fusion_layers))
        self.vision_proj = nn.Linear(config.image_width, config.embed_dim)
        self.text_proj = nn.Linear(width, config.embed_dim)
        self.itm_head = nn.Linear(width, 2)
        self.mlm_transform = nn.Linear(width, width)
        self.mlm_norm = nn.LayerNorm(width, eps=TEXT_NORM_EPS)
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))  # the decoder is tied to word_embeddings
        self.temperature = nn.Parameter(torch.tensor(0.07))  # of ITC; ALBEF's start
        for name, module in self.named_modules():
            if config.image_model is None or not name.startswith("image_encoder"):
                _init(module)

    def encode_image(self, images: Tensor) -> Encoded:
        """Normalised images [B, 3, height, width] -> tokens [B, P, H] and feature [B, E]."""
        tokens = self.image_encoder(images)
        return Encoded(tokens, F.normalize(self.vision_proj(tokens[:, 0]), dim=-1))

    def encode_text(self, ids: Tensor, mask: Tensor, maps: AttentionMaps | None = None) -> Encoded:
        """Token ids [B, L] and mask [B, L] (non-zero = real token) -> tokens [B, L, D] and feature [B, E]."""
        if ids.shape[1] > self.config.max_positions:
            raise ValueError(f"{ids.shape[1]} tokens, but the model has {self.config.max_positions} positions")
        positions = self.position_embeddings.weight[: ids.shape[1]]
        x_BLD = self.word_embeddings(ids) + positions + self.type_embeddings.weight[0]
        x_BLD = self.dropout(self.embedding_norm(x_BLD))
        allowed = mask.bool()[:, None, None]
        taps, class_only = (maps.text_self, maps.class_only) if maps else (None, False)
        for layer in self.text_layers:
            x_BLD = layer(x_BLD, allowed, self_maps=taps, class_only_maps=class_only)
        return Encoded(x_BLD, F.normalize(self.text_proj(x_BLD[:, 0]), dim=-1))

    def project_image(self, image_tokens: Tensor) -> ImageKeysValues:
        """Image tokens [M, P, H] -> every fusion layer's keys and values, to be used for many texts."""
        return [cast(Attention, layer.cross_attention).project(image_tokens) for layer in self.fusion_layers]

    def fuse(
        self,
        text_tokens: Tensor,
        text_mask: Tensor,
        image: Tensor | ImageKeysValues,
        image_index: Tensor | None = None,
        cls_only: bool = False,
        maps: AttentionMaps | None = None,
    ) -> Tensor:
        """Let texts look at images: tokens [N, L, D] of `encode_text`, mask [N, L] -> [N, L, D].

        `image` is tokens [M, P, H] or what `project_image` made of them, M = N, or M = 1 for one image shared by all
        texts, or any M with `image_index` [N] saying which image each text looks at. `cls_only` skips what only the
        other tokens' outputs need in the last layer and returns [N, 1, D].
        """
        projected = self.project_image(image) if isinstance(image, Tensor) else image
        allowed = text_mask.bool()[:, None, None]
        x_NLD = text_tokens
        for number, (layer, pair) in enumerate(zip(self.fusion_layers, projected, strict=True), 1):
            if image_index is not None:
                pair = (pair[0].index_select(0, image_index), pair[1].index_select(0, image_index))
            x_NLD = layer(
                x_NLD,
                allowed,
                pair,
                self_maps=maps.fusion_self if maps else None,
                cross_maps=maps.cross if maps else None,
                cls_only=cls_only and number == len(self.fusion_layers),
            )
        return x_NLD

    def itm(self, fused: Tensor) -> Tensor:
        """Fused states [N, L, D] -> logits [N, 2] of the [CLS] token: no match, match."""
        return self.itm_head(fused[:, 0])

    def mlm(self, fused: Tensor) -> Tensor:
        """Fused states [..., D] -> logits [..., V] over the vocabulary."""
        hidden = self.mlm_norm(F.gelu(self.mlm_transform(fused)))
        return F.linear(hidden, self.word_embeddings.weight, self.mlm_bias)


def _init(module: nn.Module) -> None:
    """LeCun normal for linear layers: at width 96, BERT's 0.02 starts on a long plateau."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def log_odds(itm: Tensor) -> Tensor:
    """Log-odds of a match [...] from ITM logits [..., 2]; 0 is even."""
    return itm[..., 1] - itm[..., 0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; the former mode comes back after it."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
