"""The published procedure, number for number: every array of the golden files, in float64.

tests/golden/README.md says what the arrays are. Set GOLDEN_DIR to another folder of the same
format, of any sizes, to hold the code against other numbers.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import assert_relatively_close

from vitmsn import (
    MSNEncoder,
    MSNLoss,
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
    without_projection_head,
)

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
LIMIT = 1e-10  # of each array's largest magnitude


class Golden:
    """One file. Reading an input or comparing an output ticks it off; none may be left over."""

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
        matches = []
        for key in self.arrays:
            match = re.fullmatch(pattern, key)
            if match:
                matches.append((key, match.groups()))
        return matches

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
        # One case was computed in float32 throughout.
        single = golden.arrays[c + "assignment"].dtype == np.float32
        dtype = torch.float32 if single else torch.float64
        anchors = golden.tensor(c + "anchors").to(dtype).requires_grad_()
        targets = golden.tensor(c + "targets").to(dtype).requires_grad_()
        prototypes = golden.tensor(c + "prototypes").to(dtype).requires_grad_()
        assert len(anchors) == golden.number(c + "views") * len(targets)

        use_memax = golden.number(c + "use_memax")
        use_entropy = golden.number(c + "use_entropy")
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
        limit = 1e-5 if single else LIMIT
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
        golden.check_all({c + name: value for name, value in ours.items()}, limit)
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
    """lr, weight decay and sharpening of every step from the settings `cfg...` of a file.

    ipe is iterations per epoch, as in the file.
    """
    stretched = int(1.25 * ipe * epochs)
    warmup = int(golden.number(cfg + "warmup") * ipe)
    rates = [golden.number(cfg + name) for name in ("start_lr", "lr", "final_lr")]
    decays = [golden.number(cfg + name) for name in ("weight_decay", "final_weight_decay")]
    sharpenings = [golden.number(cfg + name) for name in ("start_sharpen", "final_sharpen")]
    return {
        "lr": [train_msn.warmup_cosine(i + 1, warmup, stretched, *rates) for i in range(steps)],
        "wd": [train_msn.cosine(i + 1, stretched, *decays) for i in range(steps)],
        "sharpen": straight_line(train_msn, ipe * epochs, sharpenings, steps),
    }


def straight_line(train_msn, total_steps: int, ends: list[float], steps: int) -> list[float]:
    """Values of a linear schedule between `ends`, laid out over 1.25 of the run."""
    return [train_msn.linear(i, 1.25 * total_steps, *ends) for i in range(steps)]


def test_the_schedules_are_those_of_the_published_code():
    """schedules.npz: every step's learning rate, weight decay, sharpening and momentum."""
    train_msn = pytest.importorskip("train_msn")
    golden = Golden("schedules")
    for name in golden.raw("names").tolist():
        ipe = golden.number(f"{name}/cfg_ipe")
        epochs = golden.number(f"{name}/cfg_epochs")
        steps = ipe * epochs
        ours = scheduled(train_msn, golden, f"{name}/cfg_", ipe, epochs, steps)
        momenta = [golden.number(f"{name}/cfg_{end}_ema") for end in ("start", "final")]
        ours["ema"] = straight_line(train_msn, steps, momenta, steps)
        for key, values in ours.items():
            golden.check_all({f"{name}/{key}": torch.tensor(values, dtype=torch.float64)})
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
    config = config_of(golden, weights)
    encoder = MSNEncoder(config, golden.number("hidden"), golden.number("out")).double()
    encoder.load_state_dict(from_original(weights))
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eps = golden.number("bn_eps")
            module.momentum = golden.number("bn_momentum")
    return encoder


def test_the_backbone_the_head_and_their_gradients_are_those_of_the_published_code():
    """backbone.npz: features, projections, running statistics and gradients of one encoder."""
    golden = Golden("backbone")
    config = encoder_of(golden).config
    assert config.intermediate_size == golden.number("mlp_ratio") * config.hidden_size
    patches_to_keep = golden.tensor("keep")
    r = num_patches_to_keep(config.grid_size**2, golden.number("patch_drop"))
    assert len(patches_to_keep) == r

    x = golden.tensor("x")
    patches_to_keep = patches_to_keep.expand(len(x), -1)
    with torch.no_grad():
        check_features(golden, x, patches_to_keep)
        check_projections(golden, x, patches_to_keep)
    check_gradients(golden, x, patches_to_keep)
    golden.done()


