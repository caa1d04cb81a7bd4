"""The distillation example, shortened: a student learns from its teacher, whole or by its likeliest tokens, and is drawn."""

import importlib
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("distil")


def test_student_improves(example, tmp_path):
    curves = example.distil(teacher_steps=60, steps=40, teacher_hidden=48, hidden=16)
    teacher = curves.pop("teacher")
    assert teacher.loss[-1] < teacher.loss[0] - 1.5
    alone, dense, sparse = curves.values()
    for curve in (dense, sparse):
        assert curve.steps[0] == 0
        assert curve.steps[-1] == 40
        assert curve.loss[-1] < curve.loss[0] - 1.5
        assert curve.from_teacher[-1] < 0.6 * curve.from_teacher[0]
        assert curve.from_teacher[-1] < alone.from_teacher[-1]  # the student learns from the teacher
    assert dense.loss[-1] != sparse.loss[-1]

    pytest.importorskip("matplotlib")
    picture = tmp_path / "distil.png"
    example.draw({"teacher": teacher, **curves}, str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
