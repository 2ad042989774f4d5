"""The published procedure, number for number: every array of the golden files (tests/golden/README.md) in float64.

Set GOLDEN_DIR to another folder of the same format, of any sizes, to hold the code against other numbers.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import assert_relatively_close
from einops import rearrange

from vitmsn import (
    MSNEncoder,
    ViTMSNConfig,
    ViTMSNForPreTraining,
    ViTMSNModel,
    from_original,
    interpolate_positions,
    msn_loss,
    num_patches_to_keep,
    patchify,
    sinkhorn,
    to_original,
)

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
LIMIT = 1e-10  # of each array's largest magnitude


class Golden:
    """One file. Reading an input and comparing an output both tick the array off; none may be left over."""

    def __init__(self, name: str):
        with np.load(GOLDEN_DIR / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.left = set(self.arrays)

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def raw(self, key: str) -> np.ndarray:
        self.left.discard(key)
        return self.arrays[key]

    def number(self, key: str):
        return self.raw(key).item()

    def tensor(self, key: str) -> torch.Tensor:
        """Floats upcast to float64: stored narrower only where that loses nothing."""
        value = torch.from_numpy(np.array(self.raw(key)))
        return value.double() if value.is_floating_point() else value

    def folder(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            key.removeprefix(prefix): self.tensor(key)
            for key in self.arrays
            if key.startswith(prefix)
        }

    def matching(self, pattern: str) -> list[tuple[str, tuple[str, ...]]]:
        """Keys that match, with the groups of the match."""
        return [(key, m.groups()) for key in self.arrays if (m := re.fullmatch(pattern, key))]

    def check(self, limit: float = LIMIT, **ours) -> None:
        for key, value in ours.items():
            assert_relatively_close(value, self.tensor(key), limit, key)

    def check_all(self, ours: dict, limit: float = LIMIT) -> None:
        self.check(limit, **ours)

    def done(self) -> None:
        assert not self.left, f"arrays that no test reproduces: {sorted(self.left)}"


def test_the_loss_its_terms_gradients_and_statistics_are_those_of_the_published_code():
    """loss.npz: msn_loss and its gradients, with each option on and off."""
    golden = Golden("loss")
    for i in range(golden.number("num_cases")):
        c = f"c{i}_"
        inputs = [golden.tensor(c + name) for name in ("anchors", "targets", "prototypes")]
        single = (
            golden.arrays[c + "assignment"].dtype == np.float32
        )  # that case was computed in float32 throughout
        inputs = [x.float() if single else x for x in inputs]
        anchors, targets, prototypes = (x.requires_grad_() for x in inputs)
        assert len(anchors) == golden.number(c + "views") * len(targets)
        use_memax, use_entropy = golden.number(c + "use_memax"), golden.number(c + "use_entropy")
        out = msn_loss(
            anchors,
            targets,
            prototypes,
            temperature=golden.number(c + "tau"),
            sharpening=golden.number(c + "sharpen"),
            label_smoothing=golden.number(c + "smoothing"),
            sinkhorn_iterations=3 * golden.number(c + "sinkhorn"),
            memax_weight=use_memax * golden.number(c + "w_memax"),
            entropy_weight=use_entropy * golden.number(c + "w_ent"),
        )
        out.loss.backward()
        assert targets.grad is None
        ours = {
            "ce": out.cross_entropy,
            "memax": use_memax * out.memax,
            "ent": use_entropy * out.entropy,
            "total": out.loss,
            "assignment": out.target_assignments,
            "grad_anchors": anchors.grad,
            "grad_prototypes": prototypes.grad,
            "num_used": out.prototypes_used,
            "mean_max": out.top_assignment,
            "mean_min": out.bottom_assignment,
        }
        golden.check_all(
            {c + name: value for name, value in ours.items()}, 1e-5 if single else LIMIT
        )
    golden.done()


def test_sinkhorn_is_that_of_the_published_code():
    """sinkhorn.npz: the matrix after one and after three iterations."""
    golden = Golden("sinkhorn")
    for i in range(golden.number("num_cases")):
        log_p = golden.tensor(f"s{i}_in").log()
        for key, (iterations,) in golden.matching(rf"s{i}_out(\d+)"):
            golden.check_all({key: sinkhorn(log_p, int(iterations)).exp()})
    golden.done()


def scheduled(
    train_msn, golden: Golden, cfg: str, ipe: int, epochs: int, steps: int
) -> dict[str, list[float]]:
    """lr, weight decay and sharpening of every step from the settings `cfg...` of a file."""
    n = ipe * epochs
    stretched, warmup = int(1.25 * n), int(golden.number(cfg + "warmup") * ipe)
    rates = [golden.number(cfg + name) for name in ("start_lr", "lr", "final_lr")]
    decays = [golden.number(cfg + name) for name in ("weight_decay", "final_weight_decay")]
    sharpenings = [golden.number(cfg + name) for name in ("start_sharpen", "final_sharpen")]
    return {
        "lr": [train_msn.warmup_cosine(i + 1, warmup, stretched, *rates) for i in range(steps)],
        "wd": [train_msn.cosine(i + 1, stretched, *decays) for i in range(steps)],
        "sharpen": [train_msn.linear(i, 1.25 * n, *sharpenings) for i in range(steps)],
    }


def test_the_schedules_are_those_of_the_published_code():
    """schedules.npz: every step's learning rate, weight decay, sharpening and momentum."""
    train_msn = pytest.importorskip("train_msn")
    golden = Golden("schedules")
    for name in golden.raw("names").tolist():
        ipe, epochs = golden.number(f"{name}/cfg_ipe"), golden.number(f"{name}/cfg_epochs")
        ours = scheduled(train_msn, golden, f"{name}/cfg_", ipe, epochs, ipe * epochs)
        momenta = golden.number(f"{name}/cfg_start_ema"), golden.number(f"{name}/cfg_final_ema")
        ours["ema"] = [
            train_msn.linear(i, 1.25 * ipe * epochs, *momenta) for i in range(ipe * epochs)
        ]
        golden.check_all(
            {
                f"{name}/{key}": torch.tensor(value, dtype=torch.float64)
                for key, value in ours.items()
            }
        )
    golden.done()


