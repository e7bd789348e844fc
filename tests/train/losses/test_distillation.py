from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from roadseg.errors import ConfigError
from roadseg.labels import CAMVID, CITYSCAPES, LabelSet
from roadseg.release.archive import Release
from roadseg.train.losses.distillation import Distillation, refuse_other_classes


class Teacher(nn.Module):
    """Batch norm and a 1x1 convolution, at the image's size over `stride`."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, stride=stride)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(self.norm(image))


def kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> float:
    """Mean over pixels of sum t log(t / s), in float64."""

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z.astype(np.float64) / temperature)
        return e / e.sum(1, keepdims=True)

    t, s = softmax(teacher), softmax(student)
    return float((t * np.log(t / s)).sum(1).mean())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_numpy(temperature: float) -> None:
    teacher, image = Teacher(2), torch.randn(2, 3, 8, 6)
    student = torch.randn(2, 4, 4, 3, requires_grad=True)
    got = Distillation(teacher, 0.5, temperature)(image, student, 1)
    with torch.no_grad():
        wanted = 0.5 * temperature**2 * kl(teacher(image).numpy(), student.numpy(), temperature)
    assert float(got.detach()) == pytest.approx(wanted, rel=1e-5)


def test_the_teachers_logits_are_resized_to_the_students() -> None:
    teacher, image = Teacher(1), torch.randn(1, 3, 8, 8)
    student = torch.randn(1, 4, 2, 2)
    got = Distillation(teacher, 1.0, 1.0)(image, student, 1)
    with torch.no_grad():
        resized = nn.functional.interpolate(teacher(image), (2, 2), mode="bilinear", align_corners=False)
    assert float(got) == pytest.approx(kl(resized.numpy(), student.numpy(), 1.0), rel=1e-5)


def test_the_teacher_stays_as_it_is() -> None:
    teacher = Teacher(2).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = torch.randn(2, 4, 4, 3, requires_grad=True)
    Distillation(teacher, 1.0, 2.0)(torch.randn(2, 3, 8, 6), student, 1).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_parts_add_up_to_the_batch() -> None:
    distillation = Distillation(Teacher(2), 1.0, 2.0)
    image, student = torch.randn(4, 3, 8, 6), torch.randn(4, 4, 4, 3)
    whole = distillation(image, student, 1)
    parts = [distillation(i, s, 2) for i, s in zip(image.split(2), student.split(2), strict=True)]
    torch.testing.assert_close(sum(parts, torch.zeros(())), whole)


def test_a_pupil_that_agrees_pays_nothing() -> None:
    teacher, image = Teacher(2), torch.randn(2, 3, 8, 6)
    distillation = Distillation(teacher, 1.0, 2.0)
    student = (teacher(image).detach() + 5).requires_grad_()  # softmax ignores what all classes share
    loss = distillation(image, student, 1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extremes_are_finite(dtype: torch.dtype) -> None:
    class Extreme(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.tensor([65504.0, -65504, 0]).view(1, 3, 1, 1).expand(1, 3, 2, 2).to(dtype)

    student = torch.tensor([-65504.0, 65504, 0]).view(1, 3, 1, 1).repeat(1, 1, 2, 2).to(dtype).requires_grad_()
    loss = Distillation(Extreme(), 1.0, 0.5)(torch.zeros(1, 3, 2, 2), student, 1)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and loss > 0
    assert student.grad is not None and student.grad.isfinite().all()


def test_gradient() -> None:
    teacher = Teacher(2).double()
    distillation = Distillation(teacher, 1.0, 2.0)
    image = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    student = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: distillation(image, s, 1), student)


def release_of(label_set: LabelSet) -> Release:
    return Release("0123456789abcdef", {"label_set": label_set.to_json()}, {})


def test_a_teacher_of_other_classes_is_refused() -> None:
    refuse_other_classes(release_of(CAMVID), CAMVID)
    with pytest.raises(ConfigError) as caught:
        refuse_other_classes(release_of(CITYSCAPES), CAMVID)
    error = caught.value
    assert "sidewalk" in error.found and "bicyclist" in error.expected
    assert error.where == "training.distill_from" and error.todo
    swapped = replace(
        CAMVID, classes=tuple(replace(c, train_id=1 - c.train_id) if c.id < 2 else c for c in CAMVID.classes)
    )
    with pytest.raises(ConfigError):
        refuse_other_classes(release_of(swapped), CAMVID)