def check_features(golden: Golden, x: torch.Tensor, patches_to_keep: torch.Tensor) -> None:
    """What the backbone alone returns: of whole, small and masked images, and its positions."""
    encoder = encoder_of(golden)
    backbone = ViTMSNModel(encoder.config).double().eval()
    backbone.load_state_dict(without_projection_head(encoder.state_dict()))
    small = golden.tensor("x_small")

    out = backbone(x, output_hidden_states=True, output_attentions=True)
    golden.check(
        tokens_pre_pos=backbone.patch_embed(patchify(x, encoder.config.patch_size)),
        cls=out.last_hidden_state[:, 0],
        last_attention=out.attentions[-1],
        cls_small=backbone(small, interpolate_pos_encoding=True).last_hidden_state[:, 0],
        cls_masked=backbone(x, patches_to_keep=patches_to_keep).last_hidden_state[:, 0],
        eval_feature_last1=backbone.representation(x),
    )
    for key, (layers,) in golden.matching(r"eval_feature_last(\d+)"):
        class_tokens = [state[:, 0] for state in out.hidden_states[-int(layers) :]]
        golden.check_all({key: torch.cat(class_tokens, dim=-1)})
    for key, (height, width) in golden.matching(r"pos_(\d+)x(\d+)"):
        positions = interpolate_positions(backbone.pos_embed, (int(height), int(width)))
        golden.check_all({key: positions})


def check_projections(golden: Golden, x: torch.Tensor, patches_to_keep: torch.Tensor) -> None:
    """What the head makes of one view, in both modes, and what that does to its statistics."""
    small = golden.tensor("x_small")
    golden.check(
        proj_eval=encoder_of(golden).eval()([x], [None])[0],
        proj_small_eval=encoder_of(golden).eval()([small], [None])[0],
        proj_small_train=encoder_of(golden)([small], [None])[0],
        proj_masked_train=encoder_of(golden)([x], [patches_to_keep])[0],
    )
    encoder = encoder_of(golden)
    golden.check(proj_train=encoder([x], [None])[0])
    golden.check_all({f"after_train/{name}": value for name, value in encoder.named_buffers()})


def check_gradients(golden: Golden, x: torch.Tensor, patches_to_keep: torch.Tensor) -> None:
    """Four views of two sizes at once: projections, statistics, and every gradient."""
    encoder = encoder_of(golden)
    small = golden.tensor("x_small")
    views = [x, x.flip(-1), small, small.flip(-2)]
    z = encoder(views, [patches_to_keep, patches_to_keep, None, None]).flatten(0, 1)
    golden.check(multi_train=z)
    golden.check_all({f"after_multi/{name}": value for name, value in encoder.named_buffers()})

    weights = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).reshape(z.shape)
    (weights * z).sum().backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters()}
    gradients = to_original(gradients, encoder.config.num_channels)
    names = golden.raw("grad_keys")
    assert set(names) == set(gradients)
    golden.check(grad_norms=torch.stack([gradients[name].norm() for name in names]))
    golden.check_all({key: gradients[name] for key, (name,) in golden.matching("grad/(.*)")})


# -- ten steps of training -------------------------------------------------------------------------

# Zero gradients in exact arithmetic, of which Adam makes steps nevertheless: the key third of each
# qkv bias, and shifts that batch norm takes away. The running means inherit them.
NOISY = re.compile(r"(?!blocks\.\d+\.norm).*(qkv\.bias|norm\.bias|fc\.fc[12]\.bias|running_mean)")


def limit_of_weights(name: str) -> float:
    """How far a tensor of this name may be off after some steps."""
    return 1e-6 if NOISY.fullmatch(name) else 1e-8


