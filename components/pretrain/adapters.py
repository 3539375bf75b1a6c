"""Stage "adapters": what the teacher learns of many made-up concepts, for the student to follow.

A student distilled from the bare teacher follows words in one step, and keys and values that move
only in several. So the teacher is taught concepts first, as personalization teaches it (METHOD.md,
"One iteration", 1): C seen subjects in colours that they never have, some by another's name, each
with a token of its own and movements of its own of the keys' and values' weights. The student is
then distilled under them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.pretrain import networks
from components.pretrain.captions import with_article
from components.pretrain.diffusion import predict
from components.pretrain.latents import LatentSet, Noising, empty_ids, encode_pictures
from components.pretrain.training import Stage, Trainee, freeze
from components.pretrain.world import World

ITEMS = 2  # a concept and step, as personalization has
RATE, TOKEN_FACTOR = 3e-4, 5.0  # half of the preset's, which falls; how much faster tokens learn
HUE = 0.9  # spread of the turn of colours, radians
RENAMED = 0.3  # share of the concepts that are called by another's name: shapes too must move


class MovedAttention:
    """Cross-attention with movements of its weights for keys and values, of every item its own.

    Stands in for diffusers' processor. It takes `moves`, two tensors [B, out, in] a layer in the
    order of the network's layers, of which it uses its own.
    """

    def __init__(self, place: int) -> None:
        self.place = place

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        moves: Sequence[Tensor] | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend from [B, P, width] to the text states [B, L, d]; returns [B, P, width]."""
        text = encoder_hidden_states
        parts = [attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)]
        if moves is not None:
            for i in (0, 1):
                move = moves[2 * self.place + i]
                parts[1 + i] = parts[1 + i] + torch.bmm(text, move.transpose(1, 2))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in parts)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        result: Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


class PlainAttention:
    """Self-attention as it is, deaf to `moves`."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, attn: Any, *args: Any, moves: Any = None, **named: Any) -> Tensor:
        """Attend as the processor does."""
        result: Tensor = self.processor(attn, *args, **named)
        return result


def let_move(unet: Any) -> list[tuple[int, int]]:
    """Make a network take `moves`; returns their shapes (out, in)."""
    processors: dict[str, Any] = {}
    shapes: list[tuple[int, int]] = []
    for name, processor in unet.attn_processors.items():
        if ".attn2." in name:
            processors[name] = MovedAttention(len(shapes) // 2)
            layer = unet.get_submodule(name.removesuffix(".processor"))
            shapes += [tuple(linear.weight.shape) for linear in (layer.to_k, layer.to_v)]
        else:
            processors[name] = PlainAttention(processor)
    unet.set_attn_processor(processors)
    return shapes


class Words(nn.Module):
    """An embedding table with further rows, which learn."""

    def __init__(self, table: Tensor, start: Tensor, moved: nn.Parameter) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.cat([table, start]))
        self.moved = moved

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [B, L, d] of tokens [B, L]."""
        rows = F.pad(self.moved * TOKEN_FACTOR, (0, 0, len(self.table) - len(self.moved), 0))
        return F.embedding(ids, self.table + rows)


class Adapted(nn.Module):
    """The frozen teacher and text encoder with C adapters (`learned`)."""

    def __init__(self, teacher: Any, text_encoder: Any, start: Tensor) -> None:
        super().__init__()
        self.learned = nn.ParameterDict({"tokens": nn.Parameter(torch.zeros_like(start))})
        self.teacher, self.text_encoder = copy.deepcopy(teacher), copy.deepcopy(text_encoder)
        self.shapes = let_move(self.teacher)
        for i, shape in enumerate(self.shapes):
            self.learned[f"move{i:02d}"] = nn.Parameter(torch.zeros(len(start), *shape))
        table = self.text_encoder.get_input_embeddings().weight.detach()
        self.text_encoder.set_input_embeddings(Words(table, start, self.learned["tokens"]))

    def moves(self) -> list[Tensor]:
        """Movements of keys' and values' weights [C, out, in], layer by layer."""
        return [self.learned[f"move{i:02d}"] for i in range(len(self.shapes))]

    def read(self, ids: Tensor) -> Tensor:
        """Text states [B, L, d]."""
        states: Tensor = self.text_encoder(ids).last_hidden_state
        return states


@dataclass
class _Compositions:
    latents: Tensor  # [C * M, c, h, w]
    ids: Tensor  # [C * M, L]; a concept's token is the vocabulary's size and its own number
    start: Tensor  # what each token starts from, [C, d]


