"""What comparisons vary: the places of kinds, the names of models, and what is refused."""

import pytest

from metacanary.comparisons import model_texts, points, recipe_text, same_model

CONVNET = {"name": "convnet", "options": {"widths": [8, 16], "pool": "average", "logit_scale": 0.3}}
WIDER = {"name": "convnet", "options": {**CONVNET["options"], "widths": [16, 32]}}
RESNET = {"name": "resnet9", "options": {"width": 0.25}}
RANDOM = {"family": "random", "num_canaries": 100}
OPTIMIZED = {"family": "metagradient", "num_canaries": 100, "start": "noise", "model": CONVNET}


def test_points_by_start_and_by_number():
    kinds = {"r": RANDOM, "a": OPTIMIZED, "b": {**OPTIMIZED, "start": "random"}, "c": {**OPTIMIZED, "num_canaries": 25}}
    by_start = {name: kinds[name] for name in "rab"}
    assert points(by_start, "start") == {
        "r": ("not optimised", "random"),
        "a": ("metagradient", "noise"),
        "b": ("metagradient", "random"),
    }
    by_number = {name: kinds[name] for name in "rac"}
    assert points(by_number, "num_canaries") == {
        "r": ("random", 100),
        "a": ("metagradient", 100),
        "c": ("metagradient", 25),
    }


@pytest.mark.parametrize("by", ["model", "cost"])
def test_points_by_model_and_cost_are_the_kinds(by):
    kinds = {"r": RANDOM, "a": OPTIMIZED, "b": {**OPTIMIZED, "model": RESNET}}
    expected = {"r": ("not optimised", "r"), "a": ("metagradient", "a"), "b": ("metagradient", "b")}
    assert points(kinds, by) == expected


@pytest.mark.parametrize(
    ("by", "kinds", "message"),
    [
        ("width", {"a": OPTIMIZED}, "by: got 'width', expected one of start, num_canaries, model, cost"),
        ("start", {"a": OPTIMIZED, "b": OPTIMIZED}, "canaries: got a and b, both metagradient with start noise"),
        ("num_canaries", {"r": RANDOM, "s": RANDOM}, "canaries: got r and s, both random with num_canaries 100"),
        ("cost", {"a": OPTIMIZED}, "canaries: got [] of family random, expected one"),
        ("cost", {"r": RANDOM, "s": RANDOM, "a": OPTIMIZED}, "canaries: got ['r', 's'] of family random"),
        ("cost", {"r": RANDOM}, "canaries: got ['r'], expected at least one kind that is optimised"),
        *(
            (by, {"r": RANDOM, "a": {**OPTIMIZED, "num_canaries": 25}}, "canaries: got kinds of num_canaries [25, 100]")
            for by in ("start", "model", "cost")
        ),
    ],
)
def test_points_rejects(by, kinds, message):
    with pytest.raises(ValueError) as error:
        points(kinds, by)
    assert message in str(error.value)


def test_same_model_asks_what_it_is_and_not_how_it_is_computed():
    quick = {"name": "resnet9", "options": {"width": 0.25, "as_matmul": True}}
    assert same_model(RESNET, quick)
    assert model_texts({"a": RESNET, "b": quick}) == {"a": "resnet9", "b": "resnet9"}
    assert not same_model(CONVNET, WIDER)
    assert not same_model(CONVNET, {**CONVNET, "name": "resnet9"})
    assert not same_model(CONVNET, {"name": "convnet", "options": {"widths": [8, 16]}})
    assert not same_model(None, CONVNET)


def test_model_texts_name_what_tells_models_apart():
    texts = model_texts({"a": CONVNET, "b": WIDER, "c": RESNET, "d": CONVNET})
    assert texts == {
        "a": "convnet widths 8-16",
        "b": "convnet widths 16-32",
        "c": "resnet9",
        "d": "convnet widths 8-16",
    }
    both = model_texts({"a": CONVNET, "b": {"name": "convnet", "options": {**WIDER["options"], "logit_scale": 0.1}}})
    assert both["b"] == "convnet logit scale 0.1 widths 16-32"


def test_recipes_are_named_by_algorithm_and_start():
    assert recipe_text({"algorithm": "dpsgd"}) == "dpsgd"
    assert recipe_text({"algorithm": "dpsgd", "pretraining": None}) == "dpsgd"
    assert recipe_text({"algorithm": "dpsgd", "pretraining": "public"}) == "dpsgd, pretrained"