def test_ten_training_steps_leave_the_numbers_of_the_published_code():
    """train.npz: schedules, losses, gradients and norms of every step, and the final weights."""
    train_msn = pytest.importorskip("train_msn")
    golden = Golden("train")
    model = pretraining_of(golden)
    schedule = schedule_of(train_msn, golden)
    optimizer = optimizer_of(train_msn, golden, model, schedule)
    names = golden.raw("norm_keys").tolist()
    weights = encoder_weights(model.anchor_encoder)
    assert set(names) == {name for name, value in weights.items() if value.is_floating_point()}

    prototype_gradients = []
    model.prototypes.register_hook(prototype_gradients.append)
    records = []
    for step in range(golden.number("steps")):
        now = train_msn.StepValues(
            lr=schedule["lr"][step],
            weight_decay=schedule["wd"][step],
            momentum=schedule["ema"][step],
            sharpening=schedule["sharpen"][step],
        )
        target_view, anchor_views, patches_to_keep = batch_of(golden, step)
        clip_grad = golden.number("cfg/clip_grad")
        out, metrics = train_msn.train_step(
            model, optimizer, target_view, anchor_views, patches_to_keep, now, clip_grad
        )
        records.append(
            {
                **terms_of(golden, out),
                **norms_of(model, names),
                "grad_norm": torch.tensor(metrics["grad_norm"], dtype=torch.float64),
                "proto_grad_norm": prototype_gradients[step].norm(),
                "lr_all": of_groups(optimizer, "lr"),
                "wd_all": of_groups(optimizer, "weight_decay"),
            }
        )
        if step == 0:
            check_first_step(golden, model)

    check_records(golden, records, names)
    check_final_weights(golden, model)
    golden.done()


def pretraining_of(golden: Golden) -> ViTMSNForPreTraining:
    """The model of train.npz as it was before the first step."""
    init = golden.folder("init/")
    use_memax = golden.number("cfg/me_max")
    use_entropy = golden.number("cfg/use_ent")
    assert golden.number("cfg/num_proto") == golden.number("K")
    model = ViTMSNForPreTraining(
        config_of(golden, init),
        golden.number("hidden"),
        golden.number("out"),
        golden.number("K"),
        temperature=golden.number("cfg/temperature"),
        label_smoothing=golden.number("cfg/label_smoothing"),
        sinkhorn_iterations=3 * golden.number("cfg/use_sinkhorn"),
        memax_weight=use_memax * golden.number("cfg/memax_weight"),
        entropy_weight=use_entropy * golden.number("cfg/ent_weight"),
    ).double()
    model.anchor_encoder.load_state_dict(from_original(init))
    model.target_encoder.load_state_dict(from_original(init))
    with torch.no_grad():
        model.prototypes.copy_(golden.tensor("init_prototypes"))
    return model


def schedule_of(train_msn, golden: Golden) -> dict[str, list[float]]:
    """Every step's learning rate, weight decay, sharpening and momentum, held against the file."""
    ipe = golden.number("ipe")
    epochs = golden.number("epochs")
    steps = golden.number("steps")
    assert golden.number("cfg/epochs") == epochs
    schedule = scheduled(train_msn, golden, "cfg/", ipe, epochs, steps)

    # The file does not name the ends of the momentum's straight line: they follow from its steps.
    momenta = golden.tensor("step_ema").tolist()
    slope = (momenta[-1] - momenta[0]) / max(steps - 1, 1)
    ends = [momenta[0], momenta[0] + slope * 1.25 * ipe * epochs]
    schedule["ema"] = straight_line(train_msn, ipe * epochs, ends, steps)

    names_there = {"lr": "lr", "wd": "wd", "sharpen": "T", "ema": "ema"}
    for name, there in names_there.items():
        golden.check_all({f"step_{there}": torch.tensor(schedule[name], dtype=torch.float64)})
    return schedule


def optimizer_of(
    train_msn, golden: Golden, model: ViTMSNForPreTraining, schedule: dict[str, list[float]]
) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(
        train_msn.parameter_groups(model, schedule["wd"][0]),
        lr=schedule["lr"][0],
        betas=tuple(golden.tensor("betas").tolist()),
        eps=golden.number("adam_eps"),
    )
    golden.check(opt_group_sizes=[len(group["params"]) for group in optimizer.param_groups])
    return optimizer