def config_of(golden: Golden, weights: dict[str, torch.Tensor]) -> ViTMSNConfig:
    return ViTMSNConfig(
        hidden_size=golden.number("dim"),
        num_hidden_layers=golden.number("depth"),
        num_attention_heads=golden.number("heads"),
        image_size=golden.number("img"),
        intermediate_size=len(weights["blocks.0.mlp.fc1.weight"]),
        patch_size=golden.number("patch"),
        num_channels=weights["patch_embed.proj.weight"].shape[1],
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        layer_norm_eps=golden.number("ln_eps"),
    )


def encoder_of(golden: Golden) -> MSNEncoder:
    """A fresh encoder, in training mode, with the stored weights and running statistics."""
    weights = golden.folder("w/")
    encoder = MSNEncoder(
        config_of(golden, weights), golden.number("hidden"), golden.number("out")
    ).double()
    encoder.load_state_dict(from_original(weights))
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eps, module.momentum = golden.number("bn_eps"), golden.number("bn_momentum")
    return encoder


def original_names(
    values: dict[str, torch.Tensor], config: ViTMSNConfig
) -> dict[str, torch.Tensor]:
    return to_original(values, config.num_channels)


def test_backbone_and_projection_head_are_those_of_the_published_code():
    golden = Golden("backbone")
    encoder = encoder_of(golden)
    config = encoder.config
    assert config.intermediate_size == golden.number("mlp_ratio") * config.hidden_size
    backbone = ViTMSNModel(config).double().eval()
    backbone.load_state_dict(
        {k: v for k, v in encoder.state_dict().items() if not k.startswith("fc.")}
    )
    x, small, keep = golden.tensor("x"), golden.tensor("x_small"), golden.tensor("keep")
    assert num_patches_to_keep(config.grid_size**2, golden.number("patch_drop")) == len(keep)
    keep = keep.expand(len(x), -1)

    with torch.no_grad():
        out = backbone(x, output_hidden_states=True, output_attentions=True)
        golden.check(
            tokens_pre_pos=backbone.patch_embed(patchify(x, config.patch_size)),
            cls=out.last_hidden_state[:, 0],
            last_attention=out.attentions[-1],
            cls_small=backbone(small, interpolate_pos_encoding=True).last_hidden_state[:, 0],
            cls_masked=backbone(x, patches_to_keep=keep).last_hidden_state[:, 0],
            eval_feature_last1=backbone.representation(x),
        )
        for key, (last,) in golden.matching(r"eval_feature_last(\d+)"):
            golden.check_all(
                {key: torch.cat([h[:, 0] for h in out.hidden_states[-int(last) :]], dim=-1)}
            )
        for key, grid in golden.matching(r"pos_(\d+)x(\d+)"):
            golden.check_all(
                {key: interpolate_positions(backbone.pos_embed, tuple(map(int, grid)))}
            )

        golden.check(
            proj_eval=encoder_of(golden).eval()([x], [None])[0],
            proj_small_eval=encoder_of(golden).eval()([small], [None])[0],
            proj_small_train=encoder_of(golden)([small], [None])[0],
            proj_masked_train=encoder_of(golden)([x], [keep])[0],
        )
        after = encoder_of(golden)
        golden.check(proj_train=after([x], [None])[0])
        golden.check_all({f"after_train/{name}": value for name, value in after.named_buffers()})

    views = [x, x.flip(-1), small, small.flip(-2)]
    z = rearrange(encoder(views, [keep, keep, None, None]), "v b e -> (v b) e")
    golden.check(multi_train=z)
    golden.check_all({f"after_multi/{name}": value for name, value in encoder.named_buffers()})
    (torch.linspace(-1, 1, z.numel(), dtype=torch.float64).reshape(z.shape) * z).sum().backward()
    gradients = original_names({name: p.grad for name, p in encoder.named_parameters()}, config)
    assert set(golden.raw("grad_keys")) == set(gradients)
    golden.check(
        grad_norms=torch.stack([gradients[name].norm() for name in golden.raw("grad_keys")])
    )
    golden.check_all({key: gradients[name] for key, (name,) in golden.matching("grad/(.*)")})
    golden.done()