@torch.no_grad()
def _compose(
    world: World, vae: Any, table: Tensor, tokenizer: Any, concepts: int, each: int, dtype: Any
) -> _Compositions:
    """Draw `each` compositions of every made-up concept: a seen subject in colours of its own."""
    gen, words = world.generator(91), world.captioner
    subjects = world.sample(concepts, gen)
    hue = torch.randn(concepts, device=world.device, generator=gen) * HUE
    names = [world.names[i] for i in subjects.name.tolist()]
    lent = [i % 10 < 10 * RENAMED for i in range(concepts)]
    names = [names[(i + 1) % concepts] if lent[i] else name for i, name in enumerate(names)]
    plain = [tokenizer(name, add_special_tokens=False).input_ids for name in names]
    start = torch.stack([table[ids].mean(0) for ids in plain])
    pieces = []
    for number, (name, ids) in enumerate(zip(names, plain, strict=True)):
        article = with_article(name, plural=False).split()[0]
        before = tokenizer(article, add_special_tokens=False).input_ids
        pieces.append([*before, len(table) + number, *ids])
    tokens = words.table(tokenizer, pieces)
    found: list[tuple[Tensor, Tensor]] = []
    for number in range(concepts):
        row = torch.full((each,), number, device=world.device)
        scenes = world.sample(each, gen, subject=subjects.subject[row], alone=True)
        scenes = replace(
            scenes,
            hue=hue[row],
            saturation=subjects.saturation[row],
            brightness=subjects.brightness[row],
        )
        captions = world.captions(scenes, gen)
        captions[:, 1] = len(words.pieces) + number
        pictures, _ = world.render(scenes)
        found.append((encode_pictures(vae, pictures, gen, dtype), tokens(captions)))
    return _Compositions(torch.cat([z for z, _ in found]), torch.cat([i for _, i in found]), start)


def train_adapters(
    stage: Stage,
    world: World,
    teacher: Any,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    dtype: torch.dtype,
    concepts: int,
    each: int,
    batch: int = 2048,
) -> tuple[LatentSet, list[Tensor], Tensor]:
    """Teach the teacher `concepts` made-up concepts at once, each from `each` compositions.

    Returns:
        The compositions with their captions' text states, the movements [1 + C, out, in] layer by
        layer (row 0 moves nothing), and each composition's row there.
    """
    dev = world.device
    table = text_encoder.get_input_embeddings().weight.detach().to(dev)
    coder = freeze(copy.deepcopy(vae)).to(dev, dtype)
    made = _compose(world, coder, table, tokenizer, concepts, each, dtype)
    network = Adapted(teacher.to(dev), text_encoder.to(dev), made.start)
    trainee = Trainee(network, dev, dtype, (0.9, 0.999), 0.01, ema=0.9, learns="learned.")
    stage.resume({"adapters": trainee})
    gen = torch.Generator(dev).manual_seed(92)
    noising = Noising(networks.alphas_cumprod(dev))
    own = torch.arange(concepts, device=dev).repeat_interleave(ITEMS)

    def step(_: int) -> dict[str, Tensor]:
        trainee.lr.fill_(RATE)
        rows = own * each + torch.randint(0, each, own.shape, device=dev, generator=gen)
        z0, net = made.latents[rows].float(), trainee.net
        t = torch.randint(0, 1000, own.shape, device=dev, generator=gen)
        noise = torch.randn(z0.shape, device=dev, generator=gen)
        text, moves = net.read(made.ids[rows]), [m.index_select(0, own) for m in net.moves()]
        v = predict(net.teacher, noising.add(z0, noise, t), t, text, dtype, moves)
        loss = (v - noising.v(z0, noise, t)).square().mean()
        trainee.step(loss)
        return {"loss": loss}

    stage.run({"adapters": trainee}, step, gen, every=32)
    with torch.no_grad():
        net = trainee.net
        text = torch.cat([net.read(ids) for ids in made.ids.split(batch)])
        moves = [F.pad(move, (0, 0, 0, 0, 1, 0)).detach() for move in net.moves()]
        text = text.to(dtype)
        empty = net.read(empty_ids(tokenizer).to(dev)).to(dtype)
    nowhere = torch.zeros_like(made.latents[:, :1], dtype=torch.uint8)  # nobody asks for the cover
    which = 1 + torch.arange(concepts, device=dev).repeat_interleave(each)
    return LatentSet(made.latents, nowhere, text, empty), moves, which
