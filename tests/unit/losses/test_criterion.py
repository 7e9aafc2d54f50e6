"""All losses of every kind of batch: the same names everywhere, finite, connected; agreement of processes."""

from __future__ import annotations

import dataclasses
import multiprocessing

import pytest
import torch
from torch import distributed

from proxydet.errors import ConfigError
from proxydet.losses.config import (
    ClassificationLossConfig,
    DistillationLossConfig,
    ImageLabelLossConfig,
    LossConfig,
)
from proxydet.losses.criterion import Criterion
from proxydet.modeling.centernet import average_over_processes

NAMES = {
    *(
        f"{name}_stage{step}"
        for name in ("loss_cls", "loss_box_reg", "image_loss")
        for step in range(3)
    ),
    "cmm_loss_stage2",
    "loss_mask",
    "loss_centernet_loc",
    "loss_centernet_agn_pos",
    "loss_centernet_agn_neg",
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def losses_of(network, batch, config: LossConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    output = network(batch, generator=generator(seed))
    return Criterion(config)(output, generator=generator(seed))


def total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.fixture
def network(tiny):
    return tiny.lively(tiny.network()).train()


@pytest.mark.parametrize("kind", ["box_batch", "empty_batch", "label_batch"])
def test_every_batch_has_the_published_names(network, tiny, kind):
    losses = losses_of(network, getattr(tiny, kind)(), tiny.LOSSES)
    assert set(losses) == NAMES
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    total(losses).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_which_losses_a_batch_has_a_say_in(network, tiny):
    boxes = losses_of(network, tiny.box_batch(), tiny.LOSSES)
    assert {name for name, loss in boxes.items() if loss == 0} == {
        f"image_loss_stage{step}" for step in range(3)
    }
    labels = losses_of(network, tiny.label_batch(), tiny.LOSSES)
    assert {name for name, loss in labels.items() if loss != 0} == {
        f"image_loss_stage{step}" for step in range(3)
    }


def test_without_mixup_branch_and_masks_the_names_stay(tiny):
    network = tiny.lively(tiny.network(tiny.model_config(mixup_branch=False))).train()
    losses = losses_of(network, tiny.box_batch(None), tiny.LOSSES)
    assert set(losses) == NAMES
    assert losses["cmm_loss_stage2"] == losses["loss_mask"] == 0


@pytest.mark.parametrize("kind", ["box_batch", "empty_batch", "label_batch"])
def test_without_a_mask_head_the_names_stay(tiny, kind):
    network = tiny.lively(tiny.network(tiny.model_config(masks=None))).train()
    losses = losses_of(network, getattr(tiny, kind)(), tiny.LOSSES)
    assert set(losses) == NAMES
    assert losses["loss_mask"] == 0


def test_the_mask_loss_skips_objects_without_a_mask(network, tiny):
    """The mean over the others, whatever their place in ``gt_masks`` holds."""
    batch = tiny.box_batch()
    reference = losses_of(network, batch, tiny.LOSSES)
    first, second = batch.instances
    first.gt_masked, second.gt_masked = torch.ones(3).bool(), torch.ones(1).bool()
    everything = losses_of(network, batch, tiny.LOSSES)
    assert all(torch.equal(everything[name], reference[name]) for name in NAMES)
    first.gt_masked[1:] = False
    some = losses_of(network, batch, tiny.LOSSES)
    first.gt_masks.polygons[1] = first.gt_masks.polygons[2] = []
    assert torch.equal(losses_of(network, batch, tiny.LOSSES)["loss_mask"], some["loss_mask"])
    assert some["loss_mask"] != reference["loss_mask"]
    others = NAMES - {"loss_mask"}
    assert all(torch.equal(some[name], reference[name]) for name in others)


def test_which_parameters_learn_from_which_batch(network, tiny):
    parts = {
        "heatmap": "proposal_generator.centernet_head.agn_hm.weight",
        "boxes": "roi_heads.box_predictor.2.bbox_pred.2.weight",
        "classes": "roi_heads.box_predictor.0.cls_score.linear.weight",
        "masks": "roi_heads.mask_head.predictor.weight",
        "mixup": "roi_heads.box_head_cmm.2.fc1.weight",
        "backbone": "backbone.bottom_up.base.conv1.weight",
    }

    def learning(batch) -> set[str]:
        network.zero_grad(set_to_none=True)
        total(losses_of(network, batch, tiny.LOSSES)).backward()
        gradients = {name: network.get_parameter(path).grad for name, path in parts.items()}
        return {name for name, grad in gradients.items() if grad is not None and grad.any()}

    assert learning(tiny.box_batch()) == set(parts)
    assert learning(tiny.label_batch()) == {"classes", "backbone"}


def test_weights_are_factors(network, tiny):
    base = losses_of(network, tiny.box_batch(), tiny.LOSSES)
    config = dataclasses.replace(
        tiny.LOSSES,
        mask_weight=3.0,
        classification=ClassificationLossConfig(weight=2.0, box_weight=0.5),
        mixup=dataclasses.replace(tiny.LOSSES.mixup, weight=1.0),
    )
    changed = losses_of(network, tiny.box_batch(), config)
    for name, factor in {
        "loss_mask": 3.0,
        "loss_cls_stage1": 2.0,
        "loss_box_reg_stage2": 0.5,
        "cmm_loss_stage2": 1 / 256,
    }.items():
        assert changed[name].item() == pytest.approx(factor * base[name].item(), rel=1e-5)


def test_the_background_column_adds_a_constant(network, tiny):
    with_column = losses_of(network, tiny.label_batch(), tiny.LOSSES)
    config = dataclasses.replace(
        tiny.LOSSES, image_labels=ImageLabelLossConfig(background_column=False)
    )
    without = losses_of(network, tiny.label_batch(), config)
    gap = with_column["image_loss_stage0"] - without["image_loss_stage0"]
    assert gap.item() == pytest.approx(0.1 * 0.6931, rel=1e-3)


def test_only_the_looked_at_classes_are_multiplied_out(tiny):
    classes = 400
    network = tiny.lively(tiny.network(classes=classes)).train()
    config = dataclasses.replace(
        tiny.LOSSES, classification=ClassificationLossConfig(sampled_categories=20)
    )
    widest = []
    multiply = torch.Tensor.__matmul__

    def watch(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        widest.append(second.shape[-1])
        return multiply(first, second)

    output = network(tiny.box_batch(), generator=generator())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", watch)
        Criterion(config)(output, generator=generator())
    assert widest
    assert max(widest) == 20


def test_a_small_detector_learns_two_images(tiny):
    torch.manual_seed(0)
    network, source = tiny.network().train(), generator()
    criterion = Criterion(tiny.LOSSES)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    batches = [tiny.box_batch(), tiny.label_batch()]
    history = []
    for step in range(40):
        losses = criterion(network(batches[step % 2], generator=source), generator=source)
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
        history.append(float(total(losses).detach()))
    assert sum(history[-10::2]) < 0.65 * sum(history[:10:2])
    assert sum(history[-9::2]) < 0.65 * sum(history[1:10:2])


def test_counts_are_at_least_one():
    assert average_over_processes(torch.tensor([0, 3])).tolist() == [1.0, 3.0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_two_processes_agree_whatever_their_batches(network, tiny, tmp_path):
    """One process has a box batch and the other an image-label batch: no hang, one count for both."""
    alone = losses_of(network, tiny.box_batch(), tiny.LOSSES)

    def agree(rank: int) -> None:
        store = f"file://{tmp_path / 'store'}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        batch = tiny.box_batch() if rank == 0 else tiny.label_batch()
        mixed = losses_of(network, batch, tiny.LOSSES)
        equal = losses_of(network, tiny.box_batch(), tiny.LOSSES)
        assert mixed.keys() == equal.keys()
        for name in equal:
            torch.testing.assert_close(equal[name], alone[name])
        if rank == 0:
            # The other process counted nothing, so the average is half, and the loss twice as large.
            for name in ("loss_centernet_loc", "loss_centernet_agn_pos"):
                torch.testing.assert_close(mixed[name], 2 * equal[name], rtol=1e-4, atol=0)
        distributed.destroy_process_group()

    # Forked, for they need no other libraries than this process; nothing in them computes gradients.
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=agree, args=(rank,)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]


def test_distillation_keeps_what_the_reference_says_of_regions_without_an_object(network, tiny):
    """Against a loop over the regions; the reference learns nothing and draws no random number."""
    batch = tiny.box_batch()
    plain = losses_of(network, batch, tiny.LOSSES)
    with torch.no_grad():
        start = {n: v + 0.05 * torch.randn_like(v) for n, v in network.named_parameters()}
    names = set(network.state_dict())
    network.keep_reference(start)
    assert set(network.state_dict()) == names
    weights = DistillationLossConfig(weight=3.0, box_weight=0.5)
    config = dataclasses.replace(tiny.LOSSES, distillation=weights)
    output = network.forward_train(batch, generator=generator())
    losses = Criterion(config)(output, generator=generator(1))
    for name, value in losses_of(network, batch, tiny.LOSSES).items():
        torch.testing.assert_close(value, plain[name])
    for index, step in enumerate(output.steps):
        total, valid = 0.0, 0
        for image, labels in enumerate(step.assignment.labels_BR.tolist()):
            for region, label in enumerate(labels):
                valid += label >= 0
                if label == output.table.classes:
                    rows = (step, step.reference)
                    left, right = (row.embeddings_BRD[image, region] for row in rows)
                    apart = (step.deltas_BR4 - step.reference.deltas_BR4)[image, region].abs().sum()
                    total = total + 1 - left @ right + 0.5 * apart
        torch.testing.assert_close(losses[f"distillation_loss_stage{index}"], 3.0 * total / valid)
        assert not step.reference.embeddings_BRD.requires_grad
        assert total > 0
    assert losses_of(network, tiny.label_batch(), config).keys() == losses.keys()
    with pytest.raises(ConfigError, match=r"distillation\.weight"):
        losses_of(tiny.network(), batch, config)