# Zero gradient in exact arithmetic, of which Adam makes steps: the key third of every qkv bias, and shifts that batch
# norm takes away; the running means inherit them.
NOISY = re.compile(r".*(qkv\.bias|norm\.bias|fc\.fc[12]\.bias|running_mean)")


def is_noisy(key: str) -> bool:
    return bool(NOISY.fullmatch(key)) and not re.search(r"blocks\.\d+\.norm", key)


def test_ten_training_steps_leave_the_numbers_of_the_published_code():
    train_msn = pytest.importorskip("train_msn")
    golden = Golden("train")
    ipe, epochs, steps, batch = (golden.number(key) for key in ("ipe", "epochs", "steps", "B"))
    large, small, keep = (
        golden.tensor("views_large"),
        golden.tensor("views_small"),
        golden.tensor("keep"),
    )
    init = golden.folder("init/")
    config = config_of(golden, init)
    random_views, focal_views = golden.number("rand_views"), golden.number("focal_views")
    assert (
        golden.number("cfg/num_proto") == golden.number("K")
        and golden.number("cfg/batch_size") == batch
    )
    assert golden.number("cfg/epochs") == epochs and golden.number("focal") == small.shape[-1]
    assert large.shape[:3] == (ipe, 1 + random_views, batch) and small.shape[:3] == (
        ipe,
        focal_views,
        batch,
    )
    assert num_patches_to_keep(config.grid_size**2, golden.number("patch_drop")) == keep.shape[1]

    use_memax, use_entropy = golden.number("cfg/me_max"), golden.number("cfg/use_ent")
    model = ViTMSNForPreTraining(
        config,
        golden.number("hidden"),
        golden.number("out"),
        golden.number("K"),
        temperature=golden.number("cfg/temperature"),
        label_smoothing=golden.number("cfg/label_smoothing"),
        sinkhorn_iterations=3 * golden.number("cfg/use_sinkhorn"),
        memax_weight=use_memax * golden.number("cfg/memax_weight"),
        entropy_weight=use_entropy * golden.number("cfg/ent_weight"),
    ).double()
    for encoder in (model.anchor_encoder, model.target_encoder):
        encoder.load_state_dict(from_original(init))
    with torch.no_grad():
        model.prototypes.copy_(golden.tensor("init_prototypes"))

    ours = scheduled(train_msn, golden, "cfg/", ipe, epochs, steps)
    momenta = golden.tensor(
        "step_ema"
    )  # the file names no end points of this one; it is a straight line
    slope = (momenta[-1] - momenta[0]).item() / max(steps - 1, 1)
    last = momenta[0].item() + slope * 1.25 * ipe * epochs
    ours["ema"] = [
        train_msn.linear(i, 1.25 * ipe * epochs, momenta[0].item(), last) for i in range(steps)
    ]
    golden.check_all(
        {
            f"step_{key}": torch.tensor(ours[name], dtype=torch.float64)
            for key, name in (("lr", "lr"), ("wd", "wd"), ("T", "sharpen"), ("ema", "ema"))
        }
    )

    groups = train_msn.parameter_groups(model, ours["wd"][0])
    optimizer = torch.optim.AdamW(
        groups,
        lr=ours["lr"][0],
        betas=tuple(golden.tensor("betas").tolist()),
        eps=golden.number("adam_eps"),
    )
    golden.check(opt_group_sizes=[len(group["params"]) for group in optimizer.param_groups])
    prototype_gradients, rows = [], []
    model.prototypes.register_hook(lambda gradient: prototype_gradients.append(gradient.norm()))
    names = golden.raw("norm_keys").tolist()

    def state(encoder):
        return original_names(encoder.state_dict(), config)

    assert set(names) == {
        name for name, value in state(model.anchor_encoder).items() if value.is_floating_point()
    }
    for i in range(steps):
        now = train_msn.StepValues(
            lr=ours["lr"][i],
            weight_decay=ours["wd"][i],
            momentum=ours["ema"][i],
            sharpening=ours["sharpen"][i],
        )
        target_view, *views = [*large[i % ipe], *small[i % ipe]]
        kept = [keep[i].expand(batch, -1)] * random_views + [None] * focal_views
        out, grad_norm = train_msn.train_step(
            model, optimizer, target_view, views, kept, now, golden.number("cfg/clip_grad")
        )
        encoder, target = state(model.anchor_encoder), state(model.target_encoder)
        rows.append(
            {
                "ce": out.cross_entropy,
                "memax": use_memax * out.memax,
                "ent": use_entropy * out.entropy,
                "total": out.loss,
                "grad_norm": grad_norm,
                "assignment": out.target_assignments,
                "proto_grad_norm": prototype_gradients[i],
                "lr_all": torch.tensor(
                    [group["lr"] for group in optimizer.param_groups], dtype=torch.float64
                ),
                "wd_all": torch.tensor(
                    [group["weight_decay"] for group in optimizer.param_groups], dtype=torch.float64
                ),
                "norm_encoder": torch.stack([encoder[name].norm() for name in names]),
                "norm_target": torch.stack([target[name].norm() for name in names]),
                "norm_prototypes": model.prototypes.norm(),
            }
        )
        if i == 0:
            golden.check_all(
                {key: encoder[name] for key, (name,) in golden.matching("step1_encoder/(.*)")}, 1e-8
            )
            golden.check(1e-8, step1_prototypes=model.prototypes)
    noisy = torch.tensor([is_noisy(name) for name in names])
    for name in rows[0]:
        mine, theirs = (
            torch.stack([torch.as_tensor(row[name]).detach() for row in rows]),
            golden.tensor(f"step_{name}"),
        )
        if name in (
            "norm_encoder",
            "norm_target",
        ):  # a column per tensor, each with the limit of its kind
            assert mine.shape == theirs.shape
            for column, tensor_name in enumerate(names):
                assert_relatively_close(
                    mine[:, column],
                    theirs[:, column],
                    1e-6 if noisy[column] else 1e-8,
                    f"step_{name} of {tensor_name}",
                )
        else:
            assert_relatively_close(mine, theirs, LIMIT, f"step_{name}")
    for which, values in (("final_encoder", encoder), ("final_target", target)):
        assert {
            key.removeprefix(which + "/") for key in golden.arrays if key.startswith(which)
        } == set(values)
        for name, value in values.items():
            golden.check_all({f"{which}/{name}": value}, 1e-6 if is_noisy(name) else 1e-8)
    golden.check(1e-8, final_prototypes=model.prototypes)
    golden.done()


