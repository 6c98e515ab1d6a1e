"""Distillation losses, and students of another architecture than the teacher."""

from __future__ import annotations

import copy

import pytest
import torch

from resight.encoder.model import Encoder, EncoderConfig
from resight.image import ImageSpec
from resight.training.adaptation.distill import Teacher, fit_student
from resight.training.adaptation.recipe import Recipe

RECIPE = Recipe("mine", local_loss_weight=0.2, temperature=0.05)
SMALL = ImageSpec(64, 32)


def encoder(backbone: str = "osnet_x0_25", dim: int = 16, image: ImageSpec = SMALL) -> Encoder:
    torch.manual_seed(3)
    return Encoder(EncoderConfig(backbone, "gem", dim, image)).eval()


def test_guidance_is_the_squared_distance_on_every_view_and_the_teacher_has_no_gradient() -> None:
    teacher = Teacher(encoder())
    images = torch.randn(5, 3, 64, 32)
    targets = teacher.views(images)
    torch.manual_seed(9)
    student = Encoder(teacher.encoder.config).eval()
    features = student(images)
    found = teacher.losses(features, targets, RECIPE)
    assert list(found) == ["guidance"]
    gaps = [((f - t) ** 2).sum(1) for f, t in zip(features, targets, strict=True)]
    assert torch.allclose(found["guidance"], 0.8 * gaps[0] + 0.2 * gaps[1] + 0.2 * gaps[2])
    found["guidance"].sum().backward()
    assert all(parameter.grad is None for parameter in teacher.encoder.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


def test_relations_are_measured_to_the_teachers_anchors() -> None:
    teacher = Teacher(encoder(), anchors=torch.nn.functional.normalize(torch.randn(7, 16)))
    images = torch.randn(4, 3, 64, 32)
    targets = teacher.views(images)
    same = teacher.losses(targets, targets, RECIPE)
    assert same["relation"].tolist() == pytest.approx([0] * 4, abs=1e-5)
    other = teacher.losses([view.flip(0) for view in targets], targets, RECIPE)
    assert (other["relation"] > 0).all()


@pytest.mark.parametrize(
    "teacher, student",
    [
        (("resnet18", 0, SMALL), ("osnet_x0_25", 32, ImageSpec(128, 64))),
        (("osnet_x1_0", 48, SMALL), ("osnet_x0_25", 48, SMALL)),
        (("osnet_x0_25", 16, SMALL), ("resnet18", 0, SMALL)),
    ],
)
def test_fitted_student_has_the_input_and_feature_size_of_its_teacher(
    teacher: tuple[str, int, ImageSpec], student: tuple[str, int, ImageSpec]
) -> None:
    teacher, start = encoder(*teacher), encoder(*student)
    before = copy.deepcopy(start.state_dict())
    fitted = fit_student(start, teacher)
    assert fitted.feature_dim == teacher.feature_dim and fitted.config.image == teacher.config.image
    assert fitted.config.backbone == student[0]
    with torch.inference_mode():
        views = zip(fitted(torch.randn(2, 3, 64, 32)), teacher(torch.randn(2, 3, 64, 32)), strict=True)
        assert all(one.shape == other.shape for one, other in views)
    for name, tensor in fitted.backbone.state_dict().items():
        assert torch.equal(tensor, before[f"backbone.{name}"]), name
    again = fit_student(start, teacher).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in fitted.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in start.state_dict().items())


def test_heads_with_matching_shapes_keep_their_weights() -> None:
    start = encoder("osnet_x0_25", 48)
    with torch.no_grad():
        start.heads["global"].neck.weight.fill_(3.0)
    fitted = fit_student(start, encoder("osnet_x0_25", 48))
    assert torch.equal(fitted.heads["global"].neck.weight, start.heads["global"].neck.weight)
    other = fit_student(start, encoder("osnet_x0_25", 32))
    assert other.heads["global"].neck.weight.tolist() == [1.0] * 32