def batch_of(golden: Golden, step: int) -> tuple:
    """Target view, anchor views and patches_to_keep of a step: random views, then focal views."""
    ipe = golden.number("ipe")
    b = golden.number("B")
    random_views = golden.number("rand_views")
    focal_views = golden.number("focal_views")
    large = golden.tensor("views_large")
    small = golden.tensor("views_small")
    patches_to_keep = golden.tensor("keep")
    assert golden.number("cfg/batch_size") == b
    assert golden.number("focal") == small.shape[-1]
    assert large.shape[:3] == (ipe, 1 + random_views, b)
    assert small.shape[:3] == (ipe, focal_views, b)
    num_patches = (golden.number("img") // golden.number("patch")) ** 2
    r = num_patches_to_keep(num_patches, golden.number("patch_drop"))
    assert patches_to_keep.shape[1] == r

    target_view, *masked = large[step % ipe]
    for_random = [patches_to_keep[step].expand(b, -1)] * random_views
    for_focal = [None] * focal_views
    return target_view, [*masked, *small[step % ipe]], [*for_random, *for_focal]


def terms_of(golden: Golden, out: MSNLoss) -> dict[str, torch.Tensor]:
    """The loss of a step under the file's names; a term that is switched off is 0 there."""
    return {
        "ce": out.cross_entropy,
        "memax": golden.number("cfg/me_max") * out.memax,
        "ent": golden.number("cfg/use_ent") * out.entropy,
        "total": out.loss,
        "assignment": out.target_assignments,
    }


def encoder_weights(encoder: MSNEncoder) -> dict[str, torch.Tensor]:
    """Weights and buffers by their original names."""
    return to_original(encoder.state_dict(), encoder.config.num_channels)


def norms_of(model: ViTMSNForPreTraining, names: list[str]) -> dict[str, torch.Tensor]:
    """The norm of each named tensor of both encoders, and that of the prototypes."""
    anchor = encoder_weights(model.anchor_encoder)
    target = encoder_weights(model.target_encoder)
    return {
        "norm_encoder": torch.stack([anchor[name].norm() for name in names]),
        "norm_target": torch.stack([target[name].norm() for name in names]),
        "norm_prototypes": model.prototypes.detach().norm(),
    }


def of_groups(optimizer: torch.optim.Optimizer, key: str) -> torch.Tensor:
    return torch.tensor([group[key] for group in optimizer.param_groups], dtype=torch.float64)


def check_first_step(golden: Golden, model: ViTMSNForPreTraining) -> None:
    weights = encoder_weights(model.anchor_encoder)
    for key, (name,) in golden.matching("step1_encoder/(.*)"):
        golden.check_all({key: weights[name]}, 1e-8)
    golden.check(1e-8, step1_prototypes=model.prototypes)


def check_records(golden: Golden, records: list[dict], names: list[str]) -> None:
    """Every number of every step; of norms, each column has the limit of its tensor."""
    for key in records[0]:
        ours = torch.stack([torch.as_tensor(record[key]).detach() for record in records])
        expected = golden.tensor(f"step_{key}")
        if key not in ("norm_encoder", "norm_target"):
            assert_relatively_close(ours, expected, LIMIT, f"step_{key}")
            continue

        assert ours.shape == expected.shape
        for column, name in enumerate(names):
            limit = limit_of_weights(name)
            what = f"step_{key} of {name}"
            assert_relatively_close(ours[:, column], expected[:, column], limit, what)


def check_final_weights(golden: Golden, model: ViTMSNForPreTraining) -> None:
    encoders = {"final_encoder": model.anchor_encoder, "final_target": model.target_encoder}
    for folder, encoder in encoders.items():
        weights = encoder_weights(encoder)
        assert set(golden.folder(f"{folder}/")) == set(weights)
        for name, value in weights.items():
            golden.check_all({f"{folder}/{name}": value}, limit_of_weights(name))
    golden.check(1e-8, final_prototypes=model.prototypes)


def test_the_logistic_probe_finds_the_minimum():
    """logistic.npz: weights, objective and predictions of the probe for each penalty."""
    finetune = pytest.importorskip("finetune")
    if not hasattr(finetune, "fit_logistic_probe"):
        pytest.skip("finetune.py has no logistic probe yet")
    golden = Golden("logistic")
    train_y = golden.tensor("train_y")
    test_y = golden.tensor("test_y")
    train_x = finetune.center_and_scale(golden.tensor("train_x"))
    test_x = finetune.center_and_scale(golden.tensor("test_x"))
    golden.check(train_rows=train_x, test_rows=test_x)

    for i in range(golden.number("num_lambdas")):
        l2 = golden.number(f"lambda{i}")
        num_classes = len(golden.arrays[f"W{i}"])
        weights = finetune.fit_logistic_probe(train_x, train_y, num_classes, l2)
        penalty = l2 / len(train_y) / 2 * weights.square().sum()
        objective = F.cross_entropy(train_x @ weights.T, train_y) + penalty
        predicted = (test_x @ weights.T).argmax(dim=-1)
        accuracy = (predicted == test_y).double().mean()
        assert (predicted == golden.tensor(f"test_pred{i}")).all()
        golden.check_all({f"W{i}": weights, f"objective{i}": objective, f"test_acc{i}": accuracy})
    golden.done()
