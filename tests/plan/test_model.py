"""The model of a plan: shapes alone, of a number, a preset, or a configuration."""

import pytest

from muonwire.errors import UsageError
from muonwire.plan.model import of_task, read_model
from muonwire.tasks import TextSettings


@pytest.mark.parametrize("number", ["300", "1e5", "123_200", "124e6", "7e9", "1e11"])
def test_a_number_is_kept_to_the_last_parameter_mostly_in_matrices(number):
    model = read_model(number)
    assert model.num_parameters == float(number)
    assert model.num_in_matrices >= 0.8 * model.num_parameters
    assert all(p.is_meta for p in model.trained)


def test_a_preset_is_the_task_s_model():
    model, task = read_model("pico"), of_task(TextSettings(model_size="pico").make())
    shapes = [[p.shape for p in m.trained] for m in (model, task)]
    assert shapes[0] == shapes[1]
    assert model.num_parameters == 123_200
    assert model.preset == "pico"


def test_a_configuration_is_read_without_weights(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=100, n_positions=32).save_pretrained(tmp_path)
    model = read_model(str(tmp_path))
    # Embeddings, and of each layer 4 matrices with biases, and norms.
    layer = 64 * (3 + 1 + 4 + 4) * 64 + 64 * (3 + 1 + 4 + 1) + 4 * 64
    assert model.num_parameters == (100 + 32) * 64 + 2 * layer + 2 * 64
    assert all(p.is_meta for p in model.trained)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "parameters is 0; their number lies between"),
        ("-5", "parameters is -5"),
        ("nan", "parameters is nan"),
        ("20", "at least 256 make a matrix"),
        ("EMPTY", "a folder without a model's config.json"),
    ],
)
def test_what_is_no_model_is_named(text, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        read_model(str(tmp_path) if text == "EMPTY" else text)