def test_the_logistic_probe_finds_the_minimum():
    """logistic.npz: weights, objective and predictions of the probe for each penalty."""
    finetune = pytest.importorskip("finetune")
    if not hasattr(finetune, "fit_logistic_probe"):
        pytest.skip("finetune.py has no logistic probe yet")
    golden = Golden("logistic")
    train_y, test_y = golden.tensor("train_y"), golden.tensor("test_y")
    train_rows, test_rows = (
        finetune.center_and_scale(golden.tensor(f"{part}_x")) for part in ("train", "test")
    )
    golden.check(train_rows=train_rows, test_rows=test_rows)
    for i in range(golden.number("num_lambdas")):
        l2 = golden.number(f"lambda{i}")
        weights = finetune.fit_logistic_probe(train_rows, train_y, len(golden.arrays[f"W{i}"]), l2)
        objective = (
            F.cross_entropy(train_rows @ weights.T, train_y)
            + l2 / len(train_y) / 2 * weights.square().sum()
        )
        predicted = (test_rows @ weights.T).argmax(dim=-1)
        assert (predicted == golden.tensor(f"test_pred{i}")).all()
        golden.check_all(
            {
                f"W{i}": weights,
                f"objective{i}": objective,
                f"test_acc{i}": (predicted == test_y).double().mean(),
            }
        )
    golden.done()
