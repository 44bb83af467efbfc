"""The calls that a run names are there, and are made."""

from contextlib import ExitStack
from pkgutil import resolve_name
from unittest.mock import patch

from lance_mlx import BFLOAT16, Question, Request, Visual, VisualKind, load
from lance_mlx.calls import CALLS


def test_a_picture_and_an_answer_make_all_calls(checkpoint, oracles):
    model, seen = load(checkpoint, BFLOAT16), (Visual(oracles / "media" / "garden.png", VisualKind.IMAGE),)
    edit = Request("image_edit", "make it blue", visuals=seen, vae_resolution=64, vit_resolution=56, num_steps=2)
    question = Question("x2t_image", "what is it?", seen, vit_resolution=56, max_new_tokens=2)
    made = set()
    with ExitStack() as stack:
        for name in CALLS:
            module, _, path = CALLS[name].partition(":")
            owner, _, attribute = path.rpartition(".")
            owner = resolve_name(f"{module}:{owner}" if owner else module)
            original = getattr(owner, attribute)

            def called(*given, name=name, original=original, **values):
                made.add(name)
                return original(*given, **values)

            stack.enter_context(patch.object(owner, attribute, called))
        assert len(model.generate(edit).frames) == 1
        assert model.answer(question).tokens
    assert made == set(CALLS)
