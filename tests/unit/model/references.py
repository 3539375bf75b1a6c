"""The method written out by hand, in float64 and plain loops, for the tests to compare with."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from model.base_pair import BasePair
from model.batch import Batch
from model.discriminators import Backbone
from model.kv_layout import split
from tests.tiny import TinyPaths
from tests.unit.model.packs import Trained


def hand_abar(kind: str, start: float, end: float) -> list[float]:
    """abar_t by the definition, in Python floats."""
    product, out = 1.0, []
    for t in range(1000):
        part = t / 999
        if kind == "linear":
            beta = start + (end - start) * part
        else:
            beta = (math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * part) ** 2
        product *= 1 - beta
        out.append(product)
    return out


def hand_lab(rgb: tuple[float, float, float]) -> tuple[float, float, float]:
    """CIELAB of one sRGB colour in 0..1, from the standard's definition."""
    r, g, b = ((v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4) for v in rgb)
    x = 0.4124564 * r + 0.3575761 * g + 0.1804375 * b
    y = 0.2126729 * r + 0.7151522 * g + 0.0721750 * b
    z = 0.0193339 * r + 0.1191920 * g + 0.9503041 * b

    def f(t: float) -> float:
        return t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29

    fx, fy, fz = f(x / 0.950470), f(y), f(z / 1.0888300)
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def hand_swd(x: np.ndarray, y: np.ndarray, directions: np.ndarray) -> float:
    """MS-SWD of two pictures [3, S, S] in float64: loops over scales, directions and patches."""

    def lab(picture: np.ndarray) -> np.ndarray:
        side = picture.shape[1]
        out = np.zeros((3, side, side))
        for i in range(side):
            for j in range(side):
                out[:, i, j] = hand_lab(tuple((picture[:, i, j] + 1) / 2))
        return out

    def halve(picture: np.ndarray) -> np.ndarray:
        taps = np.array([1, 4, 6, 4, 1]) / 16
        padded = np.pad(picture, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        side = (picture.shape[1] + 1) // 2
        out = np.zeros((3, side, side))
        for i in range(side):
            for j in range(side):
                patch = padded[:, 2 * i : 2 * i + 5, 2 * j : 2 * j + 5]
                out[:, i, j] = np.einsum("cij,i,j->c", patch, taps, taps)
        return out

    a, b = lab(x), lab(y)
    k = directions.shape[-1]
    scales = []
    while a.shape[1] >= k and len(scales) < 5:
        places = range(a.shape[1] - k + 1)
        total = 0.0
        for direction in directions:
            pa, pb = (
                sorted(
                    float((image[:, i : i + k, j : j + k] * direction).sum())
                    for i in places
                    for j in places
                )
                for image in (a, b)
            )
            total += sum(abs(p - q) for p, q in zip(pa, pb, strict=True)) / len(pa)
        scales.append(total / len(directions))
        a, b = halve(a), halve(b)
    return sum(scales) / len(scales)


def hand_iteration(
    paths: TinyPaths, own: Trained, batch: Batch, pair: BasePair, backbones: Sequence[Backbone]
) -> dict[str, list[float]]:
    """METHOD.md's five items in float64 on plain diffusers networks, one row at a time."""
    torch.set_default_dtype(torch.float64)
    try:
        unets = {
            name: UNet2DConditionModel.from_pretrained(getattr(paths, name) / "unet")
            .double()
            .eval()
            for name in ("teacher", "student")
        }
        vae = AutoencoderKL.from_pretrained(paths.student / "vae").double().eval()
        encoder = copy.deepcopy(pair.text_encoder).double()
        networks = [copy.deepcopy(b.network).double() for b in backbones]

        def seen(k: int, x: torch.Tensor) -> torch.Tensor:
            """The head's feature of one picture; preprocessing has its own tests."""
            out = networks[k](backbones[k].preprocess(x).double())
            if k:
                return out.last_hidden_state[0, 0]
            return networks[k].vision_model.post_layernorm(out.last_hidden_state[0, 0])

        table = encoder.get_input_embeddings().weight
        abar = hand_abar("scaled_linear", 0.00085, 0.012)
        kinds = {
            "teacher": pair.teacher_schedule.prediction,
            "student": pair.student_schedule.prediction,
        }

        def states(row: int, n: int, empty: bool = False) -> torch.Tensor:
            ids = batch.prompts.ids[row : row + 1].clone()
            slots = batch.prompts.slots[row : row + 1]
            if empty:
                ids = pair.tokenizer([""], padding="max_length", return_tensors="pt").input_ids
                return encoder(input_ids=ids).last_hidden_state
            kept = table.data[1].clone()
            table.data[1] = own.teacher.rows[n, 0].double()  # borrow a row that no prompt uses
            assert not (ids == 1).any()
            out = encoder(input_ids=torch.where(slots == 0, 1, ids)).last_hidden_state
            table.data[1] = kept
            return out

        def predict(name: str, n: int, z: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
            layout = getattr(pair, f"{name}_layout")
            weight = getattr(own, name).kv[n].detach().double()
            unets[name].load_state_dict(split(layout, weight), strict=False)
            return unets[name](z, t, encoder_hidden_states=text).sample

        def x0(name: str, out: torch.Tensor, z: torch.Tensor, t: int) -> torch.Tensor:
            a = abar[t]
            if kinds[name] == "epsilon":
                return (z - (1 - a) ** 0.5 * out) / a**0.5
            return a**0.5 * z - (1 - a) ** 0.5 * out

        rows: dict[str, list[float]] = {k: [] for k in ("rec", "mse", "id", "perc", "adv", "disc")}
        for r, n in enumerate(batch.concept.tolist()):
            image = batch.images[r : r + 1].double()
            eps = batch.noise[r : r + 1].double()
            mask = batch.masks[r].double()
            t, t_align = int(batch.t[r]), int(batch.t_align[r])
            text, empty = states(r, n), states(r, n, empty=True)
            # 1
            z0 = 0.5 * vae.encode(image).latent_dist.mean
            a = abar[t]
            z_t = a**0.5 * z0 + (1 - a) ** 0.5 * eps
            wanted = eps if kinds["teacher"] == "epsilon" else a**0.5 * eps - (1 - a) ** 0.5 * z0
            out = predict("teacher", n, z_t, t, text)
            rows["rec"].append(float((mask * (out - wanted)[0] ** 2).sum() / mask.sum()))
            # 2
            start = eps * (1 - abar[999]) ** 0.5
            z_s = x0("student", predict("student", n, start, 999, text), start, 999)
            x_s = vae.decode(z_s / 0.5).sample
            # 3
            w = abar[t_align]
            z_t = w**0.5 * z_s + (1 - w) ** 0.5 * eps
            cond = predict("teacher", n, z_t, t_align, text)
            uncond = predict("teacher", n, z_t, t_align, empty)
            z_g = x0("teacher", uncond + 7.5 * (cond - uncond), z_t, t_align)
            x_g = vae.decode(z_g / 0.5).sample
            rows["mse"].append(float(0.5 * w * ((z_s - z_g) ** 2).mean()))
            f_s, f_g = (networks[0].visual_projection(seen(0, x)) for x in (x_s, x_g))
            cosine = (f_s * f_g).sum() / f_s.norm() / f_g.norm()
            rows["id"].append(float(w * (1 - cosine)))
            assert batch.directions is not None
            distance = hand_swd(
                *(
                    v.clamp(-1, 1).detach().double().numpy()
                    for v in (x_s[0], x_g[0], batch.directions[n][:4])
                )
            )
            rows["perc"].append(0.1 * w * distance)
            # 4 and 5
            adv = disc = 0.0
            for k, head in enumerate(own.heads.heads):
                w1, b1, w2, b2 = (p[n].double() for p in (head.w1, head.b1, head.w2, head.b2))
                judge = [
                    (w2 @ (w1 @ seen(k, x) + b1).clamp_min(0) + b2).softmax(0) for x in (x_s, image)
                ]
                adv -= float(judge[0][1].log())
                disc -= 0.5 * float(judge[1][1].log() + judge[0][0].log())
            rows["adv"].append(adv)
            rows["disc"].append(disc)
        return rows
    finally:
        torch.set_default_dtype(torch.float32)
